"""Check that a search can end with an answer: its quality is one of the task's, its budget is enough to begin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dllm_sparsity.errors import UserError, did_you_mean
from dllm_sparsity.study import expected
from dllm_sparsity.study.config import SearchConfig, StudyConfig, TaskSpec
from dllm_sparsity.study.offline import without_network
from dllm_sparsity.study.tasks import LoadedTask, find_task, load_tasks

_MOST_FIRST = expected.FIRST_ITEMS + expected.LEAST_BLOCK - 1  # items that the first block of a search has at most
_KINDS = ("accuracy", "score", "loglikelihood")


def search_ahead(config: StudyConfig, notes: list[str]) -> list[str]:
    """Return which tasks lack the quality that is searched on, as far as lm-eval's index tells, or allow no beginning.

    Args:
        config: The study.
        notes: Added to: where that could not be found out.
    """
    search = config.search
    if search is None:
        return []
    problems = []
    if search.budget is not None and search.budget < 2 * _MOST_FIRST:  # else it is enough for any task
        for spec in config.tasks:
            problems += _budget_ahead(search, spec, config.seed, notes)
    for spec in config.tasks if search.quality is not None else ():
        settings: dict[str, Any] = (
            {"output_type": "loglikelihood_rolling"} if spec.name is None else _settings(spec.name)
        )
        metrics = [own.get("metric") for own in settings.get("metric_list") or ()]
        kind = settings.get("output_type")
        if kind == "loglikelihood_rolling" or (kind and metrics and all(isinstance(own, str) for own in metrics)):
            try:
                _check_quality(search, spec.name or str(spec.text), kind, [str(own) for own in metrics])
            except UserError as error:
                problems.append(f"{error.message}; {error.hint}")
    return problems


def check_search(search: SearchConfig | None, tasks: Iterable[LoadedTask]) -> None:
    """Refuse a search that cannot end with an answer.

    Args:
        search: What is asked.
        tasks: The tasks of a study, loaded.

    Raises:
        UserError: A task has no such quality, or more items in its first block than the budget allows.
    """
    if search is None:
        return
    for task in tasks:
        better = task.task.higher_is_better()
        _check_quality(search, task.name, task.output_type, [own for own in better if better[own]])
        _check_budget(search, task)


def _check_budget(search: SearchConfig, task: LoadedTask) -> None:
    first = expected.blocks(task.items)[0]
    if search.budget is not None and search.budget < 2 * first:
        raise UserError(
            f"search.budget is {search.budget:,}, and the smallest search on {task.name} takes {2 * first:,}"
            f" item-evaluations: its first {first} items, dense and at one strength",
            f"raise it to {round(expected.FIRST_PASSES * first):,} or more, or leave it out",
        )


def _budget_ahead(search: SearchConfig, spec: TaskSpec, seed: int, notes: list[str]) -> Iterator[str]:
    """Give why a search cannot begin on a task, whose items are counted where its data is on this machine."""
    try:
        with without_network():
            loaded = load_tasks(spec, seed)
    except UserError:  # what else is wrong with it is said elsewhere
        notes.append(f"whether search.budget is enough for task {spec.name or spec.text} was not looked at: no data")
        return
    for task in loaded:
        try:
            _check_budget(search, task)
        except UserError as error:
            yield f"{error.message}; {error.hint}"


def _settings(name: str) -> dict[str, Any]:
    try:
        return getattr(find_task(name).task_index.get(name), "cfg", None) or {}
    except UserError:
        return {}  # said where tasks are checked


def _check_quality(search: SearchConfig, task: str, output_type: str, metrics: Sequence[str]) -> None:
    """Refuse a quality that no cell of a task will have; which kinds its metrics are, only a run tells."""
    own = "agreement" if output_type == "generate_until" else "nll"
    known = [own] if output_type == "loglikelihood_rolling" else [*metrics, own]
    kinds = () if output_type == "loglikelihood_rolling" else _KINDS
    if search.quality is not None and search.quality not in (*known, *kinds):
        raise UserError(
            f"task {task} has no quality {search.quality!r} to search on{did_you_mean(search.quality, known)}",
            f"it has: {', '.join(known)}",
        )
