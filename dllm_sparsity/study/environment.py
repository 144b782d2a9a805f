"""What a study ran on: versions, code, machine, model and data. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_sparsity import registry
from dllm_sparsity.study.source import module_files, source_hash

if TYPE_CHECKING:
    from dllm_sparsity.study.config import ModelConfig

COMPUTING = ("torch", "transformers", "tokenizers", "lm-eval", "datasets", "numpy", "dllm-sparsity")
"""Packages that can change a number of any cell. accelerate only places tensors and safetensors only reads them; which
version of triton there is, torch says, for it asks for one exactly."""
PIPELINES = ("diffusers",)
QUANTISERS = ("bitsandbytes", "kernels", "compressed-tensors", "gptqmodel", "autoawq", "torchao", "optimum", "hqq")
"""Packages that compute for models with quantised weights, each for its own kinds."""
_MISSING = "not installed"
_HUB_COMMIT = re.compile(r"hf://datasets/([^@]+@[0-9a-f]{40})/")


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
            found[name] = _MISSING
    return found


def installed(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are there.

    Args:
        names: Packages.
    """
    return {name: found for name, found in versions(tuple(names)).items() if found != _MISSING}


def code_identity(modules: Iterable[str] = ()) -> str:
    """Return a hash of the code that a cell's answer depends on: ours, and what of it comes from other packages.

    Args:
        modules: Modules of the rules, samplers, families and backends that are used; those of this package are hashed
            anyway, of others the module and what it imports of its package.
    """
    package = Path(__file__).parent.parent
    rooms = [package / name for name in ("sparsity", "families", "lm", "diffusion", "study", "tasks")]
    files = [path for room in (*rooms, package.parent / "autoregressive") for path in sorted(room.rglob("*.py"))]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    if outside := module_files(modules):
        digest.update(source_hash(outside).encode())
    return digest.hexdigest()[:16]


def describe(device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Return versions, machine and settings as plain data; no path and no name of a user is in it.

    Args:
        device: Where the study runs.
        seed: The study's seed.
    """
    more = ("diffusers", "accelerate", "safetensors", "huggingface-hub", "triton", "pyarrow", "plotly", "pydantic")
    where_installed = (*QUANTISERS, "peft", "ray", "submitit", *registry.distributions())
    found = {
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "packages": {**versions((*COMPUTING, *more)), **installed(where_installed)},
        "device": device,
        "seed": seed,
        "torch": _torch(),
    }
    if (gpus := _gpus(device)) is not None:
        found["gpu"] = gpus
    if states := git_states(Path(__file__).parent.parent, Path.cwd()):
        found["git"] = states
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


def git_states(package: Path, folder: Path) -> dict[str, Any]:
    """Return the state of the clone that this package was imported from, as `package`, and of the current folder's.

    The current folder's is there as `current_folder` where it is another repository; neither where there is none.

    Args:
        package: The folder of the package.
        folder: The current folder.
    """
    tracked = _output("git", "-C", str(package), "ls-files", "--error-unmatch", "__init__.py")
    found: dict[str, Any] = {}
    if tracked and (state := git_state(package)) is not None:  # else installed, in whatever repository that may be
        found["package"] = state
    if (state := git_state(folder)) is not None and not (tracked and _root(folder) == _root(package)):
        found["current_folder"] = state
    return found


def _root(folder: Path) -> str | None:
    return _output("git", "-C", str(folder), "rev-parse", "--show-toplevel")


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
    """Return how a model was run; `weights` is a hash, and says of what.

    Args:
        settings: What `model_settings` returned for it; `blobs` beside it is what `hub_blobs` did.
        config: The model as the study has it.
        weights: What `weights_identity` returned for it.
    """
    told = {name: value for name, value in settings.items() if name != "blobs"}
    blobs = settings.get("blobs")
    what = "the hub's blobs" if blobs else "the hub's commit" if "commit" in weights else "the files"
    digest = hashlib.sha256(json.dumps(blobs or weights, sort_keys=True).encode()).hexdigest()[:16]
    return {"revision": weights.get("commit") or config.revision, "weights": f"{digest} of {what}", **told}


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
