"""The items of several tasks in one order of which every stretch holds all tasks: for a search on their average."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_MOST = 8
"""A task counts with at most so many times the items of the smallest: more would not make the average much surer."""
_EACH = 8
"""Items of the smallest task in the smallest block, about."""


class Mixture:
    """Items of several tasks, mixed evenly.

    Args:
        sizes: Items of each task; none of them is empty.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        used = [min(size, _MOST * min(sizes)) for size in sizes]
        places = np.concatenate([(np.arange(size) + 0.5) / size for size in used])
        self._task = np.repeat(np.arange(len(used)), used)[np.argsort(places, kind="stable")]
        self._tasks = len(used)
        self.items = len(places)
        self.least = math.ceil(_EACH * self.items / min(used))
        """Items of the smallest block."""

    def parts(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the items of each task in a block: the first, and one behind the last, in the task's own order.

        Args:
            start: First item of the block, in the mixture's order.
            stop: One behind the last.
        """
        starts, stops = (np.bincount(self._task[:edge], minlength=self._tasks).tolist() for edge in (start, stop))
        return list(zip(starts, stops, strict=True))
