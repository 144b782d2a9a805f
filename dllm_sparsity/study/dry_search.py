"""What a dry run says of searches: their cells, forward passes and disk, and why one could not end with an answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dllm_sparsity import registry
from dllm_sparsity.errors import UserError
from dllm_sparsity.study import expected, plan
from dllm_sparsity.study.check_search import check_search
from dllm_sparsity.study.config import ModelConfig, StudyConfig, TaskSpec
from dllm_sparsity.study.cost import Costs, disk_bytes
from dllm_sparsity.study.tasks import LoadedTask
from dllm_sparsity.study.workload import workload

if TYPE_CHECKING:
    from dllm_sparsity.study.dry_run import Part


def expect(
    part: Part,
    planner: Any,
    loaded: tuple[LoadedTask, TaskSpec],
    tasks: Sequence[LoadedTask],
    config: StudyConfig,
    price: Costs,
) -> None:
    """Add what searches are likely to run, in blocks: the last batch of a block is a forward pass, however small.

    Args:
        part: A model on a task; what its planned cells take is there.
        planner: The model's backend, which counts.
        loaded: The task, loaded and as the user gave it.
        tasks: All tasks of the study.
        config: The study; it has a search.
        price: What a token costs the model.
    """
    task, spec = loaded
    search, curves = config.search, sum(len(rule.sites) for rule in config.rules)
    if search is None:
        return
    first = config.rules[0]
    sites = plan.block_cell(config, config.models[0], spec, (first, first.sites[0]), None).sites
    blocks = expected.cells(task.items, expected.evaluations(search, task.items, curves, expected.alike(task, tasks)))
    for count, size in [*blocks, *expected.layer_cells(search, task.items, curves, price.layers)]:
        work, _ = workload(planner, task, spec.model_copy(update={"limit": size}))
        part.searched += round(count)
        part.forwards = (part.forwards or 0) + round(count * work.forwards)
        part.disk += round(count * disk_bytes(work, price.layers, len(sites)))
        part.runs += count * size / task.items


def like_a_search(config: StudyConfig, model: ModelConfig, spec: TaskSpec) -> list[plan.Cell]:
    """Return cells whose mean is about that of a search: one dense, and more of each rule, at a strength half way.

    Args:
        config: The study.
        model: One of its models.
        spec: One of its tasks.
    """
    cells = [plan.block_cell(config, model, spec, (config.rules[0], config.rules[0].sites[0]), None)]
    for rule in config.rules:
        kind = registry.get("rules", rule.name)
        end = kind.low if kind.denser_upwards else kind.high
        if rule.strengths or math.isfinite(end):
            half = rule.strengths[0] if rule.strengths else (kind.dense + end) / 2
            cells += [plan.block_cell(config, model, spec, (rule, rule.sites[0]), half)] * 4
    return cells


def unsearchable(config: StudyConfig, tasks: list[LoadedTask], problems: list[str]) -> list[str]:
    """Return what keeps searches from an answer and was not seen before the tasks were loaded.

    Args:
        config: The study.
        tasks: Its tasks, loaded.
        problems: What was seen before.
    """
    said = []
    for task in tasks:
        try:
            check_search(config.search, [task])
        except UserError as error:
            said += [] if any(error.message in own for own in problems) else [f"{error.message}; {error.hint}"]
    return said
