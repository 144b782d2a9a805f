"""What a study finds on this machine: its files or access to them, room for what is missing, memory, chat templates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dllm_sparsity.errors import UserError
from dllm_sparsity.study.architectures import is_hub_reached
from dllm_sparsity.study.config import ModelConfig, StudyConfig
from dllm_sparsity.study.fetch import check_room, model_need
from dllm_sparsity.study.models import choose_device, resolve
from dllm_sparsity.study.offline import TOKENIZER, missing_files

if TYPE_CHECKING:
    from dllm_sparsity.study.check import ModelCheck


@dataclass(frozen=True)
class Here:
    """What was found.

    Args:
        problems: What has to be put right, one line each.
        notes: What is worth knowing.
        lacking: Bytes of each model that are still to be downloaded, None where that is not known.
        fine: Whether nothing is wrong with each model.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    lacking: tuple[int | None, ...]
    fine: tuple[bool, ...]


def look_here(config: StudyConfig, models: Sequence[ModelCheck]) -> Here:
    """Look at what this machine has for a study; of a model that is not on it, the hub is asked, no weight is loaded.

    Args:
        config: The study.
        models: What is known of its models, in its order.
    """
    problems: list[str] = []
    notes: list[str] = []
    lacking: list[int | None] = []
    fine: list[bool] = []
    for model, known in zip(config.models, models, strict=True):
        said, size = _look(config, model, known, notes)
        problems += said
        lacking.append(size)
        fine.append(not said)
    once = {(own.model, own.revision): size or 0 for own, size in zip(config.models, lacking, strict=True)}
    try:
        check_room(sum(once.values()))
    except UserError as error:
        problems.append(f"{error.message}; {error.hint}")
    away = [own for own, size in zip(models, lacking, strict=True) if size is None]
    unsure = [own.name for own in away if own.source in ("hub", "shipped description")]
    if unsure and not is_hub_reached():
        notes.append(f"the hub was not reached: whether it gives {', '.join(unsure)} to you is not known")
    return Here(tuple(problems), tuple(notes), tuple(lacking), tuple(fine))


def local_tokenizer(model: ModelConfig) -> Any:
    """Return the tokenizer of a model where its files are on this machine, else None.

    Args:
        model: The model.

    Raises:
        UserError: Its files cannot be read.
    """
    if TOKENIZER in missing_files(model):
        return None
    from transformers import AutoTokenizer

    keys: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        return AutoTokenizer.from_pretrained(resolve(model.model), local_files_only=True, **keys)
    except (OSError, ValueError, LookupError, ImportError, AttributeError, TypeError) as error:
        why = " ".join(str(error).split())[:160]
        raise UserError(f"its tokenizer cannot be loaded: {why}", "look at its files, or fetch them again") from error


def _look(config: StudyConfig, model: ModelConfig, known: ModelCheck, notes: list[str]) -> tuple[list[str], int | None]:
    """Return what is wrong with a model here, and the bytes of it that are still to be downloaded."""
    if known.source is None:  # that it cannot be had is said already
        return [], None
    problems, size = [], None
    try:
        size = _lacking(model, notes)
    except UserError as error:
        problems.append(f"{model.name}: {error.message}; {error.hint}")
    problems += _chat(config, model, notes)
    if line := _too_large(config, model, known):
        notes.append(line)
    return problems, size


def _lacking(model: ModelConfig, notes: list[str]) -> int | None:
    """Return the bytes that are still to be downloaded, None where the hub does not tell, or it is a folder that lacks.

    Raises:
        UserError: It does not give the model.
    """
    files = missing_files(model)
    if not files:
        return 0
    if Path(resolve(model.model)).expanduser().is_dir():
        notes.append(f"{model.name}: its folder lacks {', '.join(files)}")
        return None
    return model_need(model).missing if is_hub_reached() else None


def _chat(config: StudyConfig, model: ModelConfig, notes: list[str]) -> Iterator[str]:
    """Give what keeps a model from rendering conversations where a task asks for that."""
    if not any(spec.chat_template for spec in config.tasks):
        return
    try:
        tokenizer = local_tokenizer(model)
    except UserError as error:
        yield f"{model.name}: {error.message}; {error.hint}"
        return
    if tokenizer is None:
        notes.append(f"{model.name}: its chat template was not looked up: no tokenizer is at hand")
    elif not tokenizer.chat_template:
        yield f"{model.name}: its tokenizer has no chat template; turn chat_template off"


def _too_large(config: StudyConfig, model: ModelConfig, known: ModelCheck) -> str | None:
    """Return a line where the weights alone do not fit into the memory here; a cluster's may be larger."""
    if model.device_map is not None:
        return None
    device = choose_device(config.device)
    if device.startswith("cuda"):
        if not torch.cuda.is_available():  # said where the study runs
            return None
        memory = torch.cuda.get_device_properties(torch.device(device)).total_memory
    else:
        import psutil

        memory = psutil.virtual_memory().total
    weights = known.gigabytes[model.dtype]
    if weights * 1e9 <= memory:
        return None
    return (
        f"{model.name}: its weights take {weights:.1f} GB, the memory of {device} here is {memory / 1e9:.1f}; "
        f"device_map: auto spreads them over several GPUs"
    )
