"""The margins of a few strengths above a threshold: what was measured, and how their errors go together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dllm_sparsity.analysis.column import Column, Threshold

_CHANGED = 2.0
"""Items lost and gained on top of those seen, in variance."""
_PRIOR = 200.0
"""Items whose own variance weighs as much as that of all strengths together."""
_STRETCH = 4.0
"""Most that a variance is stretched by; what is missing beyond it is taken for noise of its own."""
_APART, _APART_BOUNDED = 0.1, 0.03
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
        items = np.array([row.items for row in self._rows])
        known = (items > 0) & (self._variance > 0) & (self.place > 0)
        if not known.any():
            return np.zeros((len(items), len(at))), np.zeros(len(at))
        each = np.log((self._variance * items)[known])
        each = np.exp(np.interp(np.log(np.maximum(at, self.place[known][0])), np.log(self.place[known]), each))
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
    top, none = _pulls(dense, dense, threshold), np.zeros(len(dense), bool)
    rows = [_Row(top.place, top.margin, top.margins / len(dense), top.places / len(dense), 0.0, none)]
    rows += sorted((_against(top, dense, column, threshold) for column in sparse), key=lambda row: row.place)
    noise, spread = (_by_group(np.stack([row[part] for row in rows]), dense.group) for part in (2, 3))
    place = np.maximum.accumulate([row.place for row in rows])
    variance = _pooled(place, noise, rows)
    own = (noise**2).sum(1)
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
    )


def _pulls(column: Column, dense: Column, threshold: Threshold) -> _Pulls:
    share = 1.0 if threshold.logarithmic else threshold.retention
    top, pull = _ratio(dense.height, dense.weight)
    value, own = _ratio(column.height, column.weight)
    kept, spread = _ratio(column.kept, column.total)
    base = top + math.log(threshold.retention) if threshold.logarithmic else top * share
    return _Pulls(1 - kept, value - base, own - share * pull, spread)


def _against(top: _Pulls, dense: Column, column: Column, threshold: Threshold) -> _Row:
    few, items = len(column), column.items
    same = dense.at(items)
    sparse, there = _pulls(column, same, threshold), _pulls(same, same, threshold)
    pull, spread, own = top.margins / len(dense), np.zeros(len(dense)), np.zeros(len(dense), bool)
    pull[items] += (sparse.margins - there.margins) / few
    spread[items], own[items] = sparse.places / few, True
    alone = few if same.group is None else len(np.unique(same.group))
    changed = _CHANGED / alone**2 if threshold.bounded else 0.0
    return _Row(sparse.place, sparse.margin - there.margin + top.margin, pull, spread, changed, own)


def _pooled(place: np.ndarray, noise: np.ndarray, rows: Sequence[_Row]) -> np.ndarray:
    """Return the variances of the margins, those of few items drawn to a line through all of them.

    A few items that lost little also vary little; weighed by their own variance they would count for too much.
    """
    variance, changed = (noise**2).sum(1), np.array([row.changed for row in rows])
    items = np.array([row.items for row in rows])
    noisy = (items > 0) & (variance + changed > 0) & (place > 0)
    if noisy.sum() < 2:
        return variance + changed
    few, at = items[noisy], np.log(place[noisy])
    fit = np.polynomial.Polynomial.fit(at, np.log((variance + changed)[noisy] * few), 1, w=np.sqrt(few))
    share = few / (few + _PRIOR)
    own = variance[noisy] + changed[noisy] * few / few.sum()
    pooled = variance.copy()
    pooled[noisy] = share * own + (1 - share) * np.exp(fit(at)) / few
    return pooled


def _by_group(pulls: np.ndarray, group: np.ndarray | None) -> np.ndarray:
    """Add up the pulls of items of one group."""
    return pulls if group is None else np.stack([np.bincount(group, own) for own in pulls])


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> tuple[float, np.ndarray]:
    """Return a ratio of sums and each item's pull on it."""
    mean = denominator.mean()
    value = float(numerator.mean() / mean)
    return value, (numerator - value * denominator) / mean
