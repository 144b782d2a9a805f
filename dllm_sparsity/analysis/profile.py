"""The margin above a threshold, drawn over sparsity with its standard error: where it surely holds and surely fails."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from dllm_sparsity.analysis.spline import smooth

LEVEL = 0.95
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
_SURE = 3.0
_SHARES = np.linspace(0, 1, 25)[1:]
_REACH, _FARTHEST = 0.5, 0.02
_CHANGED = 2.0
"""Items lost and gained on top of those seen, in variance."""


@dataclass(frozen=True)
class Column:
    """What one strength gave, item by item; quality and sparsity are ratios of sums.

    Args:
        height: Numerator of the quality, its sign turned so that higher is better.
        weight: Its denominator.
        kept: Activations kept.
        total: Activations.
        group: Number of the group of each item; None where all stand alone.
    """

    height: np.ndarray
    weight: np.ndarray
    kept: np.ndarray
    total: np.ndarray
    group: np.ndarray | None = None

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
        return self.between(0, items)

    def between(self, start: int, stop: int) -> Column:
        """Return some items alone.

        Args:
            start: The first.
            stop: One behind the last.
        """
        return self.at(slice(start, stop))

    def at(self, places: Any) -> Column:
        """Return the items at some places.

        Args:
            places: A slice, or an array of numbers.
        """
        parts: dict[str, Any] = {name: None if own is None else own[places] for name, own in vars(self).items()}
        return Column(**parts)

    def joined(self, more: Column) -> Column:
        """Return these items and those after them.

        Args:
            more: The next items; they have groups where these have.
        """
        parts: dict[str, Any] = {
            name: None if own is None else np.concatenate([own, getattr(more, name)])
            for name, own in vars(self).items()
        }
        return Column(**parts)


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
        estimate: Sparsity at the first crossing; the end where there is none.
        low: Sparsity below the estimate up to which the margin is told from a miss.
        high: First sparsity that is a miss beyond doubt; the end where there is none.
        fails: Whether there is such a sparsity.
        sure: As `high`, at three standard errors; infinite where there is no such sparsity.
        crosses: Whether the margin falls below zero at all.
        within_reach: `low` and `high` as they would be, were there no gaps between the points.
        sparsity_error: Standard error of the sparsity itself at the crossing.
    """

    points: np.ndarray
    margins: np.ndarray
    errors: np.ndarray
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


class _Row(NamedTuple):
    """A point: sparsity, margin, each item's pull on both, further variance of the margin, number of items."""

    place: float
    margin: float
    noise: np.ndarray
    spread: np.ndarray
    extra: float
    items: int


def profile(dense: Column, sparse: Sequence[Column], threshold: Threshold, ended: bool = False) -> Profile:
    """Draw a smooth margin through points that share items, and read the interval off it.

    A point's margin is the paired difference to dense on the point's items, set on the dense margin of all items. The
    curve is a cubic smoothing spline with the covariance of the points as it was measured, so that strengths with few
    items, or with the same items, weigh what they should; how far it bends is weighed by the points' own evidence. Its
    error grows in the gaps between points. The interval inverts a test: a sparsity belongs to it unless the margin is
    told from zero, each side at half the error rate. Items of one group are counted together.

    Args:
        dense: The dense cell's items.
        sparse: The same items at each strength, or the first of them, in any order.
        threshold: What is asked.
        ended: Whether the last strength is the last there is, so that nothing lies beyond it.

    Source: Fieller 1954, Some problems in interval estimation, for the inversion; Liang and Zeger 1986, Longitudinal
        data analysis using generalized linear models, for groups; Agresti and Min 2005, for items lost and gained on
        top of bounded qualities, without which a few items that happen to agree look certain. The curve: `smooth`.
    """
    top = _pulls(dense, dense, threshold)
    rows = [_Row(top[0], top[1], top[2] / len(dense), top[3] / len(dense), 0.0, 0)]
    rows += sorted((_against(top, dense, column, threshold) for column in sparse), key=lambda row: row.place)
    place = np.maximum.accumulate([row.place for row in rows])
    margin = np.array([row.margin for row in rows])
    noise, spread = (_by_group(np.stack([row[part] for row in rows]), dense.group) for part in (2, 3))
    covariance = noise @ noise.T + np.diag([row.extra for row in rows])
    errors = np.sqrt(np.diag(covariance))
    mesh = _mesh(place, ended)
    value, error = smooth(place, margin, covariance, mesh)
    error[0] = 0.0
    most = max(row.items for row in rows)
    whole = [index for index, row in enumerate(rows) if row.items == most]
    estimate, crosses = _first(mesh, value)
    low, high, fails = _ends(mesh, value, error, estimate)
    sure, surely = _first(mesh, value + _SURE * error)
    return Profile(
        points=place,
        margins=margin,
        errors=errors,
        estimate=estimate,
        low=low,
        high=high,
        fails=fails,
        sure=sure if surely else math.inf,
        crosses=crosses,
        within_reach=_ends(mesh, value, np.minimum(error, np.interp(mesh, place[whole], errors[whole])), estimate)[:2],
        sparsity_error=float(np.linalg.norm(spread[int(np.abs(place - estimate).argmin())])),
    )


def _pulls(column: Column, dense: Column, threshold: Threshold) -> tuple[float, float, np.ndarray, np.ndarray]:
    """Return sparsity, margin, and each item's pull on the margin and on the sparsity."""
    share = 1.0 if threshold.logarithmic else threshold.retention
    top, pull = _ratio(dense.height, dense.weight)
    value, own = _ratio(column.height, column.weight)
    kept, spread = _ratio(column.kept, column.total)
    base = top + math.log(threshold.retention) if threshold.logarithmic else top * share
    return 1 - kept, value - base, own - share * pull, spread


def _against(
    top: tuple[float, float, np.ndarray, np.ndarray], dense: Column, column: Column, threshold: Threshold
) -> _Row:
    """Return the point of a strength: its difference to dense on its own items, and the dense margin of all."""
    few = len(column)
    first = dense.first(few)
    place, margin, own, spread = _pulls(column, first, threshold)
    _, there, base, _ = _pulls(first, first, threshold)
    pull = top[2] / len(dense)
    pull[:few] += (own - base) / few
    apart = 1.0 if first.group is None else few / len(np.unique(first.group))
    extra = _CHANGED * (apart / few) ** 2 if threshold.bounded else 0.0
    return _Row(place, margin - there + top[1], pull, np.pad(spread / few, (0, len(dense) - few)), extra, few)


def _by_group(pulls: np.ndarray, group: np.ndarray | None) -> np.ndarray:
    """Add up the pulls of items of one group."""
    return pulls if group is None else np.stack([np.bincount(group, own) for own in pulls])


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> tuple[float, np.ndarray]:
    """Return a ratio of sums and each item's pull on it."""
    mean = denominator.mean()
    value = float(numerator.mean() / mean)
    return value, (numerator - value * denominator) / mean


def _ends(mesh: np.ndarray, value: np.ndarray, error: np.ndarray, estimate: float) -> tuple[float, float, bool]:
    """Return the ends of the interval, and whether there is an upper one."""
    high, fails = _first(mesh, value + _Z * error)
    return min(_before(mesh, value - _Z * error, estimate), estimate), max(high, estimate), fails


def _mesh(place: np.ndarray, ended: bool) -> np.ndarray:
    """Return places between the points, and a little beyond the last."""
    ends = list(place)
    if not ended and len(place) > 1:
        ends.append(place[-1] + min(_REACH * (place[-1] - place[-2]), _FARTHEST))
    return np.concatenate([[ends[0]], *(start + _SHARES * (end - start) for start, end in pairwise(ends))])


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


def _before(mesh: np.ndarray, value: np.ndarray, place: float) -> float:
    """Return where a line falls below zero for the last time before a place."""
    end = int(np.searchsorted(mesh, place, side="right"))
    above = np.nonzero(value[:end] >= 0)[0]
    if not len(above):
        return float(mesh[0])
    index = int(above[-1])
    if index + 1 >= end:
        return float(mesh[index])
    share = value[index] / (value[index] - value[index + 1])
    return float(mesh[index] + share * (mesh[index + 1] - mesh[index]))
