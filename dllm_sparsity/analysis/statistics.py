"""The statistics of paired comparisons: bootstrap, clustered errors, t, exact McNemar, Holm, smallest difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

DRAWS = 2000
SEED = 20250900
SIGNIFICANCE = 0.05
_CHUNK_ELEMENTS = 4_000_000
_SMALLEST = 1e-300
_PRECISE = 1e-15
_LONGEST_FRACTION = 100_000
_HALVINGS = 60

Ratio = tuple[np.ndarray, np.ndarray]
"""Numerators and denominators, one per item; the value is the quotient of their sums."""


def resampled_sums(
    columns: np.ndarray, draws: int = DRAWS, seed: int = SEED, groups: np.ndarray | None = None
) -> np.ndarray:
    """Sum each column over items, or whole groups of items, drawn with replacement, once per draw.

    All columns of a draw use the same items, so any two of them are paired. Two calls with the same number of items,
    draws and seed draw the same item positions.

    Args:
        columns: One row per item.
        draws: Number of bootstrap samples.
        seed: Seed of the resampling.
        groups: Number of the group that each item belongs to, from 0 without gaps; None where items are independent.

    Returns:
        Array of draws by columns.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 6; for groups Davison and Hinkley 1997,
        Bootstrap Methods and their Application, section 3.8, strategy 1 (groups with replacement, whole).
    """
    columns = columns if groups is None else group_sums(columns, groups)
    items = len(columns)
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_ELEMENTS // max(1, items))
    sums = np.empty((draws, columns.shape[1]))
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        picks = rng.integers(0, items, size=(size, items)) + items * np.arange(size)[:, None]
        weights = np.bincount(picks.ravel(), minlength=size * items).reshape(size, items)
        sums[start : start + size] = weights.astype(np.float64) @ columns
    return sums


def group_sums(columns: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Sum rows by group.

    Args:
        columns: One row per item.
        groups: Number of the group that each item belongs to, from 0 without gaps.

    Returns:
        One row per group.
    """
    sums = np.zeros((int(groups.max(initial=-1)) + 1, columns.shape[1]))
    np.add.at(sums, groups, columns)
    return sums


def percentile_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of bootstrap values; NaN draws are left out.

    Args:
        values: One value per draw.
        level: Coverage.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return math.nan, math.nan
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    first: Ratio, second: Ratio, draws: int = DRAWS, seed: int = SEED, groups: np.ndarray | None = None
) -> tuple[float, float, float]:
    """Return the difference of two ratios over the same items, with its 95 % paired bootstrap interval.

    Args:
        first: Numerators and denominators, one per item.
        second: The same for the other condition, in the same order of items.
        draws: Number of bootstrap samples.
        seed: Seed of the resampling.
        groups: As for `resampled_sums`.

    Returns:
        `first - second`, and the interval's two ends.
    """
    columns = np.column_stack([*first, *second])
    totals, sums = columns.sum(0), resampled_sums(columns, draws, seed, groups)
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]
        value = totals[0] / totals[1] - totals[2] / totals[3]
    return float(value), *percentile_interval(drawn)


def paired_error(first: Ratio, second: Ratio, groups: np.ndarray | None = None) -> float:
    """Return the standard error of the difference of two ratios over the same items, clustered where groups are given.

    Of two means without groups it is the standard deviation of the paired differences over the root of their number.

    Args:
        first: Numerators and denominators, one per item.
        second: The same for the other condition, in the same order of items.
        groups: As for `resampled_sums`.

    Returns:
        The error, with the correction G / (G - 1) for G groups; NaN where there are fewer than two.

    Source: the linearised (sandwich) variance of a ratio, Cochran 1977, Sampling Techniques, section 6.4; sums over
        groups as in Liang and Zeger 1986, Longitudinal data analysis using generalized linear models.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        parts = [(top - top.sum() / bottom.sum() * bottom) / bottom.sum() for top, bottom in (first, second)]
    influence = (parts[0] - parts[1])[:, None]
    influence = influence if groups is None else group_sums(influence, groups)
    count = len(influence)
    return math.sqrt(float((influence**2).sum()) * count / (count - 1)) if count > 1 else math.nan


def t_test(difference: float, error: float, degrees: int) -> float:
    """Return the two-sided p-value of a difference with its standard error.

    Args:
        difference: The difference.
        error: Its standard error.
        degrees: Degrees of freedom: the number of items, or of groups, less one.

    Source: Student's t through the incomplete beta function, Abramowitz and Stegun 1964, 26.7.1 and 26.5.8.
    """
    if degrees < 1 or not (math.isfinite(difference) and math.isfinite(error)):
        return math.nan
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    square = (difference / error) ** 2
    return _incomplete_beta(degrees / (degrees + square), square / (degrees + square), degrees / 2, 0.5)


def _incomplete_beta(x: float, rest: float, a: float, b: float) -> float:
    """Return I_x(a, b); `rest` is 1 - x, given apart so that it keeps its digits."""
    if x <= 0 or rest <= 0:
        return float(x > 0)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(rest, x, b, a)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
    # the continued fraction 1 / (1 + d1 / (1 + d2 / ...)), from the front by Lentz's rule
    upper, lower, value = 1.0, 0.0, 1.0
    for term in range(_LONGEST_FRACTION):
        half = term // 2
        if term == 0:
            step = 1.0
        elif term % 2:
            step = -(a + half) * (a + b + half) * x / ((a + term - 1) * (a + term))
        else:
            step = half * (b - half) * x / ((a + term - 1) * (a + term))
        lower = 1 / (1 + step * lower or _SMALLEST)
        upper = (1 + step / upper) or _SMALLEST
        value *= upper * lower
        if abs(upper * lower - 1) < _PRECISE:
            break
    return min(1.0, math.exp(scale) / a * (value - 1))


def mcnemar_exact(lost: int, gained: int) -> float:
    """Return the exact two-sided McNemar p-value.

    Args:
        lost: Items right in the first condition only.
        gained: Items right in the second condition only.

    Source: McNemar 1947; the binomial form, P = 2 sum_{i <= min} C(n, i) / 2^n, at most 1.
    """
    discordant = lost + gained
    tail = sum(math.comb(discordant, i) for i in range(min(lost, gained) + 1))
    # as a fraction of integers: 2**-n underflows for large n
    return min(1.0, 2 * tail / 2**discordant) if discordant else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for the number of comparisons.

    Args:
        p_values: Raw p-values.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(scaled)) if len(order) else []
    return corrected.tolist()


def smallest_detectable(standard_error: float, power: float = 0.8, level: float = 0.95) -> float:
    """Return the smallest true difference that a two-sided test finds with the given power.

    Args:
        standard_error: Standard error of the paired difference.
        power: Chance of finding it.
        level: One minus the test's significance level.

    Source: the normal approximation, (z_{1 - alpha/2} + z_{power}) * standard error.
    """
    normal = NormalDist()
    return (normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(power)) * standard_error


def smallest_detectable_by_mcnemar(items: int, power: float = 0.8, level: float = 0.95) -> float | None:
    """Return the loss below which the exact McNemar test cannot have the given power, whatever the spread.

    Even if no item is gained, too few lost ones never reach significance: at 5 % it takes six. The spread of a handful
    of changed items knows nothing of this, so it must not promise less.

    Args:
        items: Number of items.
        power: Chance of finding it.
        level: One minus the test's significance level.

    Returns:
        The share of items that must be lost for that many to be lost with the given chance; None where there are too
        few items for any outcome to be significant.
    """
    fewest = next(count for count in range(1, 1100) if 2 * 0.5**count <= 1 - level)
    if items < fewest:
        return None
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        short = sum(math.comb(items, k) * middle**k * (1 - middle) ** (items - k) for k in range(fewest))
        low, high = (middle, high) if 1 - short < power else (low, middle)
    return high


def binomial_error(share: float, items: int) -> float:
    """Return the standard error of the share of right answers.

    Args:
        share: The true share.
        items: Number of items.
    """
    return math.sqrt(max(0.0, share * (1 - share)) / max(1, items))


def above_chance(accuracy: float, items: int, chance: float) -> bool:
    """Return whether an accuracy lies two binomial standard errors above chance.

    The error is that of guessing, or that of the accuracy, which is zero where all is right; whichever is larger.

    Args:
        accuracy: Share of right answers.
        items: Number of items.
        chance: Expected accuracy of guessing.
    """
    return accuracy - chance > 2 * max(binomial_error(chance, items), binomial_error(accuracy, items))
