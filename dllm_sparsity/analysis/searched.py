"""A search on sealed cells: from a block of items to a column of numbers, and from what was found to plain data."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow as pa

from dllm_sparsity.analysis.checking import read_record
from dllm_sparsity.analysis.column import Column, Threshold
from dllm_sparsity.analysis.curves import achieved
from dllm_sparsity.analysis.headline import order_of
from dllm_sparsity.analysis.loading import Cell
from dllm_sparsity.analysis.margins import level_of, margins
from dllm_sparsity.analysis.pairing import pair
from dllm_sparsity.analysis.qualities import SCALES, pairs
from dllm_sparsity.analysis.search import Goal, Search
from dllm_sparsity.errors import UserError
from dllm_sparsity.study.records import Quality

_Z = NormalDist().inv_cdf(0.975)
_PLACED = ("task", "site", "paradigm", "model")
_TOLD = (*_PLACED, "rule", "quality", "retention", "items", "items_available")
_STOPS: dict[str, str] = {
    "width": "width of {:g} reached",
    "items": "all items used, above {:g}",
    "budget": "budget spent, above {:g}",
    "values": "items without a value",
}
_WITHOUT_ANSWER = {
    "budget": "the budget of item-evaluations was spent before there was an answer",
    "values": "the items that were measured, or those of one task, have no value of this quality",
}


class SearchedCurve:
    """One model, task, rule and site while it is searched.

    Args:
        dense: The first dense block.
        quality: Name or kind of the quality; None takes the task's first.
        site: The site.

    Raises:
        UserError: The task has no such quality.
    """

    def __init__(self, dense: Cell, quality: str | None, site: str) -> None:
        self.site, self.quality = site, _choose(dense, quality)
        self.scale = SCALES[self.quality["kind"]]
        self.identity = {name: dense.record[name] for name in ("paradigm", "model", "task")}
        self.setting: dict[str, Any] = {}
        self._dense: dict[tuple[int, int], Cell] = {}
        self._groups: dict[Any, int] = {}

    def threshold(self, retention: float) -> Threshold:
        """Return what a retention asks of this quality.

        Args:
            retention: Share of dense.
        """
        return Threshold(retention, self.scale.logarithmic, self.quality["kind"] == "accuracy")

    def column(self, cell: Cell, block: tuple[int, int]) -> Column:
        """Return what a sealed block gives; items without a value weigh nothing.

        Args:
            cell: The block; the dense one of the same items comes before the others.
            block: Its first item, and one behind its last.
        """
        if cell.record["dense"]:
            self._dense[block] = cell
        else:
            self.setting = {name: cell.record[name] for name in ("rule", "rule_parameters", "layers")}
        dense, samples = pair([self._dense[block], cell]).tables
        numerator, denominator = pairs(self.quality, samples, dense)
        missing = ~np.isfinite(numerator + denominator)
        kept, total = achieved(cell, samples, self.site)
        return Column(
            height=np.where(missing, 0.0, self.scale.sign * numerator),
            weight=np.where(missing, 0.0, denominator),
            kept=kept,
            total=total,
            group=self._grouped(samples, block[0]),
        )

    def _grouped(self, samples: pa.Table, first: int) -> np.ndarray | None:
        """Return the number of each item's group, the same in all blocks; items without a group stand alone."""
        if "group" not in samples.column_names:
            return None
        labels = samples["group"].to_pylist()
        named = [(first + row,) if label is None else label for row, label in enumerate(labels)]
        return np.array([self._groups.setdefault(label, len(self._groups)) for label in named], dtype=np.int64)

    def answer(self, goal: Goal, search: Search, width: float) -> dict[str, Any]:
        """Return what was found, as plain data.

        Args:
            goal: What was found for one retention.
            search: The search, done.
            width: The width that was asked for.
        """
        return {
            **self.identity,
            **self.setting,
            "site": self.site,
            "quality": self.quality["name"],
            "kind": self.quality["kind"],
            **found_by(goal, search, width, self.quality["kind"]),
        }


def found_by(goal: Goal, search: Search, width: float, kind: str) -> dict[str, Any]:
    """Return what a search found for one retention, and what it took, as plain data.

    Args:
        goal: What was found.
        search: The search, done.
        width: The width that was asked for.
        kind: Kind of the quality.
    """
    found = goal.profile
    return {
        "retention": goal.threshold.retention,
        "value": found.estimate if found else None,
        "interval": list(found.interval) if found else None,
        "censored": found is not None and not found.crosses,
        "reason": None if found else _WITHOUT_ANSWER.get(goal.stopped),
        "stopped": goal.stopped,
        "width": width,
        "items": goal.items or (len(search.dense) if search.dense else 0),
        "items_available": search.limits.items,
        "evaluations": search.spent,
        "dense": _dense(search, SCALES[kind].sign),
        "path": [_step(search, goal.threshold, strength, kind) for strength in search.columns],
    }


def _dense(search: Search, sign: int) -> dict[str, Any]:
    if search.dense is None:
        return {"value": None, "interval": None}
    value, low, high = level_of(search.dense)
    return {"value": sign * value, "interval": sorted([sign * low, sign * high])}


def _step(search: Search, threshold: Threshold, strength: float, kind: str) -> dict[str, Any]:
    """Return what one strength gave on the items that it was measured on, against dense."""
    column, dense, sign = search.columns[strength], search.dense, SCALES[kind].sign
    if dense is None:
        raise RuntimeError("dense comes first")
    points = margins(dense, [column], threshold)
    top, wide = level_of(dense)[0], _Z * math.sqrt(points.covariance[-1, -1])
    asked = math.log(threshold.retention) if threshold.logarithmic else (threshold.retention - 1) * top
    heights = [top + asked + float(points.margin[-1]) + off for off in (0.0, -wide, wide)]
    level, *ends = (sign * height for height in heights)
    kept = [float(SCALES[kind].retention(own, sign * top)) for own in (level, *ends)]
    shown = {"quality": level, "quality_interval": sorted(ends)}
    shown |= {"retention": kept[0], "retention_interval": sorted(kept[1:])} if top or threshold.logarithmic else {}
    return {"strength": strength, "sparsity": column.sparsity, "items": len(column), **shown}


def open_cell(folder: Path) -> Cell:
    """Read a sealed cell.

    Args:
        folder: Where it is.
    """
    return Cell(folder, read_record(folder / "cell.json"))


def ends(search: Any) -> list[dict[str, Any]]:
    """Return how each search ended, those of averages too, in the order of the main table.

    Args:
        search: What search.json holds, or None.

    Returns:
        Rows with `task, site, rule, paradigm, model, quality, retention, ended, evaluations, items, items_available`;
        evaluations is text: those of layers measured alone are told beside those of the search.
    """
    answers = [*search.get("curves", []), *search.get("averages", [])] if isinstance(search, dict) else []
    alone = {
        repr(_along(own)): own["allocation"]["evaluations"]["layers_alone"]
        for own in answers
        if "evaluations" in own.get("allocation", {})
    }
    rows = []
    for own in answers:
        more = alone.get(repr([*(own[name] for name in _PLACED), own["rule_parameters"], own["retention"]]))
        spent = f"{own['evaluations']:,}" + (f" + {more:,} by layer" if more else "")
        ended = _STOPS.get(own["stopped"], str(own["stopped"])).format(100 * own["width"])
        is_wide = own["interval"] and own["interval"][1] - own["interval"][0] > own["width"]
        ended = ended if is_wide or own["stopped"] == "width" else ended.split(",")[0]
        named = {name: own[name] for name in _TOLD}
        rows.append({**named, "ended": ended, "evaluations": spent})
    last = {own["task"] for own in answers if "tasks" in own}
    return sorted(rows, key=lambda row: (row["task"] in last, order_of(row)))


def _along(uniform: dict[str, Any]) -> list[Any]:
    """Return what tells the search along an allocation from all others."""
    return [*(uniform[name] for name in _PLACED), uniform["allocation"]["rule"]["parameters"], uniform["retention"]]


def _choose(dense: Cell, asked: str | None) -> Quality:
    known = dense.record["qualities"]
    found = [own for own in known if asked in (None, own["name"], own["kind"])]
    if not found:
        raise UserError(
            f"task {dense.record['task']} has no quality {asked!r} to search on",
            f"it has: {', '.join(own['name'] for own in known) or 'none'}",
        )
    return found[0]
