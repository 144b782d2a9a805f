"""Planned batches of requests, and the hook through which they are remembered or answered elsewhere."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from dllm_sparsity.lm.items import PromptBatch, Target


@dataclass(frozen=True)
class Work:
    """A planned batch.

    Args:
        batch: Targets to score, or prompts to answer.
        check_greedy: Whether `is_greedy` of the targets is asked for.
    """

    batch: Sequence[Target] | PromptBatch
    check_greedy: bool = False

    @cached_property
    def key(self) -> str:
        """Digest of what is asked."""
        return hashlib.sha256(repr((self.check_greedy, self.batch)).encode()).hexdigest()


@dataclass(frozen=True)
class Answer:
    """What one batch gave: a `Score` or `Generation` for each request in its order, and the seconds it took."""

    results: list[Any]
    seconds: float


Compute = Callable[[Work], list[Any]]
"""Answers one batch here, on this process's model."""


class Journal(Protocol):
    """What remembers answered batches, or has them answered elsewhere."""

    def answers(self, works: Sequence[Work], compute: Compute) -> Iterator[tuple[int, Answer]]:
        """Yield the place and the answer of each batch, in any order.

        Args:
            works: Planned batches.
            compute: Answers one here.
        """
        ...


def answers(journal: Journal | None, works: Sequence[Work], compute: Compute) -> Iterator[tuple[int, Answer]]:
    """Yield the place and the answer of each batch, in any order where there is a journal.

    Args:
        journal: Remembers batches; None computes every one.
        works: Planned batches.
        compute: Answers one.
    """
    if journal is not None:
        yield from journal.answers(works, compute)
        return
    for place, work in enumerate(works):
        yield place, timed(work, compute)


def timed(work: Work, compute: Compute) -> Answer:
    """Answer one batch here.

    Args:
        work: The batch.
        compute: Answers it.
    """
    started = time.perf_counter()
    return Answer(compute(work), time.perf_counter() - started)
