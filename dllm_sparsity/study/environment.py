"""What a study ran on: versions, machine, and the identity of model files. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dllm_sparsity.study.config import ModelConfig

COMPUTING = ("torch", "transformers", "tokenizers", "lm-eval", "datasets", "numpy", "dllm-sparsity")
_HUB_COMMIT = re.compile(r"hf://datasets/([^@]+@[0-9a-f]{40})/")
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


def describe(device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Return versions, machine and settings as plain data; no path and no name of a user is in it.

    Args:
        device: Where the study runs.
        seed: The study's seed.
    """
    more = ("diffusers", "accelerate", "safetensors", "huggingface-hub", "triton", "pyarrow", "plotly", "pydantic")
    found = {
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "packages": versions((*COMPUTING, *more)),
        "device": device,
        "seed": seed,
        "torch": _torch(),
    }
    if (gpus := _gpus(device)) is not None:
        found["gpu"] = gpus
    if (state := git_state(Path.cwd())) is not None:
        found["git"] = state
    return found


def _torch() -> dict[str, Any]:
    """Return the settings of torch that can change a number."""
    import torch

    return {
        "threads": torch.get_num_threads(),
        "float32_matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cuda": torch.version.cuda,
    }


def _gpus(device: str) -> dict[str, Any] | None:
    """Return what a CUDA device is, and its driver, clocks and power limit where nvidia-smi tells them."""
    if not device.startswith("cuda"):
        return None
    import torch

    index = torch.device(device).index or 0
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None  # loading a model says so
    facts = torch.cuda.get_device_properties(index)
    found: dict[str, Any] = {
        "name": facts.name,
        "count": torch.cuda.device_count(),
        "memory_bytes": facts.total_memory,
        "capability": f"{facts.major}.{facts.minor}",
        "cudnn": torch.backends.cudnn.version(),
    }
    names = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
    told = _output("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits")
    if told:
        found |= dict(zip(names, (part.strip() for part in told.splitlines()[0].split(",")), strict=False))
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit of a repository and whether its files differ from it; None where there is no repository.

    Args:
        folder: A folder in it.
    """
    commit = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    if not commit:
        return None
    state: dict[str, Any] = {"commit": commit}
    changes = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    state["changed"] = bool(changes)
    if changes:
        difference = _output("git", "-C", str(folder), "diff", "HEAD") or ""
        state["difference"] = hashlib.sha256(difference.encode()).hexdigest()[:16]
    return state


def _output(*command: str) -> str | None:
    """Return what a program prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=False, text=True, errors="replace")
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def model_settings(lm: Any) -> dict[str, Any]:
    """Return how a loaded model computes.

    Args:
        lm: Its backend.
    """
    settings = getattr(lm.model, "config", None)
    parameter = next(iter(lm.model.parameters()), None)
    return {
        "dtype": None if parameter is None else str(parameter.dtype).removeprefix("torch."),
        "attention": getattr(settings, "_attn_implementation", None),
    }


def describe_model(settings: dict[str, Any], config: ModelConfig, weights: dict[str, str]) -> dict[str, Any]:
    """Return how a model was run.

    Args:
        settings: What `model_settings` returned for it.
        config: The model as the study has it.
        weights: What `weights_identity` returned for it.
    """
    text = json.dumps(weights, sort_keys=True)
    return {
        "revision": weights.get("commit") or config.revision,
        "weights": hashlib.sha256(text.encode()).hexdigest()[:16],
        **settings,
    }


def describe_data(task: Any, prompt_hashes: Iterable[str]) -> dict[str, Any]:
    """Return which data a cell saw: the commits of its data sets where they are known, and a hash of all its prompts.

    Args:
        task: lm-eval's object.
        prompt_hashes: lm-eval's hash of each item's prompt, in the order of the items.
    """
    splits = getattr(task, "dataset", None)
    splits = splits.values() if isinstance(splits, dict) else ()
    sources = [
        str(url) for split in splits for url in getattr(getattr(split, "info", None), "download_checksums", None) or ()
    ]
    digest = hashlib.sha256("\n".join(prompt_hashes).encode()).hexdigest()[:16]
    return {"revisions": sorted({found[1] for url in sources if (found := _HUB_COMMIT.search(url))}), "prompts": digest}


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
