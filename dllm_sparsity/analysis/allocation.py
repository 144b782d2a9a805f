"""Allocate sparsity to layers: the cheapest activations of any layer go first, from dense to the sparsest there is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dllm_sparsity.analysis.slopes import Slope

ROWS = 33


@dataclass(frozen=True)
class Allocation:
    """Allocations that drop the most for each total loss, from nothing dropped to the last knot of every layer.

    Args:
        dropped: Dropped in all layers together, at the knots of the path.
        losses: Predicted loss in all layers together: the sum of what each loses alone.
        shares: Dropped in each layer, [knots, layers].
        slopes: The layers' losses.
    """

    dropped: np.ndarray
    losses: np.ndarray
    shares: np.ndarray
    slopes: tuple[Slope, ...]

    def most(self, loss: float) -> float:
        """Return the most that can be dropped at a total loss.

        Args:
            loss: The loss, 0 or more.
        """
        last = int(np.searchsorted(self.losses, loss, side="right")) - 1  # the farthest of equal losses
        if last + 1 >= len(self.losses):
            return float(self.dropped[-1])
        run, rise = self.dropped[last + 1] - self.dropped[last], self.losses[last + 1] - self.losses[last]
        return float(self.dropped[last] + run * (loss - self.losses[last]) / rise)

    def strengths(self, dropped: float) -> np.ndarray:
        """Return each layer's strength where so much is dropped in all.

        Args:
            dropped: Between 0 and the last knot.
        """
        own = [np.interp(dropped, self.dropped, column) for column in self.shares.T]
        return np.array([np.interp(x, s.dropped, s.strengths) for x, s in zip(own, self.slopes, strict=True)])


def allocate(slopes: Sequence[Slope]) -> Allocation:
    """Return the path of best allocations: the cheapest piece of any layer next, until all are used.

    On convex losses that add up over layers each point of the path drops the most for its loss.

    Args:
        slopes: One for each layer, or group of layers.

    Source: Everett 1963, Generalized Lagrange multiplier method for solving problems of optimum allocation of
        resources: what is cheapest at one price for all layers is best for its total loss; Shoham and Gersho 1988,
        Efficient bit allocation for an arbitrary set of quantizers, for the walk along the hulls.
    """
    pieces = []
    for layer, slope in enumerate(slopes):
        runs, rises = np.diff(slope.dropped), np.diff(slope.losses)
        prices = np.maximum.accumulate(rises / runs) if len(runs) else runs  # in order, whatever rounding did
        pieces += [(price, layer, run, rise) for price, run, rise in zip(prices, runs, rises, strict=True)]
    pieces.sort(key=lambda piece: piece[0])  # stable: a layer's own pieces stay in order
    steps = np.zeros((len(pieces) + 1, len(slopes)))
    for row, (_, layer, run, _) in enumerate(pieces, start=1):
        steps[row, layer] = run
    shares = steps.cumsum(0)
    losses = np.cumsum([0.0, *(piece[3] for piece in pieces)])
    return Allocation(shares.sum(1), np.maximum.accumulate(losses), shares, tuple(slopes))


def path_of(allocation: Allocation, total: float, last: float, rows: int = ROWS) -> list[list[float]]:
    """Return strengths by layer at even steps of the predicted share dropped, from dense to the sparsest there is.

    What was not measured, from the last knots to the end of the rule's range, is one straight line in all layers.

    Args:
        allocation: The path.
        total: What could be dropped in all layers.
        last: The rule's sparsest strength.
        rows: Rows of the table.
    """
    end = float(allocation.dropped[-1])
    corner = allocation.strengths(end)
    table = []
    for t in np.linspace(0, 1, rows)[:-1]:
        beyond = (t * total - end) / (total - end) if t * total > end else 0.0
        table.append(allocation.strengths(min(t * total, end)) + beyond * (last - corner))
    return [[round(float(value), 5) for value in row] for row in [*table, np.full(len(corner), last)]]


def targets(crossings: Sequence[float]) -> list[float]:
    """Return at which sparsities layers are measured: from the uniform crossing up to nearly everything.

    A layer alone loses next to nothing below the crossing; what it loses above tells how steep it is.

    Args:
        crossings: Where the uniform rule crosses, one or several.
    """
    low, high = min(crossings), max(crossings)
    return [low, *(high + share * (1 - high) for share in (0.3, 0.6, 0.95))]


def strengths_at(sparsities: Sequence[float], measured: Sequence[tuple[float, float]]) -> list[float]:
    """Return strengths for sparsities, to three digits, from what other strengths gave.

    Args:
        sparsities: Wanted.
        measured: Sparsity and strength; the first is dense.
    """
    known = sorted(measured)
    places, values = ([row[column] for row in known] for column in (0, 1))
    found = [float(f"{np.interp(place, places, values):.3g}") for place in sparsities]
    return [value for value in dict.fromkeys(found) if value != measured[0][1] and math.isfinite(value)]
