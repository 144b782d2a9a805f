"""Check the tasks of a study by lm-eval's index, which holds their settings, and look whether their data is here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dllm_sparsity.errors import UserError
from dllm_sparsity.lm.hub import FETCH, why_no_hub
from dllm_sparsity.lm.items import MAX_NEW_TOKENS
from dllm_sparsity.study.config import ModelConfig, StudyConfig, TaskSpec
from dllm_sparsity.study.data_sets import data_sets
from dllm_sparsity.study.offline import is_offline, no_data, why_not_loaded
from dllm_sparsity.study.tasks import RUN_CODE, find_task, load_tasks


def check_tasks(tasks: Iterable[TaskSpec]) -> tuple[list[str], dict[str, int], list[str]]:
    """Return what is wrong with the tasks, how many tokens generation tasks ask for, and which score likelihoods.

    Args:
        tasks: The tasks of a study; those given as a file or a text are only looked for.
    """
    problems: list[str] = []
    lengths: dict[str, int] = {}
    scored: list[str] = []
    for task in tasks:
        if task.name is None:
            scored.append(str(task.text))
            continue
        try:
            index = find_task(task.name).task_index
        except UserError as error:
            problems.append(f"tasks: {error.message}; {error.hint}")
            continue
        if not task.run_code and _runs_code(index, task.name):
            problems.append(f"task {task.name} runs code that the model wrote; {RUN_CODE}")
        settings = getattr(index.get(task.name), "cfg", None) or {}
        if settings.get("output_type") == "generate_until":
            asked = (settings.get("generation_kwargs") or {}).get("max_gen_toks")
            lengths[task.name] = MAX_NEW_TOKENS if asked is None else int(asked)
        elif "output_type" in settings:
            scored.append(task.name)
    return problems, lengths, scored


def _runs_code(index: Any, name: str) -> bool:
    """Tell whether a task, or one of those that a group or tag stands for, runs what the model wrote."""
    entry = index.get(name)
    if entry is None:
        return False
    settings = entry.cfg or {}
    below = settings.get("task") if "group" in settings else sorted(entry.tags) if entry.cfg is None else ()
    names = [each for each in below or () if isinstance(each, str) and each != name]
    return bool(settings.get("unsafe_code")) or any(_runs_code(index, each) for each in names)


def check_data(config: StudyConfig, problems: list[str], notes: list[str]) -> None:
    """Look whether the data of the tasks is on this machine; offline it is read, for it has to be.

    Args:
        config: The study.
        problems: Added to: what has to be put right, one line each.
        notes: Added to: what is not known.
    """
    absent: list[str] = []
    for spec in config.tasks:
        try:
            sets = [] if spec.name is None else data_sets(spec.name)
            if is_offline():
                load_tasks(spec, config.seed)
            elif not all(own.is_here() for own in sets if own.path):
                absent.append(str(spec.name))
            elif any(not own.path for own in sets):
                notes.append(f"the data of task {spec.name} was not looked for: code of its own gets it")
        except UserError as error:
            why = why_not_loaded(spec, error)
            problems += [f"{why.message}; {why.hint}"] if is_offline() else []  # names are checked elsewhere
    if absent:
        why = why_no_hub() or "the hub was not asked for it"
        notes.append(f"{no_data(', '.join(absent))}, and {why}; to bring it: {FETCH}")


def check_lengths(model: ModelConfig, sampler: Any, lengths: dict[str, int]) -> list[str]:
    """Return which tasks' lengths do not divide into a diffusion model's blocks and steps.

    Args:
        model: The model and how it is run.
        sampler: Its sampler.
        lengths: Task -> new tokens.
    """
    from dllm_sparsity.diffusion.denoise import DenoiseSettings

    said = []
    for task, length in lengths.items():
        try:
            DenoiseSettings(length, steps=model.steps, block_length=model.block_length, sampler=sampler)
        except UserError as error:
            said.append(f"task {task}: {error.message}; {error.hint}")
    return said
