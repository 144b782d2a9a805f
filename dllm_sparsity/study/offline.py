"""Without a network: turn it off for the libraries, and name what a study needs and this machine lacks."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from dllm_sparsity.errors import UserError
from dllm_sparsity.lm.hub import FETCH_FIRST
from dllm_sparsity.study.cached import code_elsewhere, find_file, missing_code
from dllm_sparsity.study.config import ModelConfig, StudyConfig, TaskSpec
from dllm_sparsity.study.models import resolve

SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")
INDEX = "model.safetensors.index.json"
TOKENIZER = "its tokenizer"


def go_offline() -> None:
    """Turn the network off for the libraries of the hub, those that are imported already included."""
    for name in SWITCHES:
        os.environ[name] = "1"
    for module, name in (
        ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
        ("datasets.config", "HF_HUB_OFFLINE"),
        ("datasets.config", "HF_DATASETS_OFFLINE"),
        ("evaluate.config", "HF_EVALUATE_OFFLINE"),
    ):
        if module in sys.modules:
            setattr(sys.modules[module], name, True)


@contextlib.contextmanager
def without_network() -> Iterator[None]:
    """Keep the libraries of the hub from the network inside the block."""
    import datasets.config
    import huggingface_hub.constants as hub

    before = hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def is_offline() -> bool:
    """Tell whether the network was turned off for all of the libraries, by `go_offline` or by hand."""
    return all(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in SWITCHES)


def check_offline(config: StudyConfig, is_file: bool = True) -> None:
    """Refuse a study that needs what is not on this machine: models, tokenizers, and the data of its tasks.

    Args:
        config: The study.
        is_file: Whether it was given as a file, which `fetch` takes.

    Raises:
        UserError: Something is missing; all of it is named.
    """
    if lacking := missing(config):
        gone = [model for model in config.models if missing_files(model)]
        each = [f"hf download {own.model}{f' --revision {own.revision}' if own.revision else ''}" for own in gone]
        each += [f"hf download {repo}" for own in gone for repo in code_elsewhere(own)]
        hint = FETCH_FIRST if is_file or not gone else f"with a network, first: {' && '.join(dict.fromkeys(each))}"
        raise UserError(f"offline: {'; '.join(lacking)}", hint)


def missing(config: StudyConfig) -> list[str]:
    """Return what a study needs and this machine lacks, in words.

    Args:
        config: The study.

    Raises:
        UserError: A task does not exist.
    """
    from dllm_sparsity.study.tasks import load_tasks

    found = [no_files(model, files) for model in config.models if (files := missing_files(model))]
    for spec in config.tasks:
        try:
            load_tasks(spec, config.seed)
        except UserError as error:
            if "cannot be loaded" not in error.message:
                raise
            found.append(no_data(str(spec.name)))
    return found


def no_data(task: str) -> str:
    """Return the words for data that is not here.

    Args:
        task: Name of a task, or of several.
    """
    return f"the data of task {task} is not on this machine"


def why_not_loaded(spec: TaskSpec, error: UserError) -> UserError:
    """Return why a task cannot be loaded; without a network it is its data that is missing.

    Args:
        spec: The task.
        error: What was raised.
    """
    is_data = is_offline() and "cannot be loaded" in error.message
    return UserError(no_data(str(spec.name)), FETCH_FIRST) if is_data else error


def no_files(model: ModelConfig, files: list[str]) -> str:
    """Return the words for files of a model that are not here.

    Args:
        model: The model.
        files: What it lacks.
    """
    return f"{model.model} is not on this machine: {', '.join(files)}"


def missing_files(model: ModelConfig) -> list[str]:
    """Return which files a model needs and this machine lacks; nothing is looked up on a network.

    Args:
        model: The model.
    """
    name = resolve(model.model)
    lacking = [] if find_file(name, "config.json", model.revision) else ["config.json"]
    index = find_file(name, INDEX, model.revision)
    if index is not None:
        lacking += [shard for shard in shards(index) if not find_file(name, shard, model.revision)]
    elif not find_file(name, "model.safetensors", model.revision):
        folder = Path(name).expanduser()
        if not (folder.is_dir() and any(folder.glob("*.safetensors"))):
            lacking.append("model.safetensors")
    if not any(find_file(name, file, model.revision) for file in _TOKENIZERS):
        lacking.append(TOKENIZER)
    return lacking + (missing_code(name, model.revision) if model.trust_remote_code else [])


def shards(index: Path) -> list[str]:
    """Return the files of weights that an index names.

    Args:
        index: The index file.
    """
    import json

    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"cannot read {index}: {error}", "delete it, and fetch the model again") from error
