"""The average over tasks as a curve of its own, and its critical sparsity: every task counts the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dllm_sparsity.analysis.blocks import Answer, is_of
from dllm_sparsity.analysis.comparison import Comparison, comparisons
from dllm_sparsity.analysis.critical import DEFAULT_READING
from dllm_sparsity.analysis.curves import Curve, points_of, retentions_of
from dllm_sparsity.analysis.grouping import Group
from dllm_sparsity.analysis.loading import Cell
from dllm_sparsity.analysis.qualities import SCALES
from dllm_sparsity.analysis.readings import (
    OTHER_RETENTION,
    TOO_FEW_POINTS,
    Reading,
    no_reading,
    readings_of,
    rng_of,
    with_answers,
)
from dllm_sparsity.analysis.statistics import SEED, binomial_error
from dllm_sparsity.study.records import Quality

KINDS = ("accuracy", "nll", "loglikelihood", "agreement")
"""Scores are of many scales, and are not averaged."""
_FEWEST = 2


@dataclass(frozen=True)
class Average:
    """The averaged curve of several tasks.

    Args:
        curve: The curve; its task is `name`, and its cells are those of the first task.
        tasks: The tasks, sorted.
        dense: Dense quality and its interval.
        is_searched: Whether only a search measured it, so that it has no points.
    """

    curve: Curve
    tasks: tuple[str, ...]
    dense: dict[str, Any]
    is_searched: bool

    @property
    def told(self) -> dict[str, Any]:
        """Return what the summary holds of it."""
        curve = self.curve
        return {
            **{name: curve.group.dense.record[name] for name in ("paradigm", "model", "task")},
            "rule": curve.group.rule,
            "site": curve.group.site,
            "quality": curve.quality["name"],
            "kind": curve.quality["kind"],
            "tasks": self.tasks,
            "items": len(curve.keys),
            "higher_is_better": curve.scale.sign > 0,
            "dense": self.dense,
            "critical": [own.told for own in curve.readings],
            "points": [] if self.is_searched else list(_points(curve)),
        }


def name_of(tasks: int, kind: str | None = None) -> str:
    """Return what an average is called in the place of a task.

    Args:
        tasks: How many tasks it is of.
        kind: Kind of its quality, where a study has averages of several kinds.
    """
    return f"average of {tasks} tasks" + (f", {kind}" if kind else "")


def quality_of(qualities: Sequence[Quality]) -> str:
    """Return what the quality of an average is called: the name that all tasks have for it, else their kind.

    Args:
        qualities: Those of the tasks, of one kind.
    """
    names = {own["name"] for own in qualities}
    return names.pop() if len(names) == 1 else qualities[0]["kind"]


def averages(curves: Sequence[Curve], search: Any, seed: int = SEED) -> tuple[list[Average], list[str]]:
    """Return the averaged curve of each model, rule, site and kind of quality that has several tasks.

    Of each task its headline quality counts, and what a search of an average was on beside it; quality and achieved
    sparsity are averaged at each strength that all tasks have. Tasks are independent of each other, so each task's
    draws are put in an order of their own.

    Args:
        curves: Curves of one run.
        search: What search.json holds, or None: an answer on the average stands for the interpolated reading.
        seed: Seed of the resampling.

    Returns:
        The averages, and notes on those that could not be made.

    Source: Szatkowski et al. 2025, arXiv:2509.00454, section 3: critical sparsity is read off the average accuracy over
        tasks against their average sparsity. Differs: intervals; four readings; averages of likelihoods as well.
    """
    chosen, notes = [], []
    for own, answers in _members(curves, search):
        is_searched = any(curve.group.is_searched for curve in own)
        strengths = [] if is_searched else _shared(own)
        if not is_searched and len(strengths) < _FEWEST:
            notes.append(_too_few(own, len(strengths)))
        elif answers or not is_searched:
            chosen.append((own, strengths, answers))
    names = _names([own for own, *_ in chosen])
    found = [
        _average(own, name, strengths, answers, seed)
        for name, (own, strengths, answers) in zip(names, chosen, strict=True)
    ]
    return found, list(dict.fromkeys(notes))


def average_comparisons(found: Sequence[Average], retentions: Sequence[float]) -> list[Comparison]:
    """Return the pairs of averages of both paradigms that are of the same tasks.

    Args:
        found: The averages of one run.
        retentions: Shares of the dense quality.
    """
    return [
        pair
        for tasks in dict.fromkeys(own.tasks for own in found)
        for pair in comparisons([own.curve for own in found if own.tasks == tasks], retentions)
    ]


def asked_of_averages(search: Any) -> set[float]:
    """Return the retentions that a search of an average was asked for.

    Args:
        search: What search.json holds, or None.
    """
    return {own["retention"] for own in _told(search)}


def _told(search: Any) -> list[Answer]:
    return search.get("averages", []) if isinstance(search, dict) else []


def _members(curves: Sequence[Curve], search: Any) -> list[tuple[list[Curve], list[Answer]]]:
    """Return the curves of each average, by task, and what a search answered on it."""
    grouped: dict[tuple[str, ...], list[Curve]] = {}
    for curve in curves:
        if curve.quality["kind"] in KINDS and curve.quality["name"] == curve.group.headline:
            grouped.setdefault((curve.quality["kind"], *_setting(curve)), []).append(curve)
    headlines = [sorted(own, key=_task) for own in grouped.values() if len(own) > 1]
    found: dict[str, tuple[list[Curve], list[Answer]]] = {_identity(own): (own, []) for own in headlines}
    for answer in _told(search):
        own = [curve for task in sorted(answer["tasks"]) for curve in _answered(answer, task, curves)]
        if len(own) == len(answer["tasks"]):
            found.setdefault(_identity(own), (own, []))[1].append(answer)
    return sorted(found.values(), key=lambda both: KINDS.index(both[0][0].quality["kind"]))


def _answered(answer: Answer, task: str, curves: Sequence[Curve]) -> list[Curve]:
    """Return the curve of a task that an answer on an average is of; none where it is not there."""
    of_kind = [curve for curve in curves if curve.quality["kind"] == answer["kind"]]
    own = [curve for curve in of_kind if is_of({**answer, "task": task}, curve.group.cells[0].record)]
    return ([curve for curve in own if curve.quality["name"] == answer["quality"]] or own)[:1]


def _names(members: Sequence[Sequence[Curve]]) -> list[str]:
    """Return what averages are called: with their kind, tasks or quality where they would share a name without it."""
    kinds = {own[0].quality["kind"] for own in members}
    plain = [name_of(len(own), own[0].quality["kind"] if len(kinds) > 1 else None) for own in members]
    about = [(", ".join(map(_task, own)), _quality(own)["name"]) for own in members]
    names = []
    for name, (tasks, quality) in zip(plain, about, strict=True):
        alike = {each for other, each in zip(plain, about, strict=True) if other == name}
        more = f" ({tasks})" if len({each for each, _ in alike}) > 1 else ""
        names.append(name + more + (f", {quality}" if sum(each == tasks for each, _ in alike) > 1 else ""))
    return names


def _setting(curve: Curve) -> tuple[str, ...]:
    record = curve.group.dense.record
    return record["paradigm"], record["model"], curve.group.rule, curve.group.site


def _identity(curves: Sequence[Curve]) -> str:
    return repr([(*_setting(curve), _task(curve), curve.quality["name"]) for curve in curves])


def _task(curve: Curve) -> str:
    return curve.group.dense.record["task"]


def _columns(curve: Curve) -> dict[float, int]:
    """Return where in the draws each strength stands."""
    strengths = [cell.record["strength"] for cell in curve.group.cells]
    return {own: at for at, own in reversed(list(enumerate(strengths, start=1))) if own is not None}


def _shared(curves: Sequence[Curve]) -> list[float]:
    others = [_columns(curve) for curve in curves[1:]]
    return [own for own in sorted(_columns(curves[0])) if all(own in each for each in others)]


def _too_few(curves: Sequence[Curve], shared: int) -> str:
    group = curves[0].group
    return (
        f"no average over {', '.join(map(_task, curves))} on {group.dense.record['model']}, {group.rule} at"
        f" {group.site}: they share {shared or 'no'} strength{'s' if shared != 1 else ''}, and it takes {_FEWEST}"
    )


def _average(
    curves: Sequence[Curve], name: str, strengths: Sequence[float], answers: Sequence[Answer], seed: int
) -> Average:
    quality, clusters = _quality(curves), _clusters(curves)
    measured, sparsity = np.mean([_drawn(curve, strengths, seed) for curve in curves], axis=0)
    scale, dense = SCALES[quality["kind"]], float(measured[0, 0])
    guessing = [binomial_error(curve.quality["chance"] or 0.0, len(curve.keys)) for curve in curves]
    error = max(float(np.nanstd(measured[1:, 0])), math.hypot(*guessing) / len(curves))
    is_above = dense - (quality["chance"] or 0.0) > 2 * error
    grouped = "" if all(curve.clusters is None for curve in curves) else f" in {int(clusters.max()) + 1} groups"
    reason = no_reading(quality, dense, is_above, f"n={len(clusters)}{grouped}")
    asked = sorted({*retentions_of([curve.group for curve in curves]), *(own["retention"] for own in answers)})
    readings = readings_of(sparsity, scale.sign * measured, scale.logarithmic, reason, asked)
    if not strengths:
        readings = [_unread(own, reason) for own in readings]
    group = _group(curves[0], name, quality, strengths)
    by_retention = {own["retention"]: own for own in answers}
    readings = with_answers(readings, by_retention, reason, len(measured) - 1, rng_of(group.dense, seed))
    nothing = [None] * (1 + len(strengths))
    points = points_of([group.dense, *group.cells], quality, (measured, sparsity), nothing)
    told = {"value": points[0].quality, "interval": points[0].quality_interval}
    if answers and not strengths:
        told = max(answers, key=lambda own: own["items"])["dense"]
    keys = tuple(key for curve in curves for key in curve.keys)
    curve = Curve(group, quality, keys, points, tuple(readings), (measured, sparsity), clusters)
    return Average(curve, tuple(map(_task, curves)), told, not strengths)


def _drawn(curve: Curve, strengths: Sequence[float], seed: int) -> np.ndarray:
    """Return a task's quality and sparsity at the strengths, (2, 1 + draws, points), dense first.

    Two tasks of equally many items draw the same positions. The order depends on the task alone, so that both paradigms
    of one task stay paired.
    """
    at = _columns(curve)
    drawn = np.stack(curve.drawn)[:, :, [0, *(at[own] for own in strengths)]]
    order = np.random.default_rng([seed, *_task(curve).encode()]).permutation(drawn.shape[1] - 1)
    return np.concatenate([drawn[:, :1], drawn[:, 1:][:, order]], axis=1)


def _quality(curves: Sequence[Curve]) -> Quality:
    kind = curves[0].quality["kind"]
    chances = [curve.quality["chance"] or 0.0 for curve in curves]
    chance = math.fsum(chances) / len(chances) if kind == "accuracy" else None
    return {"name": quality_of([curve.quality for curve in curves]), "kind": kind, "chance": chance}


def _unread(reading: Reading, reason: str | None) -> Reading:
    why = reason or (OTHER_RETENTION if reading.reading == DEFAULT_READING else TOO_FEW_POINTS)
    return replace(reading, value=None, interval=None, censored=False, reason=why)


def _group(curve: Curve, name: str, quality: Quality, strengths: Sequence[float]) -> Group:
    """Return the cells of one task under the name of the average."""
    at = _columns(curve)
    cells = [curve.group.dense, *(curve.group.cells[at[own] - 1] for own in strengths)]
    named = [_named(cell, name, quality) for cell in cells]
    return Group(named[0], tuple(named[1:]), curve.group.rule, curve.group.site)


def _named(cell: Cell, name: str, quality: Quality) -> Cell:
    return replace(cell, record={**cell.record, "task": name, "qualities": [quality]}, searches=())


def _clusters(curves: Sequence[Curve]) -> np.ndarray:
    """Return the number of each item's group over all tasks; items without one stand alone."""
    own = [np.arange(len(curve.keys)) if curve.clusters is None else curve.clusters for curve in curves]
    starts = np.cumsum([0, *(int(each.max()) + 1 for each in own)])
    return np.concatenate([start + each for start, each in zip(starts, own, strict=False)])


def _points(curve: Curve) -> Iterator[dict[str, Any]]:
    shown = ("sparsity", "sparsity_interval", "quality", "quality_interval", "retention", "retention_interval")
    for point in curve.points:
        record = point.cell.record
        named = {"strength": record["strength"], "dense": record["dense"]}
        yield named | {name: getattr(point, name) for name in shown}
