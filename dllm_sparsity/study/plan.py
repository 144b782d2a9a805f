"""From a study to its cells: what is run, in which order, and the fingerprint of each. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dllm_sparsity.study.config import ModelConfig, RuleConfig, StudyConfig, TaskSpec
from dllm_sparsity.study.records import PRIMITIVE_SITES
from dllm_sparsity.study.tasks import LoadedTask

_ALL = ("input", "intermediate")


@dataclass(frozen=True)
class Cell:
    """One model on one task, dense or under one rule at one strength and site.

    Args:
        model: The model and how it is run.
        task: The task as the user gave it; one name may stand for several tasks.
        rule: None when dense.
        strength: The rule's main parameter.
        site: As asked for; None when dense.
        sites: Primitive sites that are recorded.
        block: Start and stop of the items that a search asked for, in its order; None for all items.
        replicate: Number of a further dense run, whose requests are batched in another order; 0 for the first run.
        probe: Whether it only helps to plan others, so that no curve is made of it.
        average: Whether it is a task's part of a search on the average over tasks, of whose items a block is.
    """

    model: ModelConfig
    task: TaskSpec
    rule: RuleConfig | None
    strength: float | None
    site: str | None
    sites: tuple[str, ...]
    block: tuple[int, int] | None = None
    replicate: int = 0
    probe: bool = False
    average: bool = False

    @property
    def title(self) -> str:
        """What progress shows."""
        where = "dense" if self.rule is None else f"{self.rule.name} {self.strength:g} {self.site}"
        where += f", run {self.replicate + 1}" if self.replicate else ""
        items = "" if self.block is None else f" | items {self.block[0]} to {self.block[1]}"
        alone = f" | layers {list(self.rule.layers)} alone" if self.probe and self.rule and self.rule.layers else ""
        items += " for the average" if self.average else ""
        return f"{self.model.name} | {self.task.name or self.task.text} | {where}{alone}{items}"


Loaded = tuple[TaskSpec, LoadedTask]
"""A task as the user gave it, and loaded; one name may stand for several."""
Asks = Generator[tuple[Cell, LoadedTask], Path, None]
"""A search: it yields the cell it wants next, and its task, and is sent the folder that the cell is sealed in."""


def expand(config: StudyConfig) -> list[Cell]:
    """Return the cells of a study: for each model and task dense runs, then each rule, site and strength, once.

    Args:
        config: The study.
    """
    asked = {site for rule in config.rules for choice in rule.sites for site in _primitive(choice)}
    recorded = tuple(site for site in PRIMITIVE_SITES if site in asked)
    cells = []
    for model in config.models:
        for task in config.tasks:
            if config.replicates or any(rule.strengths for rule in config.rules):
                dense = Cell(model, task, None, None, None, recorded)
                cells += [replace(dense, replicate=number) for number in range(config.replicates + 1)]
            sparse = {
                (rule.identity, site, s): Cell(model, task, rule, s, site, _primitive(site))
                for rule in config.rules
                for site in rule.sites
                for s in rule.strengths
            }
            cells += sparse.values()
    return cells


def block_cell(
    config: StudyConfig, model: ModelConfig, task: TaskSpec, curve: tuple[RuleConfig, str], at: float | None
) -> Cell:
    """Return the cell of a curve at a strength, dense at None; `with_block` says on which items.

    Args:
        config: The study.
        model: One of its models.
        task: One of its tasks.
        curve: Rule and site.
        at: The strength.
    """
    rule, site = curve
    if at is None:
        asked = {own for each in config.rules for choice in each.sites for own in _primitive(choice)}
        return Cell(model, task, None, None, None, tuple(own for own in PRIMITIVE_SITES if own in asked))
    return Cell(model, task, rule, at, site, _primitive(site))


def with_block(cell: Cell, start: int, stop: int) -> Cell:
    """Return a cell that is run on a block of items only.

    Args:
        cell: The cell.
        start: First item, in the order of `item_order`.
        stop: One behind the last.
    """
    return replace(cell, block=(start, stop))


def probe_cell(cell: Cell, layers: tuple[int, ...] | None = None) -> Cell:
    """Return a cell that only helps to plan others, its rule on some layers alone.

    Args:
        cell: The cell.
        layers: The layers; None leaves the rule as it is.
    """
    rule = cell.rule if cell.rule is None or layers is None else cell.rule.model_copy(update={"layers": layers})
    return replace(cell, rule=rule, probe=True)


def item_order(items: int, seed: int) -> list[int]:
    """Return the order in which a search takes the items of a task: at random, so that the first are like the others.

    Args:
        items: How many there are.
        seed: The study's seed.
    """
    return np.random.default_rng(seed).permutation(items).tolist()


def _primitive(site: str) -> tuple[str, ...]:
    return _ALL if site == "all" else (site,)


def stacks(cell: Cell) -> bool:
    """Return whether other strengths may share a cell's forward passes: those of a grid, for a search asks one by one.

    Args:
        cell: The cell.
    """
    return cell.rule is not None and cell.block is None and not cell.probe


def stack_sizes(cells: Sequence[Cell]) -> list[int]:
    """Return how many cells share the forward passes of each stack, as their models' `stack` says.

    Args:
        cells: The cells.
    """
    curves: dict[Hashable, list[Cell]] = {}
    for number, cell in enumerate(cells):
        rule = cell.rule and cell.rule.model_copy(update={"strengths": ()})
        curve = repr((cell.model, cell.task, rule, cell.site)) if stacks(cell) else number
        curves.setdefault(curve, []).append(cell)
    each = ((len(own), own[0].model.stack) for own in curves.values())
    return [min(size, count - start) for count, size in each for start in range(0, count, size)]


def fingerprint(parts: dict[str, Any]) -> str:
    """Return 16 hexadecimal digits that change with anything in the parts.

    Args:
        parts: Plain data; the order of keys does not matter.
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cell_parts(
    cell: Cell,
    seed: int,
    weights: dict[str, str],
    task: dict[str, Any],
    versions: dict[str, str],
    packages: dict[str, str] | None = None,
) -> dict:
    """Return all that can change the answer of a cell.

    Args:
        cell: The cell.
        seed: The study's seed.
        weights: What identifies the model's files.
        task: What identifies the task: name, version, documents, prompts.
        versions: Of the packages that compute.
        packages: Versions of further packages that compute for this model alone.
    """
    model = cell.model.model_dump(mode="json", exclude={"label", "model", "share_context", "stack"})
    if cell.task.mc is not None:
        model["mc"] = cell.task.mc
    if cell.model.paradigm == "autoregressive":
        only = ("paradigm", "revision", "trust_remote_code", "dtype", "device_map", "batch_size", "max_length")
        model = {name: model[name] for name in only}
        if not cell.model.share_context:
            model["share_context"] = False
    if model.get("device_map") is None:
        model.pop("device_map", None)  # of no account where it is not given
    if packages:
        model["packages"] = packages
    rule = None
    if cell.rule is not None:
        rule = {
            "name": cell.rule.name,
            "strength": cell.strength,
            "site": cell.site,
            "layers": list(cell.rule.layers) if cell.rule.layers is not None else None,
            "parameters": cell.rule.parameters,
        }
    only_some: dict[str, Any] = {} if cell.block is None else {"block": list(cell.block)}
    if cell.model.stack > 1 and stacks(cell):
        only_some["stack"] = cell.model.stack
    if cell.replicate:
        only_some["replicate"] = cell.replicate
    return {
        **only_some,
        **({"probe": True} if cell.probe else {}),
        **({"average": True} if cell.average else {}),
        "model": model,
        "name": cell.model.name,  # changes no answer, but a sealed cell carries it
        "weights": weights,
        "task": task,
        "limit": cell.task.limit,
        "num_fewshot": cell.task.num_fewshot,
        "chat_template": cell.task.chat_template,
        "rule": rule,
        "sites": list(cell.sites),
        "seed": seed,
        "versions": versions,
    }
