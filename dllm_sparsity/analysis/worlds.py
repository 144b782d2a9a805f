"""Synthetic items whose critical sparsity is known: accuracy and likelihood, over curves of several shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist

import numpy as np

from dllm_sparsity.analysis.column import Column, Threshold

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
        mesh = np.linspace(0, 1, 200_001)
        below = self.margin(mesh) < 0
        return (float(sparsity_at(mesh[below.argmax()])), False) if below.any() else (float(sparsity_at(1.0)), True)

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


def sparsity_at(strength: np.ndarray | float) -> np.ndarray:
    """Return the sparsity that a strength reaches: more than proportional at first, as under top-p.

    Args:
        strength: Between 0, dense, and 1.
    """
    return 0.95 * np.asarray(strength) ** 0.6


def _power(scale: float, power: float) -> Callable[[np.ndarray], np.ndarray]:
    return partial(_powered, scale, power)


def _powered(scale: float, power: float, s: np.ndarray) -> np.ndarray:
    return scale * sparsity_at(s) ** power


def _hump(s: np.ndarray) -> np.ndarray:
    """Improve at first, fall later."""
    x = sparsity_at(s)
    return 2.0 * x**5 - 0.06 * np.sin(np.minimum(x / 0.5, 1) * math.pi)


def _dip(s: np.ndarray) -> np.ndarray:
    """Fall into a dip, come back, and fall for good."""
    x = sparsity_at(s)
    return 0.3 * np.exp(-(((x - 0.4) / 0.1) ** 2)) + 2.0 * np.maximum(x - 0.7, 0) ** 2


def _scaled(shape: Callable[[np.ndarray], np.ndarray], scale: float) -> Callable[[np.ndarray], np.ndarray]:
    return partial(_times, shape, scale)


def _times(shape: Callable[[np.ndarray], np.ndarray], scale: float, s: np.ndarray) -> np.ndarray:
    return scale * shape(s)


def _stairs(s: np.ndarray) -> np.ndarray:
    """Fall by two smooth steps."""
    x = sparsity_at(s)
    return 0.1 / (1 + np.exp(-(x - 0.35) / 0.05)) + 0.8 / (1 + np.exp(-(x - 0.7) / 0.04)) - 0.1 / (1 + math.exp(7))


def _waves(s: np.ndarray) -> np.ndarray:
    """Fall slowly, to and fro."""
    x = sparsity_at(s)
    return 0.02 * x + 0.01 * np.sin(12 * x) * np.minimum(x / 0.2, 1)


WORLDS = (
    World("accuracy, monotone", "accuracy", _power(1.5, 5), 4000),
    World("accuracy, steep", "accuracy", _power(60.0, 8), 4000, flips=0.1),
    World("accuracy, few items", "accuracy", _power(1.5, 5), 600),
    World("accuracy, rises first", "accuracy", _hump, 4000),
    World("accuracy, dip and recovery", "accuracy", _dip, 4000),
    World("accuracy, fails at once", "accuracy", _power(1.5, 1.0), 4000),
    World("accuracy, never fails", "accuracy", _power(0.002, 2), 4000),
    World("accuracy, fails at the end", "accuracy", _power(0.05, 3), 4000),
    World("NLL, monotone", "nll", _power(1.0, 5), 1000),
    World("NLL, rises first", "nll", _scaled(_hump, 0.5), 1000),
    World("NLL, dip and recovery", "nll", _scaled(_dip, 0.5), 1000),
    World("NLL, fails at once", "nll", _power(0.5, 1.0), 1000),
    World("NLL, never fails", "nll", _power(0.005, 2), 1000),
    World("NLL, fails at the end", "nll", _power(0.0125, 3), 1000),
    World("accuracy, groups of 4", "accuracy", _power(1.5, 4), 4000, together=4),
    World("accuracy, 95 % kept", "accuracy", _power(1.5, 4), 2000, retention=0.95),
    World("accuracy, hard items, two steps", "accuracy", _stairs, 3000, skill=0.1),
    World("accuracy, loosely paired", "accuracy", _power(2.0, 4), 6000, flips=0.6),
    World("accuracy, easy items, 98 % kept", "accuracy", _power(2.0, 3), 1500, retention=0.98, skill=1.6),
    World("accuracy, groups of 5, 95 % kept", "accuracy", _power(3.0, 4), 3000, 0.95, together=5),
    World("NLL, 95 % kept", "nll", _power(1.0, 3), 600, retention=0.95),
    World("NLL, to and fro", "nll", _waves, 1500),
    World("NLL, groups of 5, two steps", "nll", _scaled(_stairs, 0.3), 2000, together=5),
    World("accuracy, slow fall, 97 % kept", "accuracy", _power(0.8, 2.5), 5000, 0.97, skill=0.5, held_out=True),
    World("accuracy, pairs, loosely paired", "accuracy", _power(1.0, 4), 2500, flips=0.45, together=2, held_out=True),
    World("NLL, rises first, 98 % kept", "nll", _scaled(_hump, 0.8), 800, retention=0.98, held_out=True),
    World("NLL, groups of 3, slow fall", "nll", _power(0.3, 2.2), 1200, together=3, held_out=True),
)
