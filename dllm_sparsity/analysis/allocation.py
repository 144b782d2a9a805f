"""Allocate sparsity to layers: from what each layer's own sparsity costs to a path of strengths, dense to sparsest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

ROWS = 33
_LEAST_STEP = 1e-6
_LEAST_ERROR = 1e-3
"""A point's error counts as at least this share of the largest loss: losses that agree by chance are not certain."""


@dataclass(frozen=True)
class Sensitivity:
    """What is lost when some layers alone are sparse, all others dense.

    Args:
        layers: The layers.
        strengths: What was measured, from denser to sparser; dense is not among them.
        sparsity: Sparsity of these layers at each strength.
        losses: Quality lost against dense on the same items.
        errors: Standard errors of the losses.
        total: Activations of these layers on those items.
        natural: Sparsity of these layers when dense.
    """

    layers: tuple[int, ...]
    strengths: tuple[float, ...]
    sparsity: tuple[float, ...]
    losses: tuple[float, ...]
    errors: tuple[float, ...]
    total: float
    natural: float = 0.0


@dataclass(frozen=True)
class Slope:
    """A convex loss over the activations dropped, in straight lines between its knots.

    Args:
        dropped: At the knots, from 0 on, ascending.
        losses: At the knots, from 0 on.
        strengths: At the knots, from dense on.
    """

    dropped: np.ndarray
    losses: np.ndarray
    strengths: np.ndarray


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


def slope_of(measured: Sensitivity, dense: float) -> Slope:
    """Return the convex, never falling loss that is nearest to what was measured, 0 at dense.

    It is a sum of hinges with slopes of 0 or more, fitted by least squares weighted with the errors. Losses that are
    convex come back as they are; of noisy ones it is the middle, where a lower hull would take the luckiest.

    Args:
        measured: The measurements.
        dense: The rule's dense strength.
    """
    places, chosen = [measured.natural], []
    for index in np.argsort(measured.sparsity, kind="stable"):
        if measured.sparsity[index] > places[-1] + _LEAST_STEP:
            places.append(measured.sparsity[index])
            chosen.append(int(index))
    place = np.array(places)
    losses, errors = (np.array([row[index] for index in chosen]) for row in (measured.losses, measured.errors))
    weights = 1 / np.maximum(errors, _LEAST_ERROR * max(float(np.abs(losses).max(initial=0)), 1e-12))
    hinges = np.maximum(place[1:, None] - place[None, :-1], 0)
    fitted = hinges @ _nonnegative(hinges * weights[:, None], losses * weights)
    return Slope(
        dropped=(place - place[0]) * measured.total,
        losses=np.concatenate([[0.0], fitted]),
        strengths=np.array([dense, *(measured.strengths[index] for index in chosen)]),
    )


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


def _nonnegative(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the least-squares solution without negative entries; of few columns each choice is tried."""
    columns = matrix.shape[1]
    best, least = np.zeros(columns), float(wanted @ wanted)
    for size in range(1, columns + 1):
        for chosen in combinations(range(columns), size):
            own = np.linalg.lstsq(matrix[:, chosen], wanted, rcond=None)[0]
            rest = wanted - matrix[:, chosen] @ own
            if (own >= 0).all() and rest @ rest < least - 1e-12 * abs(least):
                best, least = np.zeros(columns), float(rest @ rest)
                best[list(chosen)] = own
    return best


def targets(crossings: Sequence[float]) -> list[float]:
    """Return at which sparsities layers are measured: from below the uniform crossing up to nearly everything.

    Args:
        crossings: Where the uniform rule crosses, one or several.
    """
    low, high = min(crossings), max(crossings)
    beyond = [high + share * (1 - high) for share in (0.25, 0.5, 0.8)]
    return [0.6 * low, 0.5 * (low + high), *beyond]


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
