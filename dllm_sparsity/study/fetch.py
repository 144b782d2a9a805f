"""Download what a study needs, said before it is done: models in safetensors, tokenizers, and the data of tasks."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_sparsity.errors import UserError, shorten
from dllm_sparsity.lm.hub import check_exists, hub_error, is_hub_there, no_safetensors
from dllm_sparsity.study.cached import code_elsewhere
from dllm_sparsity.study.config import ModelConfig, StudyConfig, TaskSpec
from dllm_sparsity.study.data_sets import data_sets
from dllm_sparsity.study.models import resolve
from dllm_sparsity.study.offline import missing_files
from dllm_sparsity.study.tasks import load_tasks

_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_NOT = ("consolidated*.safetensors", "*.gguf")
_BELOW = "*/*"


@dataclass(frozen=True)
class Need:
    """One model or task and what is still to be downloaded for it.

    Args:
        kind: model or task.
        name: Of a model as it was given, or of a task.
        source: What is downloaded: hub ids of a model and its code, data sets of a task; empty where nothing is.
        files: Files that are missing; 0 for a task.
        missing: Bytes that are missing; None where that is not known before.
        total: Bytes in all; None where that is not known before.
    """

    kind: str
    name: str
    source: str
    files: int
    missing: int | None
    total: int | None


@dataclass(frozen=True)
class _Part:
    """What is downloaded of one repository."""

    repo: str
    revision: str | None
    patterns: list[str]
    ignored: list[str]


def needs(config: StudyConfig) -> list[Need]:
    """Ask the hub what a study needs; no weight and no document is downloaded.

    Args:
        config: The study.

    Raises:
        UserError: A model or task does not exist or may not be read, or the disk has no room for it.
    """
    found = [model_need(model) for model in distinct(config.models)]
    for spec in config.tasks:
        found.append(_task(spec))
    check_room(sum(need.missing or 0 for need in found))
    return found


def fetch(config: StudyConfig, need: Need) -> None:
    """Download one model or task; files that are there whole are kept.

    Args:
        config: The study.
        need: As `needs` returned it.

    Raises:
        UserError: It cannot be had.
    """
    if need.kind == "task":
        for spec in config.tasks:
            if _title(spec) == need.name:
                load_tasks(spec, config.seed)
        return
    if not need.source:
        return
    from huggingface_hub import snapshot_download

    for model in distinct(config.models):
        if model.model == need.name:
            for part in _parts(model):
                _hub(snapshot_download, part)


def key_of(model: ModelConfig) -> tuple[str, str, bool]:
    """Return what tells apart what is downloaded of models: id, revision, and whether folders inside are wanted.

    Args:
        model: The model.
    """
    return model.model, model.revision or "main", bool(model.pipeline)


def distinct(models: tuple[ModelConfig, ...]) -> list[ModelConfig]:
    """Return one configuration for each model and revision, the one with its code where one of them trusts it.

    Args:
        models: The models of a study.
    """
    by: dict[tuple[str, str, bool], ModelConfig] = {}
    for model in models:
        key = key_of(model)
        if key not in by or model.trust_remote_code:
            by[key] = model
    return list(by.values())


def _parts(model: ModelConfig) -> Iterator[_Part]:
    """Give what is downloaded for a model; which repository has its code may be known once its own files are here."""
    name = resolve(model.model)
    if not Path(name).expanduser().is_dir():
        patterns = [*_FILES, *(["*.py"] if model.trust_remote_code else [])]
        yield _Part(name, model.revision, patterns, list(_NOT) if model.pipeline else [*_NOT, _BELOW])
    for repo in code_elsewhere(model):
        yield _Part(repo, None, ["*.py"], [_BELOW])


def _hub(download: Any, part: _Part, **more: Any) -> Any:
    from huggingface_hub.errors import HfHubHTTPError

    keys = {"revision": part.revision, "allow_patterns": part.patterns, "ignore_patterns": part.ignored}
    try:
        return download(part.repo, **keys, **more)
    except HfHubHTTPError as error:
        raise hub_error(part.repo, part.revision, error) from error
    except Exception as error:  # a full disk, or the errors of whatever library the hub's client speaks through
        why = shorten(error)
        if more.get("dry_run"):
            raise UserError(f"the hub could not be asked about {part.repo}: {why}", "try again") from error
        raise UserError(
            f"the download of {part.repo} stopped: {why}",
            "run the same command again: files that are whole are kept",
        ) from error


def model_need(model: ModelConfig) -> Need:
    """Ask the hub what a model needs.

    Args:
        model: The model.

    Raises:
        UserError: It does not exist, may not be read, or has no safetensors.
    """
    from huggingface_hub import snapshot_download

    name = resolve(model.model)
    check_exists(name, model.revision)
    with _no_bars():
        files = {part.repo: _hub(snapshot_download, part, dry_run=True) for part in _parts(model)}
    if name in files and not any(file.filename.endswith(".safetensors") for file in files[name]):
        raise no_safetensors(name)
    absent = {repo: [file for file in own if file.will_download] for repo, own in files.items()}
    here = [] if name in files else [path.stat().st_size for path in Path(name).rglob("*") if path.is_file()]
    return Need(
        "model",
        model.model,
        ", ".join(repo for repo, own in absent.items() if own),
        sum(map(len, absent.values())),
        sum(file.file_size or 0 for own in absent.values() for file in own),
        sum(here) + sum(file.file_size or 0 for own in files.values() for file in own),
    )


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keep the hub's library from showing how far it is with asking."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def check_weights(model: ModelConfig) -> None:
    """Refuse a model that does not exist or whose weights are none that are loaded, before any weight is.

    Args:
        model: The model; of one that is not all on this machine the hub is asked, where it is there.

    Raises:
        UserError: It cannot be had, has no safetensors, or its folder is not whole.
    """
    name = resolve(model.model)
    check_exists(name, model.revision)
    files = missing_files(model)
    if files and not Path(name).is_dir():
        if is_hub_there(name, model.revision):
            model_need(model)
    elif "model.safetensors" in files and has_pickles(name):
        raise no_safetensors(name)
    elif lacking := [file for file in files if " of " not in file]:  # code of another repository can be had
        raise UserError(f"{name} lacks {', '.join(lacking)}", "give a folder made by save_pretrained, or a hub id")


def has_pickles(folder: str) -> bool:
    """Tell whether a folder holds weights as pickles.

    Args:
        folder: A model's.
    """
    return any(path.suffix in (".bin", ".pt", ".pth", ".ckpt") for path in Path(folder).iterdir())


def _task(spec: TaskSpec) -> Need:
    if spec.text is not None:
        return Need("task", _title(spec), "", 0, 0, Path(spec.text).stat().st_size)
    name = spec.name or ""
    sources = [own.title for own in data_sets(name) if own.path]
    if not sources:
        return Need("task", name, "", 0, 0, None)
    return Need("task", name, ", ".join(sources), 0, None, None)


def _title(spec: TaskSpec) -> str:
    return spec.name or Path(spec.text or "").name


def check_room(wanted: int) -> None:
    """Refuse a download that the disk of the hub's cache has no room for.

    Args:
        wanted: Its bytes.

    Raises:
        UserError: There is not as much.
    """
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE)
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if wanted > free:
        raise UserError(
            f"{wanted / 1e9:.1f} GB are to be downloaded, the disk of {constants.HF_HUB_CACHE} has {free / 1e9:.1f}",
            "free some, or set HF_HOME to a folder on a larger disk",
        )
