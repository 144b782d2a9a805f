"""The margin above a threshold, drawn over sparsity with its standard error: where it surely holds and surely fails."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import numpy as np
from scipy.special import ndtr, ndtri

from dllm_sparsity.analysis.column import Column, Threshold
from dllm_sparsity.analysis.margins import Margins, margins
from dllm_sparsity.analysis.spline import EVERY, Smooth, smooth

LEVEL = 0.95
_Z, _EARLY = NormalDist().inv_cdf((1 + LEVEL) / 2), NormalDist().inv_cdf(LEVEL)
_BELOW = 1.83
"""Standard errors above the threshold at which a place right below the estimate holds. Fewer than 1.96, by simulation:
variances and bends are on the safe side, and the interval reaches back to earlier misses as well."""
_CROSSINGS = 0.8
"""Part of the crossings on the way that counts, by simulation: curves that fall short once often do so twice."""
_SURE = 3.0
"""Standard errors below the threshold of a miss that few items cannot fake."""
_SHARES = np.linspace(0, 1, 17)[1:]
_REACH, _FARTHEST = 0.5, 0.02
_HALF, _TAIL = 0.8, 1.7
"""Standard errors off the threshold at which a place counts half as unsure, and how fast it counts less: a logistic
curve with this slope is a normal one, nearly."""
_SEEN = 0.15
"""How far off an end of the interval a point may lie that tells of it, in widths."""
_CLEAR = 2.3
"""Standard errors below the threshold at which a margin is a clear miss."""
_KNEE = 12.0
"""From where on a margin is drawn near to the threshold, in dense margins."""
_TINY = 1e-15
"""Chances nearer to none or to one than this are taken for it."""
_LOST = 0.5
"""Share of the dense margin that is lost behind the edge of a cliff, rather than before it."""


@dataclass(frozen=True)
class Profile:
    """The margin of one curve.

    Args:
        points: Sparsity of the measured points, ascending; the first is dense.
        margins: Quality less its threshold at the points.
        errors: Standard errors of the margins.
        estimate: Sparsity at the first crossing; the end where there is none.
        low: Sparsity below the estimate up to which the margin is told from a miss.
        high: First sparsity at or before which there is a miss beyond doubt; the end where there is none.
        fails: Whether there is such a sparsity.
        sure: As `high`, at three standard errors; infinite where there is no such sparsity.
        crosses: Whether the margin falls below zero at all.
        curve: The smooth curve through the points, on the scale of `_curve`.
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
    curve: Smooth
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

    @property
    def unseen(self) -> float | None:
        """Return an end of the interval that no point lies near, so that only the smooth curve tells of it, or None."""
        near = _SEEN * (self.high - self.low)
        below, above = self.points[self.points <= self.estimate], self.points[self.points >= self.estimate]
        if len(above) and abs(self.points - self.high).min() > near:
            return self.high
        return self.low if below[-1] < self.low - near else None

    @property
    def beyond(self) -> float:
        """Return a place beyond the last point, where the margin is likely to be a clear miss."""
        run = self.points[-1] - self.points[-2]
        slope = (self.margins[-2] - self.margins[-1]) / run if run > 0 else 0.0
        short = self.margins[-1] + _CLEAR * self.errors[-1]
        step = short / slope if slope > 0 else run
        return float(self.points[-1] + np.clip(step, 0.25 * run, 2 * run))

    @property
    def candidates(self) -> np.ndarray:
        """Return sparsities at which one more point may be measured."""
        return self.curve.mesh[::EVERY]

    def doubt(self, place: int | None = None) -> float:
        """Return how much of the interval is not told from the threshold, in sparsity.

        A place counts the less, the surer it holds or fails, and stands no better than the worst before it: what lies
        behind a sure miss is of no interest.

        Args:
            place: Number of the candidate that is measured next; None for none.

        Source: Bect, Ginsbourger, Li, Picheny and Vazquez 2012, Sequential design of computer experiments for the
            estimation of a probability of failure. Differs: it is the first failure that is looked for, the curve is
            taken to stay where it is, and places a little off the threshold count nearly as much as those on it, for
            another point tells more of them.
        """
        error = np.maximum(self.curve.error if place is None else self.curve.error_after(place), 1e-12)
        off = abs(np.minimum.accumulate(self.curve.value / error))
        unsure = 1 / (1 + np.exp(np.minimum(_TAIL * (off - _HALF), 500)))
        mesh = self.curve.mesh
        return float(np.trapezoid(np.where((mesh >= self.low) & (mesh <= self.high), unsure, 0.0), mesh))


def profile(
    dense: Column,
    sparse: Sequence[Column],
    threshold: Threshold,
    ended: bool = False,
    block: range | None = None,
) -> Profile:
    """Draw a smooth margin through points that share items, and read the interval off it.

    The curve is a cubic smoothing spline with the covariance of the points as it was measured, so that strengths with
    few items, or with the same items, weigh what they should; how far it bends is weighed by the points' own evidence.
    Its error grows in the gaps between points. The interval inverts tests. Below the estimate, a sparsity next to it
    belongs to the interval unless the margin is told from zero; and so does all from the first place on that is not
    told from a miss at the whole error rate, for a curve may fall short early and come back. Above the estimate, the
    interval ends where a curve that holds so far would seldom have come out as low at any place up to there: a long
    stretch near the threshold has many chances to seem a miss. That leans on a bound, and uses the whole error rate. A
    place is told from a miss with the error that a miss would have, not with the one of what was seen; how far the
    curve may bend between points is the same for both. The chances are those of all ways in which the curve may bend.

    Args:
        dense: The dense cell's items, none left out.
        sparse: Some of the same items at each strength, in any order.
        threshold: What is asked.
        ended: Whether the last strength is the last there is, so that nothing lies beyond it.
        block: Items on which one more point may be measured; None where nobody asks what it would tell.

    Source: Fieller 1954, Some problems in interval estimation, for the inversion. The points: `margins`. The curve:
        `smooth`.
    """
    points = margins(dense, sparse, threshold)
    missing = points.supposed(np.minimum(points.margin, 0.0))
    first = smooth(points.place, points.margin, missing.covariance, points.place).value
    points, mesh = points.supposed(first), _mesh(points.place, ended)
    curve, margin = _curve(points, first, mesh, block)
    tested = curve.score(points.tested(mesh, margin))
    estimate, crosses = _first(mesh, curve.value)
    high, fails = _first(mesh, _above(curve, _anywhere(curve, tested), -_EARLY))
    early, _ = _first(mesh, _above(curve, tested, _EARLY))
    sure, surely = _first(mesh, _above(curve, curve.score(), -_SURE))
    return Profile(
        points=points.place,
        margins=points.margin,
        errors=np.sqrt(np.diag(points.covariance)),
        estimate=estimate,
        low=min(_before(mesh, _above(curve, tested, _BELOW), estimate), early, estimate),
        high=max(high, estimate),
        fails=fails,
        sure=sure if surely else math.inf,
        crosses=crosses,
        curve=curve,
        sparsity_error=float(points.spread[int(np.abs(points.place - estimate).argmin())]),
    )


def _curve(points: Margins, first: np.ndarray, mesh: np.ndarray, block: range | None) -> tuple[Smooth, np.ndarray]:
    """Return the smooth curve through points, margins far from the threshold drawn near, and its margins as they are.

    It crosses where it would anyway. A steep end would tell of a curve that bends much everywhere, which leaves the
    places between points unsure.

    Args:
        points: What was measured.
        first: A first curve, at the points.
        mesh: Where the curve is wanted.
        block: Items on which one more point may be measured; None where nobody asks what it would tell.

    Source: McCullagh and Nelder 1989, Generalized linear models, section 2.5, for the points on another scale: its
        slope is taken at a first curve, not at what was measured, whose noise would weigh points that came out low.
    """
    knee = _KNEE * max(abs(float(points.margin[0])), 1e-9)
    slope = 1 / np.hypot(1, first / knee)
    height = knee * np.arcsinh(first / knee) + slope * (points.margin - first)
    more = None
    if block is not None:
        cross, variance = points.another(mesh[::EVERY], block)
        there = np.interp(mesh[::EVERY], points.place, slope)
        more = cross * np.outer(slope, there), variance * there**2
    covariance = points.covariance * np.outer(slope, slope)
    curve = smooth(points.place, height, covariance, mesh, more, _corners(points))
    return curve, knee * np.sinh(curve.value / knee)


def _above(curve: Smooth, score: np.ndarray, errors: float) -> np.ndarray:
    """Return how high a curve lies above some standard errors, those it has by its score; dense holds by definition."""
    line = curve.error * (score - errors)
    line[0] = curve.value[0]
    return line


def _anywhere(curve: Smooth, score: np.ndarray) -> np.ndarray:
    """Return the scores of a curve, less sure where it might have come out as low at any place before.

    The chance of that is at most the one at the place itself and the number of times that errors are likely to fall so
    low on the way. A place that seems to lie above zero is taken to do so.

    Args:
        curve: The curve.
        score: How many standard errors it lies above zero.

    Source: Davies 1977, Hypothesis testing when a nuisance parameter is present only under the alternative: the bound.
        Andrews and Soares 2010, Inference for parameters defined by moment inequalities using generalized moment
        selection: places that surely hold tell nothing. Differs: they count the less, the surer they hold, and the
        times are not all counted.
    """
    held, missed = np.maximum(score, 0.0), np.minimum(score, 0.0)
    way = _CROSSINGS * np.cumsum(curve.arc * np.exp(-held * (held / 2 + _EARLY)))
    chance = ndtr(score) + way / (2 * math.pi) * np.exp(-(missed**2) / 2)
    return ndtri(np.clip(chance, _TINY, 1 - _TINY))


def _corners(points: Margins) -> list[float]:
    """Return where a cliff may begin: at the last point before half the dense margin is surely lost, or surely is not.

    The second lies behind what looks like a loss and comes back. A third is the last point before a sure miss, for much
    may be lost early, and nothing more for long.
    """
    part, errors = _LOST * points.margin[0], np.sqrt(np.diag(points.covariance))
    lost, missed = (points.margin + _Z * errors < least for least in (part, 0.0))
    if not lost.any():
        return []
    before = slice(1, max(int(lost.argmax()), 1))
    held = np.flatnonzero(points.margin[before] - errors[before] >= part)
    last = {before.stop - 1, int(held[-1]) + 1 if len(held) else 0}
    last |= {int(missed.argmax()) - 1} if missed.any() else set()
    return sorted(float(points.place[number]) for number in last)


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
