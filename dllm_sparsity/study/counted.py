"""An answered batch with all that was counted in it, and where such batches come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from dllm_sparsity.lm.journal import Answer, Compute, Work, timed
from dllm_sparsity.sparsity.clock import Clock
from dllm_sparsity.sparsity.reading import PerItem
from dllm_sparsity.sparsity.sparsifier import Tracker
from dllm_sparsity.study import collect


@dataclass(frozen=True)
class Counted:
    """An answered batch.

    Args:
        answer: What it gave; None where counts came about outside of a batch.
        steps: Step records of its forward passes.
        per_item: Item -> site -> (kept, total).
        notes: What a reader of the counts should know.
        overlap_refused: Whether rows could not be compared from step to step.
    """

    answer: Answer | None
    steps: pa.Table
    per_item: PerItem
    notes: tuple[str, ...]
    overlap_refused: bool


@dataclass(frozen=True)
class Facts:
    """What a sealed cell says of the model that it ran on.

    Args:
        ffn: Widths and form of its FFNs.
        shims: What its code needed to run.
        model: Its dtype, its attention, and the hub's hashes of its weights.
    """

    ffn: dict[str, Any]
    shims: tuple[str, ...]
    model: dict[str, Any]


class Source(Protocol):
    """Answers planned batches of one cell and counts in them."""

    clock: Clock
    others_seconds: float
    """Seconds spent on other cells' batches."""

    @property
    def checked(self) -> bool:
        """Whether every site is known to act, so that batches of an earlier run may stand for all."""
        ...

    def counted(self, works: Sequence[tuple[int, Work]], compute: Compute) -> Iterator[tuple[int, Counted]]:
        """Yield each batch when it is answered, in any order.

        Args:
            works: Number and batch.
            compute: Answers one on this process's model.
        """
        ...

    def rest(self) -> Counted | None:
        """Return what was counted outside of a batch."""
        ...


class Here:
    """Batches answered in this process, on a model with a tracker attached.

    Args:
        tracker: Counts; what it holds is taken after each batch.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.tracker, self.clock, self.others_seconds = tracker, tracker.clock, 0.0

    @property
    def checked(self) -> bool:
        """Whether the tracker saw every site at work in its dry run."""
        return self.tracker.checked

    def counted(self, works: Sequence[tuple[int, Work]], compute: Compute) -> Iterator[tuple[int, Counted]]:
        """Yield each batch, one after another.

        Args:
            works: Number and batch.
            compute: Answers one.

        Raises:
            NonFiniteError: An activation was NaN or infinite.
        """
        for number, work in works:
            yield number, self.one(work, compute)

    def one(self, work: Work, compute: Compute) -> Counted:
        """Answer one batch.

        Args:
            work: The batch.
            compute: Answers it.

        Raises:
            NonFiniteError: An activation was NaN or infinite.
        """
        return self._taken(timed(work, compute))

    def rest(self) -> Counted:
        """Return what was counted outside of a batch.

        Raises:
            NonFiniteError: An activation was NaN or infinite.
        """
        return self._taken(None)

    def _taken(self, answer: Answer | None) -> Counted:
        reading = self.tracker.take()
        table = collect.step_table(reading.columns)
        return Counted(answer, table, reading.per_item, tuple(reading.notes), self.clock.overlap_refused)
