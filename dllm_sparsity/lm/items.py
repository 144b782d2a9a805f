"""What goes into a backend and comes out of it, item by item."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_NEW_TOKENS = 256
"""What backends generate where a task names no number."""


@dataclass(frozen=True)
class Target:
    """Tokens to score in their context."""

    item: Hashable
    context: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Score:
    """What scoring a target gave: nats, a Monte-Carlo standard error (0 where exact), and forward passes."""

    loglikelihood: float
    is_greedy: bool
    error: float
    nfe: int


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that are answered together.

    Args:
        prompts: Token ids of each.
        items: What each belongs to.
        draws: What names the randomness of each.
        length: New tokens, at most.
        until: Texts that end an answer.
        options: The task's other generation arguments.
    """

    prompts: list[list[int]]
    items: list[Hashable]
    draws: list[Hashable]
    length: int
    until: list[str]
    options: dict[str, Any]


@dataclass(frozen=True)
class Generation:
    """Generated token ids up to the stop, how many were generated with it, and forward passes until then."""

    tokens: list[int]
    new_tokens: int
    nfe: int


@dataclass
class ItemLog:
    """What is known about one item when its task has run; lists are in the order of its requests."""

    loglikelihoods: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    target_tokens: list[int] = field(default_factory=list)
    answer_tokens: list[int] = field(default_factory=list)
    nfe: int = 0
    new_tokens: int = 0
    seconds: float = 0.0

    def add(self, target: Target, score: Score, merge: bool) -> None:
        """Add a scored target.

        Args:
            target: What was scored.
            score: What it gave.
            merge: Whether targets of this item are windows of one text, and add up.
        """
        self.nfe += score.nfe
        if merge and self.loglikelihoods:
            self.loglikelihoods[0] += score.loglikelihood
            self.errors[0] = math.hypot(self.errors[0], score.error)
            self.target_tokens[0] += len(target.tokens)
        else:
            self.loglikelihoods.append(score.loglikelihood)
            self.errors.append(score.error)
            self.target_tokens.append(len(target.tokens))


def site_totals(per_item: Mapping[Hashable, Mapping[str, tuple[int, int]]]) -> dict[str, dict[str, float]]:
    """Return kept, total and sparsity of each site over items.

    Args:
        per_item: Item -> site -> (kept, total), as a reading has it.
    """
    sums: dict[str, list[int]] = {}
    for sites in per_item.values():
        for site, (kept, total) in sites.items():
            mine = sums.setdefault(site, [0, 0])
            mine[0] += kept
            mine[1] += total
    return {
        site: {"kept": kept, "total": total, "sparsity": 1 - kept / total}
        for site, (kept, total) in sums.items()
        if total
    }
