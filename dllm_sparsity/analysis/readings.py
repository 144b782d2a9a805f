"""Readings of a critical sparsity with their draws: of measured points, and of what a search answered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np

from dllm_sparsity.analysis import critical
from dllm_sparsity.analysis.loading import Cell
from dllm_sparsity.analysis.qualities import SCALES
from dllm_sparsity.analysis.statistics import percentile_interval
from dllm_sparsity.study.records import Quality

Interval = tuple[float, float]
TOO_FEW_POINTS = "a search measures too few points for this reading"
OTHER_RETENTION = "the search was not for this retention"


@dataclass(frozen=True)
class Reading:
    """One reading of critical sparsity at one retention; `value` is None where `reason` says why.

    `items` are those that a search's answer rests on; None where it is those of the curve.
    """

    reading: str
    retention: float
    value: float | None
    interval: Interval | None
    censored: bool
    reason: str | None
    draws: np.ndarray = field(repr=False, compare=False)
    items: int | None = None

    @property
    def told(self) -> dict[str, Any]:
        """Return what the summary holds of it."""
        names = ("retention", "reading", "value", "interval", "censored", "reason")
        told = {name: getattr(self, name) for name in names}
        return told if self.items is None else {**told, "items": self.items}


def no_reading(quality: Quality, dense: float, is_above: bool, count: str) -> str | None:
    """Return why there is no critical sparsity on a quality, or None where there is one.

    Args:
        quality: The quality.
        dense: The dense model's.
        is_above: Whether it lies two standard errors above chance; asked of accuracy alone.
        count: Number of items, in words.
    """
    if not math.isfinite(dense):
        return "the dense quality is not a number"
    if quality["kind"] == "accuracy" and not is_above:
        chance = quality["chance"] or 0.0
        return f"dense accuracy {dense:.1%} is not two standard errors above chance ({chance:.1%}, {count})"
    if not SCALES[quality["kind"]].logarithmic and dense <= 0:
        return f"the dense score is {dense:g}: a share of it means nothing"
    return None


def readings_of(
    sparsity: np.ndarray, height: np.ndarray, logarithmic: bool, reason: str | None, retentions: Sequence[float]
) -> list[Reading]:
    """Return all four readings of measured points at each retention.

    Args:
        sparsity: Achieved sparsity, (1 + draws, points): the estimate first; the first point is dense.
        height: Quality with its sign turned so that higher is better, of the same shape.
        logarithmic: Whether quality is a log-likelihood.
        reason: Why there is no critical sparsity on this quality, or None where there is one.
        retentions: Shares of the dense quality.
    """
    found = []
    for retention in retentions:
        values, censored = critical.readings(sparsity, height, retention, logarithmic)
        for name in critical.READINGS:
            value, draws = float(values[name][0]), values[name][1:]
            usable = reason is None and math.isfinite(value)
            why = None if usable else reason or "the achieved sparsity was not recorded"
            interval = percentile_interval(draws) if usable else None
            found.append(
                Reading(
                    name, retention, value if usable else None, interval, bool(censored[name][0]) and usable, why, draws
                )
            )
    return found


def with_answers(
    readings: Sequence[Reading],
    answers: Mapping[float, dict[str, Any]],
    reason: str | None,
    draws: int,
    rng: np.random.Generator,
) -> list[Reading]:
    """Put a search's answers in the place of the interpolated readings.

    Args:
        readings: Of the measured points.
        answers: What search.json holds, by retention.
        reason: Why there is no critical sparsity on this quality, or None where there is one.
        draws: How many draws of an answer to make, normal on each side so that they have its interval.
        rng: Where they come from.
    """
    kept = [own for own in readings if own.reading != critical.DEFAULT_READING or own.retention not in answers]
    for retention, own in answers.items():
        why = reason or own["reason"]
        value, interval = (None, None) if why else (own["value"], (own["interval"][0], own["interval"][1]))
        drawn = np.full(draws, math.nan)
        if value is not None and interval is not None:
            normal = rng.standard_normal(draws) / NormalDist().inv_cdf(0.975)
            drawn = value + np.where(normal < 0, normal * (value - interval[0]), normal * (interval[1] - value))
        censored = bool(own["censored"]) and value is not None
        kept.append(
            Reading(critical.DEFAULT_READING, retention, value, interval, censored, why, drawn, own.get("items"))
        )
    return kept


def rng_of(dense: Cell, seed: int) -> np.random.Generator:
    """Return where the draws of answers come from: of two models they must not rise and fall together.

    Args:
        dense: The dense cell that was searched from.
        seed: Seed of the resampling.
    """
    return np.random.default_rng([seed, *f"{dense.record['paradigm']}, {dense.record['model']}".encode()])
