"""The margin above a threshold, drawn over sparsity with its standard error: where it surely holds and surely fails."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
_Row = tuple[float, float, np.ndarray, np.ndarray]
_SURE = 3.0
_SHARES = np.linspace(0, 1, 33)
_REACH, _FARTHEST = 0.5, 0.02


@dataclass(frozen=True)
class Column:
    """What one strength gave, item by item; quality and sparsity are ratios of sums.

    Args:
        height: Numerator of the quality, its sign turned so that higher is better.
        weight: Its denominator.
        kept: Activations kept.
        total: Activations.
    """

    height: np.ndarray
    weight: np.ndarray
    kept: np.ndarray
    total: np.ndarray

    def __len__(self) -> int:
        return len(self.height)

    @property
    def sparsity(self) -> float:
        """Return the share of activations that are zero."""
        return float(1 - self.kept.sum() / self.total.sum())

    def first(self, items: int) -> Column:
        """Return the first items alone.

        Args:
            items: How many.
        """
        return Column(*(getattr(self, name)[:items] for name in self.__dataclass_fields__))

    def joined(self, more: Column) -> Column:
        """Return these items and those after them.

        Args:
            more: The next items.
        """
        names = self.__dataclass_fields__
        return Column(*(np.concatenate([getattr(self, name), getattr(more, name)]) for name in names))


@dataclass(frozen=True)
class Threshold:
    """What is asked of the quality.

    Args:
        retention: Share of the dense quality to be kept.
        logarithmic: Whether quality is a log-likelihood: the threshold is then dense + ln(retention).
        bounded: Whether an item's quality is 0 or 1.
    """

    retention: float
    logarithmic: bool
    bounded: bool


@dataclass(frozen=True)
class Profile:
    """The margin of one curve.

    Args:
        points: Sparsity of the measured points, ascending; the first is dense.
        margins: Quality less its threshold at the points.
        errors: Standard errors of the margins.
        covered: Sparsity from where to where lines are drawn between neighbours, or a little beyond.
        estimate: Sparsity at the first crossing; the end where there is none.
        low: First sparsity that cannot be told from a miss.
        high: Sparsity from where on all is a miss beyond doubt; the end where there is none.
        fails: Whether there is such a sparsity.
        sure: As `high`, at three standard errors; infinite where there is no such sparsity.
        crosses: Whether the margin falls below zero at all.
        within_reach: `low` and `high` as they would be, were every strength measured on all items.
        sparsity_error: Standard error of the sparsity itself at the crossing.
    """

    points: np.ndarray
    margins: np.ndarray
    errors: np.ndarray
    covered: tuple[float, float]
    estimate: float
    low: float
    high: float
    fails: bool
    sure: float
    crosses: bool
    within_reach: tuple[float, float]
    sparsity_error: float

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the critical sparsity."""
        own = _Z * self.sparsity_error
        low = self.estimate - math.hypot(self.estimate - self.low, own)
        return max(0.0, low), min(1.0, self.estimate + math.hypot(self.high - self.estimate, own))

    @property
    def width(self) -> float:
        """Return the width of the interval."""
        return self.interval[1] - self.interval[0]


def profile(dense: Column, sparse: Sequence[Column], threshold: Threshold, ended: bool = False) -> Profile:
    """Draw the margin in straight lines between points that share all their items, and read the interval off it.

    The interval inverts a paired test: a sparsity belongs to it unless its margin is told from zero, each side at half
    the error rate. That takes no slope, so it holds where a curve is flat and where it falls over a cliff. A strength
    measured on the first items only is set beside the nearest one measured on all, by their paired difference.

    Args:
        dense: The dense cell's items.
        sparse: The same items at each strength, or the first of them, in any order; one at least has all.
        threshold: What is asked.
        ended: Whether the last strength is the last there is, so that nothing lies beyond it.

    Source: Fieller 1954, Some problems in interval estimation, for the inversion; Cochran 1977,
        Sampling Techniques, section 12.9, for the difference (double sampling); Agresti and Min 2005, for half a lost
        and half a gained item on top of bounded qualities, without which a few items that happen to agree look certain.
    """
    items = len(dense)
    rows = [_row(dense, dense, threshold)]
    whole = [_row(column, dense, threshold) for column in sparse if len(column) >= items]
    rows += whole + [_lifted(column, dense, sparse, threshold) for column in sparse if len(column) < items]
    rows = [rows[0], *sorted(rows[1:], key=lambda row: row[0])]
    place = np.maximum.accumulate([row[0] for row in rows])
    margin = np.array([row[1] for row in rows])
    noise, spread = np.stack([row[2] for row in rows]), np.stack([row[3] for row in rows])
    covariance = noise @ noise.T / items**2
    extra = 1 / items**2 if threshold.bounded else 0.0
    mix = _mix(place, ended)
    mesh, value = mix @ place, mix @ margin
    error = np.sqrt(np.maximum(np.einsum("mi,ij,mj->m", mix, covariance, mix), 0) + extra)
    error[mesh <= place[0]] = 0.0
    whole_places = np.array([row[0] for row in whole])
    nearest = np.abs(mesh[:, None] - whole_places).argmin(1)
    least = np.minimum(error, np.array([_error(row[2], items, extra) for row in whole])[nearest])
    estimate, crosses = _first(mesh, value)
    low, _ = _first(mesh, value - _Z * error)
    high, fails = _last(mesh, value + _Z * error)
    sure, surely = _last(mesh, value + _SURE * error)
    where = min(int(np.searchsorted(mesh, estimate)), len(mesh) - 1)
    return Profile(
        points=place,
        margins=margin,
        errors=np.sqrt(np.diag(covariance) + extra),
        covered=(float(mesh[len(_SHARES)]) if len(place) > 2 else float(place[0]), float(mesh[-1])),
        estimate=estimate,
        low=min(low, estimate),
        high=max(high, estimate),
        fails=fails,
        sure=sure if surely else math.inf,
        crosses=crosses,
        within_reach=(
            min(_first(mesh, value - _Z * least)[0], estimate),
            max(_last(mesh, value + _Z * least)[0], estimate),
        ),
        sparsity_error=float(np.sqrt(np.sum((mix[where] @ spread) ** 2)) / items),
    )


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> tuple[float, np.ndarray]:
    """Return a ratio of sums and each item's pull on it."""
    mean = denominator.mean()
    value = float(numerator.mean() / mean)
    return value, (numerator - value * denominator) / mean


def _row(column: Column, dense: Column, threshold: Threshold) -> _Row:
    """Return sparsity, margin, and each item's pull on the margin and on the sparsity."""
    share = 1.0 if threshold.logarithmic else threshold.retention
    top, pull = _ratio(dense.height, dense.weight)
    value, own = _ratio(column.height, column.weight)
    kept, spread = _ratio(column.kept, column.total)
    base = top + math.log(threshold.retention) if threshold.logarithmic else top * share
    return 1 - kept, value - base, own - share * pull, spread


def _lifted(column: Column, dense: Column, others: Sequence[Column], threshold: Threshold) -> _Row:
    """Return the row of a strength measured on the first items only: the nearest whole one's, and the difference."""
    items, few = len(dense), len(column)
    near = min((own for own in others if len(own) >= items), key=lambda own: abs(own.sparsity - column.sparsity))
    there, here = _row(near, dense, threshold), _row(near.first(few), dense.first(few), threshold)
    own = _row(column, dense.first(few), threshold)
    margin, sparsity = (
        _moved(base, (new - old) * items / few)
        for base, new, old in ((there[2], own[2], here[2]), (there[3], own[3], here[3]))
    )
    return there[0] + own[0] - here[0], there[1] + own[1] - here[1], margin, sparsity


def _moved(whole: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Add to the first items."""
    moved = whole.copy()
    moved[: len(first)] += first
    return moved


def _error(pull: np.ndarray, items: int, extra: float) -> float:
    return math.sqrt(float(pull @ pull) / items**2 + extra)


def _mix(place: np.ndarray, ended: bool) -> np.ndarray:
    """Return the mesh as mixtures of the points: between neighbours, and a little beyond the sparse ones."""
    corners = list(np.eye(len(place)))
    if len(place) > 2:
        first, last = place[2] - place[1], place[-1] - place[-2]
        below = min(_REACH * first, _FARTHEST, place[1] - place[0]) / max(first, 1e-12)
        above = min(_REACH * last, _FARTHEST) / max(last, 1e-12)
        corners.insert(1, corners[1] + below * (corners[1] - corners[2]))
        if not ended:
            corners.append(corners[-1] + above * (corners[-1] - corners[-2]))
    pieces = [(1 - _SHARES)[:, None] * start + _SHARES[:, None] * end for start, end in pairwise(corners)]
    return np.concatenate(pieces)


def _first(mesh: np.ndarray, value: np.ndarray) -> tuple[float, bool]:
    """Return where a line first falls below zero, and whether it does."""
    below = value < 0
    if not below.any():
        return float(mesh[-1]), False
    index = int(below.argmax())
    if index == 0:
        return float(mesh[0]), True
    drop = value[index - 1] - value[index]
    share = value[index - 1] / drop if drop > 0 else 0.0
    return float(mesh[index - 1] + share * (mesh[index] - mesh[index - 1])), True


def _last(mesh: np.ndarray, value: np.ndarray) -> tuple[float, bool]:
    """Return where a line falls below zero for good, and whether it does."""
    above = value >= 0
    if above[-1]:
        return float(mesh[-1]), False
    index = len(above) - 1 - int(above[::-1].argmax()) if above.any() else 0
    drop = value[index] - value[index + 1]
    share = value[index] / drop if drop > 0 else 0.0
    return float(mesh[index] + share * (mesh[index + 1] - mesh[index])), True
