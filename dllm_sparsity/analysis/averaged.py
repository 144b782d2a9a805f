"""A search on the average over tasks: from blocks of all of them to a column, and from what was found to plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dllm_sparsity.analysis.averages import quality_of
from dllm_sparsity.analysis.column import Column, Threshold
from dllm_sparsity.analysis.loading import Cell
from dllm_sparsity.analysis.mixture import Mixture
from dllm_sparsity.analysis.search import Goal, Search
from dllm_sparsity.analysis.searched import SearchedCurve, found_by


@dataclass(frozen=True)
class SearchedAverage:
    """The average over tasks of one model, rule and site while it is searched; every task counts the same.

    Args:
        curves: Those of the tasks, all on one kind of quality.
        mixture: The tasks' items in one order.
        name: What it is called in the place of a task.
    """

    curves: tuple[SearchedCurve, ...]
    mixture: Mixture
    name: str

    def threshold(self, retention: float) -> Threshold:
        """Return what a retention asks of this quality.

        Args:
            retention: Share of dense.
        """
        return self.curves[0].threshold(retention)

    def column(self, cells: Sequence[Cell], block: tuple[int, int]) -> Column:
        """Return what a block gives.

        Args:
            cells: The part of each task, sealed; the dense ones of the same items come before the others.
            block: Its first item in the mixture, and one behind its last.
        """
        parts = self.mixture.parts(*block)
        columns = [curve.column(cell, part) for curve, cell, part in zip(self.curves, cells, parts, strict=True)]
        return mixed(columns, parts)

    def answer(self, goal: Goal, search: Search, width: float) -> dict[str, Any]:
        """Return what was found, as plain data.

        Args:
            goal: What was found for one retention.
            search: The search, done.
            width: The width that was asked for.
        """
        first = self.curves[0]
        return {
            **first.identity,
            "task": self.name,
            "tasks": [curve.identity["task"] for curve in self.curves],
            **first.setting,
            "site": first.site,
            "quality": quality_of([curve.quality for curve in self.curves]),
            "kind": first.quality["kind"],
            **found_by(goal, search, width, first.quality["kind"]),
            "measured": {"dense": self._by_task(search.dense), **self._strengths(search)},
        }

    def _strengths(self, search: Search) -> dict[str, list[int]]:
        return {repr(strength): self._by_task(column) for strength, column in search.columns.items()}

    def _by_task(self, column: Column | None) -> list[int]:
        """Return how many items of each task were measured."""
        none = np.zeros(0, dtype=np.int64)
        stratum = none if column is None or column.stratum is None else column.stratum
        return np.bincount(stratum, minlength=len(self.curves)).tolist()


def mixed(columns: Sequence[Column], parts: Sequence[tuple[int, int]]) -> Column:
    """Return the columns of several tasks as one.

    Args:
        columns: One for each task.
        parts: The items of each: the first, and one behind the last, in the task's own order.
    """
    tasks = len(columns)
    numbers = [np.arange(*part) if own.group is None else own.group for own, part in zip(columns, parts, strict=True)]
    grouped = any(own.group is not None for own in columns)
    return Column(
        **{
            name: np.concatenate([getattr(own, name) for own in columns])
            for name in ("height", "weight", "kept", "total")
        },
        group=np.concatenate([own * tasks + task for task, own in enumerate(numbers)]) if grouped else None,
        stratum=np.repeat(np.arange(tasks), [len(own) for own in columns]),
    )
