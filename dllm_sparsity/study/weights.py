"""What identifies a model's files: their hashes, or what the hub calls them. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from dllm_sparsity.study.offline import INDEX, shards

_WEIGHTS = (".safetensors", ".json", ".model", ".jinja", ".py", ".txt", ".gguf", ".tiktoken")


def weights_identity(model: str, revision: str | None) -> dict[str, str]:
    """Return what changes when a model's files change: hashes of a folder's files, or the hub's commit.

    The commit is there before the weights are, and stands for all of them: it is a hash of their hashes.

    Args:
        model: Folder or hub id.
        revision: Revision on the hub.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS and path.is_file())
        return {path.name: _hash(path) for path in files}
    from huggingface_hub import hf_hub_download

    cached = Path(hf_hub_download(model, "config.json", revision=revision))
    return {"hub": model, "commit": cached.parent.name}


def hub_blobs(model: str, commit: str | None) -> dict[str, str]:
    """Return the hub's own hash of each file of weights that a model was loaded from; nothing where they are not known.

    The cache of the hub has them as the names of the files that a snapshot's links lead to: sha256 of large files, and
    git's sha1 of others. No network is used and no file of weights is read.

    Args:
        model: Folder or hub id.
        commit: Of the hub; a branch or tag where it is not known.
    """
    from huggingface_hub import try_to_load_from_cache

    if Path(model).expanduser().is_dir():
        return {}
    config = try_to_load_from_cache(model, "config.json", revision=commit)
    if not isinstance(config, str):
        return {}
    snapshot, single = Path(config).parent, "model.safetensors"
    if (snapshot / single).exists():
        names = [single]
    elif (snapshot / INDEX).exists():
        names = [INDEX, *shards(snapshot / INDEX)]
    else:
        names = [path.name for path in snapshot.glob("*.safetensors")]
    links = {name: Path(os.readlink(snapshot / name)) for name in names if (snapshot / name).is_symlink()}
    if len(links) < len(names) or any(link.parent.name != "blobs" for link in links.values()):
        return {}  # as on systems without links
    return {name: link.name for name, link in links.items()}


def _hash(path: Path) -> str:
    """Hash a file once per path, size and time; large weights are not read again for every study."""
    stat = path.stat()
    key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dllm-sparsity" / "hashes.json"
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if isinstance(known, dict) and isinstance(known.get(key), str):
        return known[key]
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        draft = cache.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({**(known if isinstance(known, dict) else {}), key: digest}), encoding="utf-8")
        os.replace(draft, cache)
    except OSError:
        pass  # a cache that cannot be written costs time only
    return digest
