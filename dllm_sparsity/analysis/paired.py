"""Test cells against one reference, item by item: difference, interval, p-value and what could have been detected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dllm_sparsity.analysis.statistics import (
    DRAWS,
    SEED,
    SIGNIFICANCE,
    Ratio,
    mcnemar_exact,
    paired_error,
    percentile_interval,
    resampled_sums,
    smallest_detectable,
    smallest_detectable_by_mcnemar,
    t_test,
)

_EXACT = "exact McNemar"


@dataclass(frozen=True)
class PairedTest:
    """One cell against its reference over the same items.

    Args:
        difference: The cell less its reference, in the quality's unit.
        interval: 95 % paired bootstrap interval, over whole groups where items have them.
        standard_error: Linearised, clustered where items have groups.
        p: Two-sided p-value of no difference; NaN where there are fewer than two items or groups.
        test: Which test gave it.
        spread: Bootstrap standard error of the difference.
        items: Number of items.
        groups: Number of groups; None where items are independent.
        changed: Items whose value differs.
    """

    difference: float
    interval: tuple[float, float]
    standard_error: float
    p: float
    test: str
    spread: float
    items: int
    groups: int | None
    changed: int

    def smallest_detectable(self, comparisons: int = 1) -> float | None:
        """Return the smallest true difference that is found with 80 % power, by the spread of this very difference.

        Among several comparisons it is found at the first and strictest step of Holm's correction;
        and it is no less than an exact McNemar test needs where that is the test.

        Args:
            comparisons: How many tests share the 5 %.

        Returns:
            The difference; None where there is no spread to go by.
        """
        level = 1 - SIGNIFICANCE / comparisons
        by_spread = self.changed > 0 and math.isfinite(self.spread)
        least = smallest_detectable(self.spread, level=level) if by_spread else None
        if self.test != _EXACT:
            return least
        bound = smallest_detectable_by_mcnemar(self.items, level=level)
        return None if bound is None else max(bound, least or 0.0)


def paired_tests(
    reference: Ratio,
    others: Sequence[Ratio],
    groups: np.ndarray | None = None,
    draws: int = DRAWS,
    seed: int = SEED,
) -> list[PairedTest]:
    """Test each of several conditions against a reference.

    Items that are right or wrong and stand alone get the exact McNemar test; everything else a t-test on the paired
    differences, with clustered errors and as many degrees of freedom as groups, less one, where items have groups.

    Args:
        reference: Numerators and denominators, one per item.
        others: The same for each condition, in the same order of items.
        groups: Number of the group that each item belongs to, from 0 without gaps; None where items are independent.
        draws: Bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        One test for each of `others`.
    """
    columns = np.column_stack([*reference, *(part for other in others for part in other)])
    sums = np.concatenate([columns.sum(0)[None], resampled_sums(columns, draws, seed, groups)])
    with np.errstate(invalid="ignore", divide="ignore"):
        measured = sums[:, 0::2] / sums[:, 1::2]
    return [
        _test(reference, other, groups, measured[:, column] - measured[:, 0])
        for column, other in enumerate(others, start=1)
    ]


def _test(reference: Ratio, other: Ratio, groups: np.ndarray | None, differences: np.ndarray) -> PairedTest:
    items = len(reference[0])
    count = items if groups is None else int(groups.max(initial=-1)) + 1
    difference, error = float(differences[0]), paired_error(other, reference, groups)
    changed = int(((reference[0] != other[0]) | (reference[1] != other[1])).sum())
    if groups is None and _right_or_wrong(reference, other):
        p = mcnemar_exact(int((reference[0] > other[0]).sum()), int((reference[0] < other[0]).sum()))
        test = _EXACT
    else:
        p = t_test(difference, error, count - 1) if changed else 1.0
        test = "paired t" if groups is None else "paired t, clustered"
    spread = float(np.nanstd(differences[1:])) if np.isfinite(differences[1:]).any() else math.nan
    return PairedTest(
        difference=difference,
        interval=percentile_interval(differences[1:]),
        standard_error=error,
        p=p,
        test=test,
        spread=spread,
        items=items,
        groups=None if groups is None else count,
        changed=changed,
    )


def _right_or_wrong(*ratios: Ratio) -> bool:
    return all(np.isin(top, (0.0, 1.0)).all() and (bottom == 1.0).all() for top, bottom in ratios)
