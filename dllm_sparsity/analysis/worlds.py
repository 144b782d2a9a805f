"""Synthetic items whose critical sparsity is known: accuracy and likelihood, over curves of several shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from dllm_sparsity.analysis.averaged import mixed
from dllm_sparsity.analysis.column import Column, Threshold
from dllm_sparsity.analysis.mixture import Mixture
from dllm_sparsity.analysis.search import LEAST_BLOCK

_WAVES = 3
_PHI = np.vectorize(NormalDist().cdf, otypes=[float])


@dataclass(frozen=True)
class World:
    """A population of items and what a rule does to it.

    Args:
        name: For the table.
        kind: `accuracy` or `nll`.
        loss: The damage at a strength, 0 for dense; in standard deviations of difficulty or in nats.
        retention: Share of dense to be kept.
        items: Items of a study.
        flips: How much items change at random, in the same units; grows with the square root of the strength.
        skill: How much better than the typical item's difficulty the model is.
        together: Items of a group, which share half the variance of difficulty and of change.
        held_out: Whether nobody looked at it while the search was made.
    """

    name: str
    kind: str
    loss: Callable[[np.ndarray], np.ndarray]
    items: int
    retention: float = 0.99
    flips: float = 0.3
    skill: float = 0.8
    together: int = 1
    held_out: bool = False

    @property
    def threshold(self) -> Threshold:
        """Return what is asked."""
        return Threshold(self.retention, self.kind == "nll", self.kind == "accuracy")

    @property
    def least(self) -> int:
        """Return the items of the smallest block."""
        return LEAST_BLOCK

    def margin(self, strength: np.ndarray) -> np.ndarray:
        """Return the population's margin at strengths between 0, dense, and 1.

        Args:
            strength: The strengths.
        """
        loss = self.loss(strength)
        if self.kind == "nll":
            return -math.log(self.retention) - loss
        spread = np.sqrt(1 + self.flips**2 * strength)
        return _PHI((self.skill - loss) / spread) - self.retention * float(_PHI(self.skill))

    def truth(self) -> tuple[float, bool]:
        """Return the population's critical sparsity, and whether there is none below the end of the range."""
        return crossing(self.margin)

    def draw(self, seed: int) -> Sample:
        """Return the items of one study.

        Args:
            seed: Another seed, other items.
        """
        return Sample(self, np.random.default_rng(seed))


class Sample:
    """The items of one study: what any of them gives at any strength is fixed when they are drawn."""

    def __init__(self, world: World, rng: np.random.Generator) -> None:
        n = world.items
        self.world, self._columns = world, dict[float, Column]()
        self.group = None if world.together == 1 else rng.permutation(n) // world.together
        self.difficulty = self._normal(rng, n)
        self.scale = np.exp(0.6 * self._normal(rng, n) - 0.18)
        self.tokens = rng.integers(12, 80, n).astype(float)
        waves = np.stack([self._normal(rng, n) for _ in range(2 * _WAVES)])
        self.sine, self.cosine = waves.reshape(2, _WAVES, n) / math.sqrt(_WAVES)
        self.tilt = rng.normal(0, 0.02, n)
        self.level = rng.gamma(8.0, 2.5 / 8, n)

    def _normal(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Return a normal number for each item; half its variance is the group's, where there are groups."""
        own = rng.normal(size=n)
        if self.group is None:
            return own
        return math.sqrt(0.5) * (own + rng.normal(size=n)[self.group])

    def column(self, strength: float, start: int, stop: int) -> Column:
        """Return what a block of items gives.

        Args:
            strength: Between 0, dense, and 1.
            start: First item.
            stop: One behind the last.
        """
        if strength not in self._columns:
            self._columns[strength] = self._column(strength)
        return self._columns[strength].at(np.arange(start, stop))

    def _column(self, strength: float) -> Column:
        angles = strength * np.array([3.0, 11.0, 29.0])[:, None]
        noise = (self.sine * np.sin(angles) + self.cosine * np.cos(angles)).sum(0)
        noise *= self.world.flips * math.sqrt(strength)
        loss = float(self.world.loss(np.array(strength)))
        tokens = self.tokens
        if self.world.kind == "nll":
            height, weight = -tokens * (self.level + self.scale * loss + 0.05 * noise), tokens
        else:
            height = (self.world.skill + self.difficulty + noise > loss).astype(float)
            weight = np.ones_like(height)
        share = float(sparsity_at(strength))
        total = tokens * 1000
        kept = total * (1 - np.clip(share + self.tilt * share * (1 - share), 0, 1))
        return Column(height, weight, kept, total, self.group)


@dataclass(frozen=True)
class Blend:
    """Several populations whose average is asked for.

    Args:
        name: For the table.
        worlds: The populations, of one kind and asked for one retention.
        held_out: Whether nobody looked at it while the search was made.
    """

    name: str
    worlds: tuple[World, ...]
    held_out: bool = False

    @property
    def kind(self) -> str:
        """Return `accuracy` or `nll`."""
        return self.worlds[0].kind

    @property
    def retention(self) -> float:
        """Return the share of dense to be kept."""
        return self.worlds[0].retention

    @property
    def threshold(self) -> Threshold:
        """Return what is asked."""
        return self.worlds[0].threshold

    @property
    def mixture(self) -> Mixture:
        """Return the order of the items."""
        return Mixture([world.items for world in self.worlds])

    @property
    def items(self) -> int:
        """Return the items of a study."""
        return self.mixture.items

    @property
    def least(self) -> int:
        """Return the items of the smallest block."""
        return self.mixture.least

    def margin(self, strength: np.ndarray) -> np.ndarray:
        """Return the average's margin at strengths between 0, dense, and 1.

        Args:
            strength: The strengths.
        """
        return np.mean([world.margin(strength) for world in self.worlds], axis=0)

    def truth(self) -> tuple[float, bool]:
        """Return the critical sparsity of the average, and whether there is none below the end of the range."""
        return crossing(self.margin)

    def draw(self, seed: int) -> BlendedSample:
        """Return the items of one study.

        Args:
            seed: Another seed, other items.
        """
        return BlendedSample(self, seed)


class BlendedSample:
    """The items of one study of several populations."""

    def __init__(self, world: Blend, seed: int) -> None:
        self.world, self._mixture = world, world.mixture
        self.samples = [own.draw(seed * len(world.worlds) + number) for number, own in enumerate(world.worlds)]

    def column(self, strength: float, start: int, stop: int) -> Column:
        """Return what a block of items gives.

        Args:
            strength: Between 0, dense, and 1.
            start: First item, in the mixture's order.
            stop: One behind the last.
        """
        parts = self._mixture.parts(start, stop)
        columns = [own.column(strength, *part) for own, part in zip(self.samples, parts, strict=True)]
        return mixed(columns, parts)


def crossing(margin: Callable[[np.ndarray], np.ndarray]) -> tuple[float, bool]:
    """Return the sparsity at which a margin first falls below zero, and whether it never does: then the end.

    Args:
        margin: The margin at strengths.
    """
    mesh = np.linspace(0, 1, 200_001)
    below = margin(mesh) < 0
    return (float(sparsity_at(mesh[below.argmax()])), False) if below.any() else (float(sparsity_at(1.0)), True)


def only_falls(margin: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Tell whether a margin nowhere rises.

    Args:
        margin: The margin at strengths.
    """
    return bool((np.diff(margin(np.linspace(0, 1, 1001))) <= 0).all())


def sparsity_at(strength: np.ndarray | float) -> np.ndarray:
    """Return the sparsity that a strength reaches: more than proportional at first, as under top-p.

    Args:
        strength: Between 0, dense, and 1.
    """
    return 0.95 * np.asarray(strength) ** 0.6
