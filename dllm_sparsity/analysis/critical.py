"""Critical sparsity: the highest sparsity that keeps a share of the dense quality, in four readings."""

from __future__ import annotations

import math

import numpy as np

RETENTIONS = (0.95, 0.98, 0.99, 0.995)
DEFAULT_RETENTION = 0.99
READINGS = ("grid_max", "first_crossing", "interpolated", "max_normalised")
DEFAULT_READING = "interpolated"
PAPER_GRID = (
    *(1.00, 0.995, 0.99, 0.985, 0.98, 0.975, 0.97, 0.96, 0.95, 0.94, 0.93, 0.92, 0.91, 0.90),
    *(0.85, 0.80, 0.75, 0.70, 0.65, 0.60, 0.50, 0.40, 0.30, 0.20, 0.10, 0.00),
)
"""The 26 values of top-p in arXiv:2509.00454, dense first."""
_SLACK = 1e-12


def readings(
    sparsity: np.ndarray, height: np.ndarray, retention: float, logarithmic: bool
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return all four readings of curves, and whether each is censored.

    grid_max: the highest sparsity of a measured point that passes. first_crossing: the last point before the first that
    fails, going up in sparsity. interpolated: between those two, where the straight line between them meets the
    threshold. max_normalised: grid_max with the threshold taken from the best point of the curve in the place of dense.
    A reading is censored when no measured point fails: the critical sparsity is then at least the value.

    Args:
        sparsity: Achieved sparsity, (..., points); the first point is dense.
        height: Quality with its sign turned so that higher is better, of the same shape.
        retention: Share of the reference to be kept, in (0, 1).
        logarithmic: Whether quality is a log-likelihood: the threshold is then reference + ln(retention).

    Returns:
        Values and censored flags, each (...), by the reading's name.

    Source: Szatkowski et al. 2025, arXiv:2509.00454, section 3, "the highest empirical sparsity level at which models
        still retain at least 99 % of their accuracy". Differs: the text leaves open which crossing is meant and how the
        reference is taken, so four readings are given; likelihoods are compared as differences in nats.
    """
    order = np.argsort(sparsity[..., 1:], axis=-1, kind="stable") + 1
    order = np.concatenate([np.zeros((*order.shape[:-1], 1), dtype=order.dtype), order], axis=-1)
    sparsity, height = (np.take_along_axis(values, order, axis=-1) for values in (sparsity, height))
    threshold = _threshold(height[..., :1], retention, logarithmic)
    fails = ~(height >= threshold - _SLACK)
    best = ~(height >= _threshold(height.max(-1, keepdims=True), retention, logarithmic) - _SLACK)
    values = {
        "grid_max": _grid_max(sparsity, fails),
        "first_crossing": _at(sparsity, _last_passing(fails)),
        "interpolated": _interpolated(sparsity, height, threshold[..., 0], fails),
        "max_normalised": _grid_max(sparsity, best),
    }
    none_fails = np.asarray(~fails.any(-1))
    censored = dict.fromkeys(READINGS, none_fails) | {"max_normalised": np.asarray(~best.any(-1))}
    return values, censored


def _threshold(reference: np.ndarray, retention: float, logarithmic: bool) -> np.ndarray:
    return reference + math.log(retention) if logarithmic else reference * retention


def _grid_max(sparsity: np.ndarray, fails: np.ndarray) -> np.ndarray:
    highest = np.where(fails, -np.inf, sparsity).max(-1)
    return np.where(np.isfinite(highest), highest, np.nan)


def _last_passing(fails: np.ndarray) -> np.ndarray:
    first = np.where(fails.any(-1), fails.argmax(-1), fails.shape[-1])
    return np.maximum(first - 1, 0)


def _at(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values, index[..., None], axis=-1)[..., 0]


def _interpolated(sparsity: np.ndarray, height: np.ndarray, threshold: np.ndarray, fails: np.ndarray) -> np.ndarray:
    last = _last_passing(fails)
    following = np.minimum(last + 1, fails.shape[-1] - 1)
    above, below = _at(height, last), _at(height, following)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(above > below, (above - threshold) / (above - below), 0.0)
    share = np.where(np.isfinite(share), np.clip(share, 0.0, 1.0), 0.0)
    start, end = _at(sparsity, last), _at(sparsity, following)
    return np.where(_at(fails, following), start + share * (end - start), start)
