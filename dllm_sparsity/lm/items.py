"""What goes into a backend and comes out of it, item by item."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field


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
