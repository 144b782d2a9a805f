"""What a study ran on: versions, machine, and the identity of model files. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

COMPUTING = ("torch", "transformers", "tokenizers", "lm-eval", "datasets", "numpy", "dllm-sparsity")
_WEIGHTS = (".safetensors", ".json", ".model", ".jinja", ".py", ".txt", ".gguf")


def versions(names: tuple[str, ...] = COMPUTING) -> dict[str, str]:
    """Return the installed version of each package.

    Args:
        names: Packages.
    """
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def code_identity(modules: Iterable[str] = ()) -> str:
    """Return a hash of the code that a cell's answer depends on: ours, and the modules of rules and samplers.

    Args:
        modules: Names of modules that stand outside this package.
    """
    package = Path(__file__).parent.parent
    rooms = [package / name for name in ("sparsity", "families", "lm", "diffusion", "study", "tasks")]
    files = [path for room in rooms for path in sorted(room.rglob("*.py"))]
    for name in ("autoregressive", *sorted(modules)):
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin) if spec is not None and spec.origin else None
        if origin is not None:
            files += sorted(origin.parent.glob("*.py")) if origin.name == "__init__.py" else [origin]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def describe() -> dict[str, Any]:
    """Return versions and machine as plain data."""
    more = ("diffusers", "accelerate", "pyarrow", "plotly", "pydantic")
    return {
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "packages": versions((*COMPUTING, *more)),
    }


def weights_identity(model: str, revision: str | None) -> dict[str, str]:
    """Return what changes when a model's files change: hashes of a folder's files, or the hub's commit.

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
