"""What a study finds on this machine: its files or access to them, room for what is missing, memory, chat templates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dllm_sparsity.errors import UserError, shorten
from dllm_sparsity.lm.hub import FETCH_FIRST, is_hub_there, no_safetensors, why_no_hub
from dllm_sparsity.lm.loading import find_device
from dllm_sparsity.study.config import ModelConfig, StudyConfig
from dllm_sparsity.study.fetch import check_room, distinct, has_pickles, key_of, model_need
from dllm_sparsity.study.models import choose_device, resolve
from dllm_sparsity.study.offline import TOKENIZER, is_offline, missing_files, no_files

if TYPE_CHECKING:
    from dllm_sparsity.study.check import ModelCheck


def look_here(
    config: StudyConfig, models: Sequence[ModelCheck], problems: list[str], notes: list[str]
) -> tuple[ModelCheck, ...]:
    """Look at what this machine has for a study; of a model that is not on it, the hub is asked, no weight is loaded.

    Args:
        config: The study.
        models: What is known of its models, in its order.
        problems: Added to: what has to be put right, one line each.
        notes: Added to: what is worth knowing.

    Returns:
        The models, with what is still to be downloaded of them.
    """
    sources = {key_of(own): known.source for own, known in zip(config.models, models, strict=True)}
    sizes = {key_of(own): _lacking(own, notes) for own in distinct(config.models) if sources[key_of(own)] is not None}
    found: list[ModelCheck] = []
    for model, known in zip(config.models, models, strict=True):
        said = [] if known.source is None else [*_chat(config, model, notes)]  # that it cannot be had is said already
        size = sizes.get(key_of(model))
        if isinstance(size, UserError):
            said, size = [f"{model.name}: {size.message}; {size.hint}", *said], None
        if line := _too_large(config, model, known):
            notes.append(line)
        problems += said
        found.append(replace(known, lacking=size, ok=known.ok and not said))
    try:
        check_room(sum(size for size in sizes.values() if isinstance(size, int)))
    except UserError as error:
        problems.append(f"{error.message}; {error.hint}")
    unsure = [own.name for own in found if own.ok and own.lacking is None and own.source != "folder"]
    if unsure and (why := why_no_hub()):
        notes.append(f"{why}: whether it gives {', '.join(unsure)} to you is not known")
    return tuple(found)


def local_tokenizer(model: ModelConfig) -> Any:
    """Return the tokenizer of a model where its files are on this machine, else None.

    Args:
        model: The model.

    Raises:
        UserError: The files in its folder cannot be read.
    """
    if TOKENIZER in missing_files(model):
        return None
    from transformers import AutoTokenizer

    name = resolve(model.model)
    keys: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, **keys)
    except (OSError, ValueError, LookupError, ImportError, AttributeError, TypeError) as error:
        if not Path(name).expanduser().is_dir():  # the cache may hold some of its files
            return None
        why = shorten(error)
        raise UserError(f"its tokenizer cannot be loaded: {why}", "look at the folder") from error


def _lacking(model: ModelConfig, notes: list[str]) -> int | UserError | None:
    """Return the bytes that are still to be downloaded, or why it cannot be had; None where that is not known."""
    try:
        files = missing_files(model)
        if not files:
            return 0
        if is_offline():
            return UserError(no_files(model, files), FETCH_FIRST)
        if Path(resolve(model.model)).is_dir():
            if "model.safetensors" in files and has_pickles(resolve(model.model)):
                return no_safetensors(resolve(model.model))
            notes.append(f"{model.name}: its folder lacks {', '.join(files)}")
            return None
        return model_need(model).missing if is_hub_there(resolve(model.model), model.revision) else None
    except UserError as error:
        return error


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
    try:
        device = find_device(choose_device(config.device))
    except UserError:  # another machine's; the study says so where it runs
        return None
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        advice = "device_map: auto spreads them over GPUs"
    else:
        import psutil

        memory, advice = psutil.virtual_memory().total, "use a smaller dtype or a larger machine"
    weights = known.gigabytes[model.dtype]
    if weights * 1e9 <= memory:
        return None
    sizes = f"its weights take {weights:.1f} GB, the memory of {device} here is {memory / 1e9:.1f} GB"
    return f"{model.name}: {sizes}; {advice}"
