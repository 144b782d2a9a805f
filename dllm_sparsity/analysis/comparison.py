"""Set the two paradigms beside each other: the difference of their critical sparsities, by task and site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dllm_sparsity.analysis.critical import RETENTIONS
from dllm_sparsity.analysis.curves import Curve
from dllm_sparsity.analysis.readings import Interval, Reading
from dllm_sparsity.analysis.statistics import percentile_interval, smallest_detectable


@dataclass(frozen=True)
class Comparison:
    """Diffusion less autoregressive, in points of critical sparsity.

    Args:
        autoregressive: The one curve.
        diffusion: The other.
        retention: Share of the dense quality kept.
        difference: Critical sparsity of diffusion less that of autoregressive, interpolated reading.
        interval: 95 % bootstrap interval; both curves are resampled over the same documents where they share them.
        paired: Whether they do; the answers of searches do not.
        bounded: Whether one of both curves never fell below the threshold, so that the difference is one-sided.
        smallest_detectable: Smallest true difference found with 80 % power, by the spread of the draws; None where
            bounded, for bounds spread less than what they bound.
    """

    autoregressive: Curve
    diffusion: Curve
    retention: float
    difference: float
    interval: Interval
    paired: bool
    bounded: bool
    smallest_detectable: float | None = None


def comparisons(curves: Sequence[Curve], retentions: Sequence[float] = RETENTIONS) -> list[Comparison]:
    """Return every pair of curves of the two paradigms that differ in nothing but the model.

    Args:
        curves: Curves of one run.
        retentions: Shares of the dense quality.
    """
    found = []
    for first, second in _twins(curves):
        same = first.keys == second.keys and _same(first.clusters, second.clusters)
        for retention in retentions:
            one, two = first.reading(retention=retention), second.reading(retention=retention)
            if one.value is None or two.value is None:
                continue
            paired = same and one.items is None and two.items is None  # answers of two searches share no draws
            draws, bounded = two.draws - _drawn(one, paired), one.censored or two.censored
            found.append(
                Comparison(
                    first,
                    second,
                    retention,
                    difference := two.value - one.value,
                    _holding(percentile_interval(draws), difference),
                    paired,
                    bounded,
                    None if bounded else smallest_detectable(float(np.nanstd(draws))),
                )
            )
    return found


def _holding(interval: Interval, value: float) -> Interval:
    """Return an interval that holds the estimate: draws that miss a crossing may all lie on one side of it."""
    return min(interval[0], value), max(interval[1], value)


def _same(one: np.ndarray | None, two: np.ndarray | None) -> bool:
    return one is two if one is None or two is None else np.array_equal(one, two)


def _drawn(reading: Reading, paired: bool) -> np.ndarray:
    # draws of one seed share their items; different items must not look paired, so the order is turned by one
    return reading.draws if paired else np.roll(reading.draws, 1)


def _twins(curves: Sequence[Curve]) -> Iterator[tuple[Curve, Curve]]:
    for first in curves:
        for second in curves:
            if (first.group.dense.record["paradigm"], second.group.dense.record["paradigm"]) == (
                "autoregressive",
                "diffusion",
            ) and _setting(first) == _setting(second):
                yield first, second


def _setting(curve: Curve) -> tuple[str, ...]:
    group, quality = curve.group, curve.quality
    return group.dense.record["task"], group.site, group.rule, quality["name"], quality["kind"]
