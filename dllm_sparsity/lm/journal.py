"""The hook through which a backend remembers batches that it answered before."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Answer:
    """What one batch gave: a `Score` or `Generation` for each request in its order, and the seconds it took."""

    results: list[Any]
    seconds: float


class Journal(Protocol):
    """What remembers answered batches; they are asked for in the order that the requests fix."""

    def known(self, key: str) -> Answer | None:
        """Return the answer of the next batch where it was given before, with all that was counted in it.

        Args:
            key: Digest of the batch's requests.
        """

    def add(self, key: str, answer: Answer) -> None:
        """Remember the answer of the next batch, with all that was counted since the one before.

        Args:
            key: Digest of the batch's requests.
            answer: What it gave.
        """


def answer(journal: Journal | None, requests: object, compute: Callable[[], list[Any]]) -> Answer:
    """Answer one batch, from the journal where it is known.

    Args:
        journal: Remembers batches; None computes every one.
        requests: The batch as plain data whose `repr` tells it from every other.
        compute: Answers it.
    """
    key = "" if journal is None else hashlib.sha256(repr(requests).encode()).hexdigest()
    known = None if journal is None else journal.known(key)
    if known is not None:
        return known
    started = time.perf_counter()
    results = compute()
    found = Answer(results, time.perf_counter() - started)
    if journal is not None:
        journal.add(key, found)
    return found
