"""The margins of a few strengths above a threshold: what was measured, and how their errors go together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from dllm_sparsity.analysis.column import Column, Threshold, ratio

_CHANGED = 1.0
"""Items lost and gained on top of those seen, in variance."""
_PRIOR, _PRIOR_BOUNDED = 200.0, 400.0
"""Items whose own variance weighs as much as that of all strengths together. Where answers are right or wrong, a
strength that lost few by luck also varies little, and would weigh too much."""
_HALFWAY = 0.5
"""How far variances go from what was seen to what another margin implies."""
_LEAST, _MOST = 0.5, 2.0
"""How much smaller or greater a variance may be at the threshold than where the margin is what it seems."""
_STEPS, _FARTHEST = 12, 30.0
"""Steps of the fit of variances, and how far from their mean it may go, in logarithms."""
_STRETCH = 4.0
"""Most that a variance is stretched by; what is missing beyond it is taken for noise of its own."""
_APART, _APART_BOUNDED = 0.05, 0.03
"""Share of a variance that is taken to go with no other: where errors are as alike as those of one item at near
strengths, their difference would be taken for certain. A right or wrong answer says less of its neighbours."""


class _Pulls(NamedTuple):
    """Sparsity, margin, and each item's pull on the margin and on the sparsity."""

    place: float
    margin: float
    margins: np.ndarray
    places: np.ndarray


class _Row(NamedTuple):
    """A point: sparsity, margin, each item's pull on both, variance for items that might have changed, its items."""

    place: float
    margin: float
    pull: np.ndarray
    spread: np.ndarray
    changed: float
    own: np.ndarray

    @property
    def items(self) -> int:
        return int(self.own.sum())


@dataclass(frozen=True)
class Margins:
    """Points of a curve.

    Args:
        place: Sparsity, ascending; the first is dense.
        margin: Quality less its threshold.
        covariance: Of the errors of the margins.
        spread: Standard error of the sparsity.
    """

    place: np.ndarray
    margin: np.ndarray
    covariance: np.ndarray
    spread: np.ndarray
    _rows: tuple[_Row, ...]
    _noise: np.ndarray
    _variance: np.ndarray
    _group: np.ndarray | None
    _uneven: float
    _threshold: Threshold

    def tested(self, at: np.ndarray, margin: np.ndarray) -> np.ndarray:
        """Return how many times as large a variance is if the margin is zero as where it is what it seems.

        Items that lose more vary more: an error as wide as what was seen makes a good margin look too good.

        Args:
            at: Sparsities.
            margin: The margin that was seen there.

        Source: Wilson 1927, Probable inference, the law of succession, and statistical inference: the variance of the
            hypothesis, which is that of items that change one way or the other plus those lost. Of log-likelihoods it
            is taken to grow as the loss does.
        """
        each = self._each(at)
        if each is None or not (self._threshold.bounded or self._threshold.logarithmic):
            return np.ones_like(at)
        if self._threshold.bounded:
            times = 1 + self._uneven * margin / each
        else:
            lost = -math.log(self._threshold.retention)
            times = lost / np.maximum(lost - margin, lost / _MOST)
        return np.maximum(times, _LEAST)

    def supposed(self, truth: np.ndarray) -> Margins:
        """Return the points with greater variances where other margins imply them: halfway from what was seen.

        Where answers are right or wrong, a strength that lost few items by luck also varies little, and would draw a
        curve to itself.

        Args:
            truth: Margins that the points may have in truth.

        Source: Wedderburn 1974, Quasi-likelihood functions, generalized linear models, and the Gauss-Newton method:
            variances that follow the curve, not the points. Differs: what the change of items owes to gains is left as
            it is, and so are points that came out low, or a curve that starts low would stay there.
        """
        items = np.array([row.items for row in self._rows])
        known = (items > 0) & (self._variance > 0)
        if not (self._threshold.bounded and known.any()):
            return self
        each = np.where(known, self._variance * items, 1.0)
        losses = np.clip(self._uneven * (self.margin[0] - truth) / each, 0.0, 1.0)
        more = self._uneven * np.maximum(self.margin - truth, 0.0) / each
        times = np.where(known, 1 + _HALFWAY * losses * more, 1.0)
        root = np.sqrt(times)
        return replace(self, covariance=self.covariance * np.outer(root, root), _variance=self._variance * times)

    def _each(self, at: np.ndarray) -> np.ndarray | None:
        """Return the variance that one item is likely to have at some sparsities; None where nothing varies."""
        items = np.array([row.items for row in self._rows])
        known = (items > 0) & (self._variance > 0) & (self.place > 0)
        if not known.any():
            return None
        each = np.log((self._variance * items)[known])
        return np.exp(np.interp(np.log(np.maximum(at, self.place[known][0])), np.log(self.place[known]), each))

    def another(self, at: np.ndarray, block: range) -> tuple[np.ndarray, np.ndarray]:
        """Return what one more point is likely to be like: its covariance with all points, and its variance.

        An item that was measured at other strengths is taken to give what lies between them, so that it tells little
        new.

        Args:
            at: Sparsities, each of one such point.
            block: Items it would be measured on.

        Returns:
            Arrays of (points, places) and (places,).
        """
        each = self._each(at)
        if each is None:
            return np.zeros((len(self._rows), len(at))), np.zeros(len(at))
        items = np.array([row.items for row in self._rows])
        within = slice(block.start, block.stop)
        seen = [number for number, row in enumerate(self._rows) if row.own[block.start]]
        ends = np.array([0.0, *self.place[seen]])
        pulls = np.stack([np.zeros(len(block)), *(self._rows[n].pull[within] * items[n] for n in seen)]) / len(block)
        right = np.minimum(np.maximum(np.searchsorted(ends, at), 1), len(ends) - 1)
        left = np.maximum(right - 1, 0)
        share = np.clip((at - ends[left]) / np.maximum(ends[right] - ends[left], 1e-9), 0, 1)[:, None]
        between = (1 - share) * pulls[left] + share * pulls[right]
        if self._group is None:
            cross = self._noise[:, within] @ between.T
        else:
            between = np.stack([np.bincount(self._group[within], own, self._noise.shape[1]) for own in between])
            cross = self._noise @ between.T
        return cross, np.maximum(each / len(block), (between**2).sum(1))


def margins(dense: Column, sparse: Sequence[Column], threshold: Threshold) -> Margins:
    """Return the margin of each strength: the paired difference to dense on its items, on the dense margin of all.

    Args:
        dense: The dense model's items, none left out.
        sparse: Some of the same items at each strength, in any order.
        threshold: What is asked.

    Source: Liang and Zeger 1986, Longitudinal data analysis using generalized linear models, for groups, whose items
        are counted together; Agresti and Min 2005, for items lost and gained on top of bounded qualities, without which
        a few items that happen to agree look certain.
    """
    top, none, uneven = _pulls(dense, dense, threshold), np.zeros(len(dense), bool), _unevenness(dense)
    rows = [_Row(top.place, top.margin, top.margins / len(dense), top.places / len(dense), 0.0, none)]
    rows += sorted((_against(top, dense, column, threshold, uneven) for column in sparse), key=lambda row: row.place)
    alone = (np.stack([row.pull for row in rows]) ** 2).sum(1)
    noise, spread = (_by_group(np.stack([row[part] for row in rows]), dense.group) for part in (2, 3))
    place = np.maximum.accumulate([row.place for row in rows])
    own = (noise**2).sum(1)
    variance = _pooled(place, alone, rows, _PRIOR_BOUNDED if threshold.bounded else _PRIOR)
    variance *= np.maximum(own / np.where(alone > 0, alone, 1.0), 1.0)  # of few items hardly two belong together
    noise = noise * np.sqrt(np.minimum(variance / np.where(own > 0, own, 1.0), _STRETCH))[:, None]
    covariance = noise @ noise.T
    covariance += np.diag(np.maximum(variance - np.diag(covariance), 0.0))
    covariance += (_APART_BOUNDED if threshold.bounded else _APART) * np.diag(np.diag(covariance))
    return Margins(
        place=place,
        margin=np.array([row.margin for row in rows]),
        covariance=covariance,
        spread=np.linalg.norm(spread, axis=1),
        _rows=tuple(rows),
        _noise=noise,
        _variance=variance,
        _group=dense.group,
        _uneven=uneven,
        _threshold=threshold,
    )


def level_of(column: Column) -> tuple[float, float, float]:
    """Return the quality that a column gives, and the ends of its 95 % interval.

    Args:
        column: The column.
    """
    value, pull = ratio(column.height, column.weight, column.stratum)
    error = float(np.linalg.norm(_by_group(pull[None] / len(column), column.group)))
    wide = NormalDist().inv_cdf(0.975) * error
    return value, value - wide, value + wide


def _unevenness(dense: Column) -> float:
    """Return how many times as much one item's change tells, in variance, as if all items weighed the same."""
    if dense.stratum is None:
        return 1.0
    counts = np.bincount(dense.stratum)
    return float((len(dense) / counts).sum() / len(counts) ** 2)


def _pulls(column: Column, dense: Column, threshold: Threshold) -> _Pulls:
    share = 1.0 if threshold.logarithmic else threshold.retention
    top, pull = ratio(dense.height, dense.weight, dense.stratum)
    value, own = ratio(column.height, column.weight, column.stratum)
    kept, spread = ratio(column.kept, column.total, column.stratum)
    base = top + math.log(threshold.retention) if threshold.logarithmic else top * share
    return _Pulls(1 - kept, value - base, own - share * pull, spread)


def _against(top: _Pulls, dense: Column, column: Column, threshold: Threshold, uneven: float) -> _Row:
    few, items = len(column), column.items
    same = dense.at(items)
    sparse, there = _pulls(column, same, threshold), _pulls(same, same, threshold)
    pull, spread, own = top.margins / len(dense), np.zeros(len(dense)), np.zeros(len(dense), bool)
    pull[items] += (sparse.margins - there.margins) / few
    spread[items], own[items] = sparse.places / few, True
    alone = few if same.group is None else len(np.unique(same.group))
    changed = _CHANGED * uneven / alone**2 if threshold.bounded else 0.0
    return _Row(sparse.place, sparse.margin - there.margin + top.margin, pull, spread, changed, own)


def _pooled(place: np.ndarray, variance: np.ndarray, rows: Sequence[_Row], prior: float) -> np.ndarray:
    """Return the variances of the margins, those of few items drawn to a line through all of them.

    A few items that lost little also vary little; weighed by their own variance they would count for too much.

    Args:
        place: Sparsities.
        variance: Of the margins, as if no items belonged together.
        rows: The points.
        prior: Items whose own variance weighs as much as the line.
    """
    changed = np.array([row.changed for row in rows])
    items = np.array([row.items for row in rows])
    noisy = (items > 0) & (variance + changed > 0) & (place > 0)
    if noisy.sum() < 2 or not variance[noisy].any():
        return variance + changed
    few = items[noisy]
    line = _line(np.log(place[noisy]), variance[noisy] * few, few)
    share = few / (few + prior)
    own = variance[noisy] + changed[noisy] * few / few.sum()
    pooled = variance.copy()
    pooled[noisy] = share * own + (1 - share) * line / few
    return pooled


def _line(at: np.ndarray, variance: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Return variances of an item as a smooth function of the logarithm of sparsity.

    Source: Nelder and Wedderburn 1972, Generalized linear models: gamma errors and a logarithmic link, for which a
        variance of a few items may be zero.
    """
    powers = (at - at.mean())[:, None] ** np.arange(3 if len(at) > 4 else 2)
    found = np.zeros(powers.shape[1])
    found[0] = math.log(np.average(variance, weights=items))
    middle, weighted = found[0], powers * items[:, None]
    curvature = weighted.T @ powers + np.diag([0.0, 1.0, 1.0][: len(found)])
    for _ in range(_STEPS):
        level = np.exp(np.clip(powers @ found, middle - _FARTHEST, middle + _FARTHEST))
        found = found + np.linalg.solve(curvature, weighted.T @ np.clip(variance / level - 1, -1.0, 3.0))
    return np.exp(np.clip(powers @ found, middle - _FARTHEST, middle + _FARTHEST))


def _by_group(pulls: np.ndarray, group: np.ndarray | None) -> np.ndarray:
    """Add up the pulls of items of one group."""
    return pulls if group is None else np.stack([np.bincount(group, own) for own in pulls])
