"""The loop behind an allocation by layer: the uniform search, each layer alone, then a search along the path found."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dllm_sparsity.analysis.allocated import (
    Answer,
    Searched,
    compared,
    counts_by_layer,
    nearest_strength,
    overlap_words,
    sensitivity,
    smooth_quality,
    strength_at,
)
from dllm_sparsity.analysis.allocation import allocate, path_of, strengths_at, targets
from dllm_sparsity.analysis.searched import SearchedCurve, open_cell
from dllm_sparsity.analysis.slopes import Sensitivity, slopes_of
from dllm_sparsity.study.config import FEWEST_LAYERWISE_ITEMS, ModelConfig, RuleConfig, StudyConfig, TaskSpec
from dllm_sparsity.study.models import make_rule
from dllm_sparsity.study.plan import Cell, block_cell, probe_cell, with_block

NAME = "layerwise"
MOST_GROUPS = 12
LADDER = (0.0, 0.05, 0.15, 0.3, 0.5, 0.75, 0.875, 0.9375, 1.0)
"""Rungs of the search along the path. Its steps are even in what is dropped, so what is kept halves near the end: with
no rung between a quarter kept and nothing, a crossing there would be guessed over a gap."""
Loop = Generator[Cell, Path, Searched]


@dataclass(frozen=True)
class Place:
    """Where a search is made.

    Args:
        study: The study; it has a search.
        model: One of its models.
        task: One of its tasks.
        items: Items of the task.
        rule: The rule that acts in every layer.
        site: The site.
    """

    study: StudyConfig
    model: ModelConfig
    task: TaskSpec
    items: int
    rule: RuleConfig
    site: str


def allocated(place: Place, search: Callable[..., Loop]) -> Generator[Cell, Path, list[Answer]]:
    """Search with one strength for all layers, allocate strengths to layers, and search along the allocation.

    Args:
        place: Where.
        search: Makes the search of a rule and a site, up a ladder of one's own if that is given.

    Returns:
        The answers of both searches; those of the first hold what the second came to beside it.
    """
    uniform = _Watched(search(place.rule, place.site))
    plain = yield from uniform.run()
    if place.rule.name == NAME:
        return plain.answers
    if not plain.crossings:
        return _without(plain.answers, "the uniform search has no answer to start from")
    counts = {at: counts_by_layer(uniform.cells(at), _sites(place)) for at in (None, *plain.search.columns)}
    layers = sorted(counts[next(iter(plain.search.columns))])
    groups = [tuple(map(int, own)) for own in np.array_split(layers, min(MOST_GROUPS, len(layers)))]
    if len(groups) < 2:
        return _without(plain.answers, "there is one layer only")
    measured = [(0.0, plain.search.ladder[0]), *((own.sparsity, at) for at, own in plain.search.columns.items())]
    if plain.search.ladder[-1] not in plain.search.columns:
        measured.append((1.0, plain.search.ladder[-1]))
    strengths = strengths_at(targets(plain.crossings), measured)
    cells = len(groups) * len(strengths) + 1
    probed = _probed_items(place, cells)
    if probed < FEWEST_LAYERWISE_ITEMS:
        return _without(plain.answers, _too_few(place, probed, cells))
    probes = yield from _probe(place, plain.curve, (groups, strengths, probed), counts)
    rule = _rule(place, probes.found, plain.search.ladder)
    path = _Watched(search(rule, place.site, LADDER))
    along = yield from path.run()
    for index, answer in enumerate(plain.answers):
        difference = compared(plain, along, index)
        gained = difference["interval"] is not None and difference["interval"][0] > 0
        shared, words = overlap_words(probed, place.items, along.answers[index]["items"], gained)
        answer["allocation"] = {
            **{name: along.answers[index][name] for name in ("value", "interval", "censored", "reason", "items")},
            "difference": difference,
            "rule": {"name": NAME, "parameters": rule.parameters},
            "strength": strength_at(along.search, along.answers[index]["value"]),
            "by_layer": _by_layer(place, (uniform, path), (plain, along), index),
            "sensitivities": [vars(own) for own in probes.found],
            "sensitivity_quality": probes.quality,
            "sensitivity_why": probes.why,
            "sensitivity_items": probed,
            "shared_items": shared,
            "sharing": words,
            "evaluations": {"layers_alone": probes.evaluations, "search": along.search.spent},
        }
    return [*plain.answers, *along.answers]


class _Watched:
    """A search whose sealed folders are remembered."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.folders: dict[float | None, list[Path]] = {}

    def run(self) -> Loop:
        try:
            cell = next(self.loop)
            while True:
                folder = yield cell
                self.folders.setdefault(cell.strength, []).append(folder)
                cell = self.loop.send(folder)
        except StopIteration as end:
            return end.value

    def cells(self, strength: float | None) -> list[Any]:
        return [open_cell(folder) for folder in dict.fromkeys(self.folders[strength])]


@dataclass(frozen=True)
class _Probes:
    """What single layers lost, on which quality, and what it took."""

    found: list[Sensitivity]
    quality: str
    why: str
    evaluations: int


def _probe(
    place: Place,
    searched: SearchedCurve,
    plan: tuple[list[tuple[int, ...]], list[float], int],
    counts: dict[float | None, dict[int, tuple[int, int]]],
) -> Generator[Cell, Path, _Probes]:
    """Measure each group of layers alone, on the last items of the search's order."""
    groups, strengths, items = plan
    block = (place.items - items, place.items)

    def cell(strength: float | None, layers: tuple[int, ...] | None = None) -> Cell:
        whole = block_cell(place.study, place.model, place.task, (place.rule, place.site), strength)
        return probe_cell(with_block(whole, *block), layers)

    dense = open_cell((yield cell(None)))
    quality, why = smooth_quality(dense, searched)
    curve = SearchedCurve(dense, quality, place.site)
    base = curve.column(dense, block)
    found = []
    for layers in groups:
        columns = {}
        for strength in strengths:
            columns[strength] = curve.column(open_cell((yield cell(strength, layers))), block)
        found.append(sensitivity(layers, base, columns, counts))
    return _Probes(found, quality, why, items * (len(groups) * len(strengths) + 1))


def _rule(place: Place, found: list[Sensitivity], ladder: tuple[float, ...]) -> RuleConfig:
    """Return the rule that goes along the allocation."""
    possible = sum(own.total * (1 - own.natural) for own in found)
    path = path_of(allocate(slopes_of(found, ladder[0])), possible, ladder[-1])
    parameters: dict[str, Any] = {"base": place.rule.name, "path": path, "groups": [list(own.layers) for own in found]}
    if place.rule.parameters:
        parameters["parameters"] = place.rule.parameters
    return RuleConfig(name=NAME, sites=(place.site,), layers=place.rule.layers, parameters=parameters)


def _probed_items(place: Place, cells: int) -> int:
    """Return on how many items each layer is measured: as asked, as there are, and as the budget allows once more."""
    asked = place.study.search
    if asked is None:
        return 0
    most = min(asked.layerwise_items, place.items)
    return most if asked.budget is None else min(most, asked.budget // cells)


def _too_few(place: Place, probed: int, cells: int) -> str:
    if place.items < FEWEST_LAYERWISE_ITEMS:
        return f"each layer is measured on {FEWEST_LAYERWISE_ITEMS} items or more, and the task has {place.items}"
    return (
        f"the budget leaves {probed} items for each layer, and {FEWEST_LAYERWISE_ITEMS} are the fewest: raise it to"
        f" {FEWEST_LAYERWISE_ITEMS * cells:,}"
    )


def _by_layer(
    place: Place, watched: tuple[_Watched, _Watched], searched: tuple[Searched, Searched], index: int
) -> dict[str, Any] | None:
    """Return sparsity and strength by layer, of both, as measured at the strengths nearest their crossings."""
    told: dict[str, Any] = {}
    for name, folders, own in zip(("uniform", "allocated"), watched, searched, strict=True):
        at = nearest_strength(own.search, own.search.goals[index])
        if at is None:
            return None
        counts = counts_by_layer(folders.cells(at), _sites(place))
        rule = make_rule(own.curve.setting["rule"], at, own.curve.setting["rule_parameters"])
        told[name] = {
            "strength": at,
            "sparsity": own.search.columns[at].sparsity,
            "layers": {str(layer): 1 - kept / total for layer, (kept, total) in counts.items()},
            "strengths": {str(layer): rule.at(layer).strength for layer in counts},
        }
    return told


def _sites(place: Place) -> tuple[str, ...]:
    return block_cell(place.study, place.model, place.task, (place.rule, place.site), 0.0).sites


def _without(answers: list[Answer], reason: str) -> list[Answer]:
    for answer in answers:
        answer["allocation"] = {"value": None, "interval": None, "reason": reason}
    return answers
