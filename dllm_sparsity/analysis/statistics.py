"""The statistics of paired comparisons: bootstrap sums, exact McNemar, Holm, smallest detectable difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

DRAWS = 2000
SEED = 20250900
_CHUNK_ELEMENTS = 4_000_000


def resampled_sums(columns: np.ndarray, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """Sum each column over items drawn with replacement, once per draw.

    All columns of a draw use the same items, so any two of them are paired. Two calls with the same number of items,
    draws and seed draw the same item positions.

    Args:
        columns: One row per item.
        draws: Number of bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        Array of draws by columns.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 6.
    """
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
    first: tuple[np.ndarray, np.ndarray],
    second: tuple[np.ndarray, np.ndarray],
    draws: int = DRAWS,
    seed: int = SEED,
) -> tuple[float, float, float]:
    """Return the difference of two ratios over the same items, with its 95 % paired bootstrap interval.

    Args:
        first: Numerators and denominators, one per item.
        second: The same for the other condition, in the same order of items.
        draws: Number of bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        `first - second`, and the interval's two ends.
    """
    columns = np.column_stack([*first, *second])
    totals, sums = columns.sum(0), resampled_sums(columns, draws, seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]
        value = totals[0] / totals[1] - totals[2] / totals[3]
    return float(value), *percentile_interval(drawn)


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


def above_chance(accuracy: float, items: int, chance: float) -> bool:
    """Return whether an accuracy lies two binomial standard errors above chance.

    Args:
        accuracy: Share of right answers.
        items: Number of items.
        chance: Expected accuracy of guessing.
    """
    return accuracy - chance > 2 * math.sqrt(max(0.0, accuracy * (1 - accuracy)) / max(1, items))
