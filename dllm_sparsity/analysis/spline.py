"""A smooth curve through a few points that were measured with errors, and how sure it is anywhere between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import log_ndtr, ndtri_exp

_BENDS = np.geomspace(20.0, 5000.0, 6)
"""How strongly a curve may bend, in the height of its first point; each is weighed by how well it fits the points."""
_HASTES = (0.0, 0.5)
"""Powers with which the bend grows along the curve, weighed likewise; half as far as one, it is as `_BENDS` says."""
_SHARPS, _RARE = np.geomspace(10.0, 200.0, 3), 2.0
"""How much more a curve may bend behind a corner, and by how much, in logarithms, its evidence must be better: without
one, a long flat part says that a cliff behind it is a bend at once."""
_SLIGHT = 0.01
"""Weight, in that of the heaviest, below which a way to bend is left out: the wildest are so wide that they would count
though nothing speaks for them."""
_LEAST = 1e-4
"""Smallest error of a point, in the height of the first: keeps points without noise apart."""
_APART, _NONE = 1e-7, 1e-24
"""Smallest distance of two points, and variance of a curve that is told from none."""
EVERY = 4
"""One more point is asked about at each so many-th place of the mesh."""


@dataclass(frozen=True)
class Smooth:
    """A smooth curve, on a mesh: a mixture of those that each way to bend gives.

    Args:
        mesh: Where it is read.
        weight: Of each way, together 1.
        mean: The curve of each way, (ways, mesh).
        own: Its variance.
        scatter: The part of that which comes from the errors of the points; the rest is how it may bend between them.
        along: The covariance of each place with the next, (ways, mesh less one).
        gains: By how much the variance would fall with one more point, (mesh, places).
    """

    mesh: np.ndarray
    weight: np.ndarray
    mean: np.ndarray
    own: np.ndarray
    scatter: np.ndarray
    along: np.ndarray
    gains: np.ndarray

    @cached_property
    def value(self) -> np.ndarray:
        """Return the curve, averaged over the ways."""
        return self.weight @ self.mean

    @cached_property
    def error(self) -> np.ndarray:
        """Return its standard error."""
        return np.sqrt(self.weight @ (self.own + (self.mean - self.value) ** 2))

    @cached_property
    def noise(self) -> np.ndarray:
        """Return the part of it that comes from the errors of the points."""
        return np.sqrt(self.weight @ self.scatter)

    @cached_property
    def arc(self) -> np.ndarray:
        """Return how far each place is from the one before, as the angle whose cosine is their errors' correlation."""
        off = self.mean - self.value
        covariance = self.weight @ (self.along + off[:, :-1] * off[:, 1:])
        errors = np.maximum(self.error[:-1] * self.error[1:], _NONE)
        return np.concatenate([[0.0], np.arccos(np.clip(covariance / errors, -1.0, 1.0))])

    def score(self, times: np.ndarray | float = 1.0) -> np.ndarray:
        """Return how many standard errors of a normal the curve lies above zero with the chance that the ways give it.

        Where ways disagree, as before and behind a corner, the tail is theirs, not that of one normal as wide as all.

        Args:
            times: How many times as large the part from the errors of the points is taken to be.
        """
        error = np.sqrt(np.maximum(self.own + self.scatter * (times - 1), _NONE))
        high, share = self.mean / error, np.log(self.weight)[:, None]
        above, below = (np.logaddexp.reduce(share + log_ndtr(side * high), axis=0) for side in (1, -1))
        return np.where(above < below, ndtri_exp(np.minimum(above, 0.0)), -ndtri_exp(np.minimum(below, 0.0)))

    def error_after(self, place: int) -> np.ndarray:
        """Return the standard error that one more point would leave.

        Args:
            place: Number of its place among those asked about.
        """
        return np.sqrt(np.maximum(self.error**2 - self.gains[:, place], 0.0))


def smooth(
    place: np.ndarray,
    height: np.ndarray,
    covariance: np.ndarray,
    mesh: np.ndarray,
    more: tuple[np.ndarray, np.ndarray] | None = None,
    corners: Sequence[float] = (),
) -> Smooth:
    """Return a cubic smoothing spline and its standard error, averaged over how far the curve bends and where.

    Args:
        place: Where the points are, ascending from the first, which sets the scale.
        height: What was measured there.
        covariance: Of the errors of what was measured.
        mesh: Where the curve is wanted.
        more: Of one more point at every `EVERY`-th place of the mesh: the covariance of its error with those of the
            points, (points, places), and its variance. None where nobody asks.
        corners: Places from one of which on the curve may bend much more than before, weighed likewise.

    Source: Wahba 1978, Improper priors, spline smoothing and the problem of guarding against model errors in
        regression; Nychka 1988, Bayesian confidence intervals for smoothing splines. Differs: the bend is averaged over
        a range with its restricted likelihood, not chosen, for a few points do not tell it; and it grows along the
        curve, as little is lost where little is dropped.
    """
    scale = max(abs(float(height[0])), 1e-9)
    place = place + _APART * np.arange(len(place))
    covariance = covariance + np.eye(len(place)) * (_LEAST * scale) ** 2
    trend, ahead = (np.stack([np.ones_like(at), at], axis=1) for at in (place, mesh))
    weights, way, bends, inverse, unsure = _ways(place, height, covariance, scale, corners)
    across = _walks(place[:, None], mesh, corners)[way]
    pulled = bends * (inverse @ across)
    lack = ahead - pulled.swapaxes(1, 2) @ trend
    drawn = pulled.swapaxes(1, 2) + lack @ unsure @ trend.T @ inverse  # from heights to the curve
    means = drawn @ height
    own = bends[..., 0] * (_walks(mesh, mesh, corners)[way] - (across * pulled).sum(1))
    own += ((lack @ unsure) * lack).sum(2)
    along = bends[..., 0] * (_walks(mesh[:-1], mesh[1:], corners)[way] - (across[..., :-1] * pulled[..., 1:]).sum(1))
    along += ((lack[:, :-1] @ unsure) * lack[:, 1:]).sum(2)
    gains = np.zeros((len(mesh), 0))
    if more is not None:
        at = mesh[::EVERY]
        there = bends * across[:, :, ::EVERY] + more[0]
        behind = inverse @ there
        short = ahead[::EVERY] - behind.swapaxes(1, 2) @ trend
        shared = bends * (_walks(mesh[:, None], at, corners)[way] - across.swapaxes(1, 2) @ behind)
        shared += lack @ unsure @ short.swapaxes(1, 2)
        left = bends[..., 0] * _walks(at, at, corners)[way] + more[1] - (there * behind).sum(1)
        left += ((short @ unsure) * short).sum(2)
        gains = np.tensordot(weights, shared**2 / np.maximum(left, covariance[0, 0])[:, None], 1)
    return Smooth(mesh, weights, means, np.maximum(own, 0.0), ((drawn @ covariance) * drawn).sum(2), along, gains)


def _ways(
    place: np.ndarray, height: np.ndarray, covariance: np.ndarray, scale: float, corners: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the ways in which the curve may bend, each weighed by its restricted likelihood.

    Returns:
        Weights, numbers among `_walks`, and factors of those, the inverse covariance of the points, and the covariance
        of the straight line below the bend: (ways, ...).
    """
    among = _walks(place[:, None], place, corners)
    way, bend = np.repeat(np.arange(len(among)), len(_BENDS)), np.tile((_BENDS * scale) ** 2, len(among))
    whole = covariance + bend[:, None, None] * among[way]
    inverse = np.linalg.inv(whole)
    trend = np.stack([np.ones_like(place), place], axis=1)
    information = trend.T @ inverse @ trend
    unsure = np.linalg.inv(information)
    rest = height[:, None] - trend @ (unsure @ (trend.T @ (inverse @ height)[..., None]))
    evidence = -(_log(whole) + _log(information) + (rest * (inverse @ rest)).sum((1, 2))) / 2
    evidence[way >= len(_HASTES)] -= _RARE
    weights = np.exp(evidence - evidence.max())
    kept = weights > _SLIGHT
    return weights[kept] / weights[kept].sum(), way[kept], bend[kept, None, None], inverse[kept], unsure[kept]


def _log(matrices: np.ndarray) -> np.ndarray:
    return np.linalg.slogdet(matrices)[1]


def _walks(here: np.ndarray, there: np.ndarray, corners: Sequence[float]) -> np.ndarray:
    """Return the covariance of a random curve whose slope is a random walk from zero on, at pairs of places.

    Returns:
        One for each of `_HASTES`, then for each corner one for each of `_SHARPS`.
    """
    walks = [_walk(here, there, haste) for haste in _HASTES]
    for corner in corners:
        behind = _walk(np.maximum(here - corner, 0.0), np.maximum(there - corner, 0.0), _HASTES[0])
        walks += [walks[0] + (sharp**2 - 1) * behind for sharp in _SHARPS]
    return np.stack(walks)


def _walk(here: np.ndarray, there: np.ndarray, haste: float) -> np.ndarray:
    near, twice = np.minimum(here, there), 2 * haste
    walk = here * there / (twice + 1) - (here + there) * near / (twice + 2) + near**2 / (twice + 3)
    return (2 * near) ** twice * near * walk
