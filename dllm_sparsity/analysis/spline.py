"""A smooth curve through a few points that were measured with errors, and how sure it is anywhere between them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_BENDS = np.geomspace(20.0, 5000.0, 6)
"""How strongly a curve may bend, in the height of its first point; each is weighed by how well it fits the points."""
_HASTES = np.array([0.0, 0.5])
"""Powers with which the bend grows along the curve, weighed likewise; half as far as one, it is as `_BENDS` says."""
_SHARP, _RARE = 30.0, 6.0
"""How much more a curve may bend behind a corner, and by how much, in logarithms, its evidence must be better: without
one, a long flat part says that a cliff behind it is a bend at once."""
_LEAST = 1e-4
"""Smallest error of a point, in the height of the first: keeps points without noise apart."""
_APART = 1e-7
"""Smallest distance of two points."""
EVERY = 4
"""One more point is asked about at each so many-th place of the mesh."""


@dataclass(frozen=True)
class Smooth:
    """A smooth curve, on a mesh.

    Args:
        mesh: Where it is read.
        value: The curve there.
        error: Its standard error.
        noise: The part of it that comes from the errors of the points; the rest is how it may bend between them.
        gains: By how much the variance would fall with one more point, (mesh, places).
    """

    mesh: np.ndarray
    value: np.ndarray
    error: np.ndarray
    noise: np.ndarray
    gains: np.ndarray

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
    corner: float | None = None,
) -> Smooth:
    """Return a cubic smoothing spline and its standard error, averaged over how far the curve bends and where.

    Args:
        place: Where the points are, ascending from the first, which sets the scale.
        height: What was measured there.
        covariance: Of the errors of what was measured.
        mesh: Where the curve is wanted.
        more: Of one more point at every `EVERY`-th place of the mesh: the covariance of its error with those of the
            points, (points, places), and its variance. None where nobody asks.
        corner: From where on the curve may bend much more than before, weighed likewise; None for nowhere.

    Source: Wahba 1978, Improper priors, spline smoothing and the problem of guarding against model errors in
        regression; Nychka 1988, Bayesian confidence intervals for smoothing splines. Differs: the bend is averaged over
        a range with its restricted likelihood, not chosen, for a few points do not tell it; and it grows along the
        curve, as little is lost where little is dropped.
    """
    scale = max(abs(float(height[0])), 1e-9)
    place = place + _APART * np.arange(len(place))
    covariance = covariance + np.eye(len(place)) * (_LEAST * scale) ** 2
    trend, ahead = (np.stack([np.ones_like(at), at], axis=1) for at in (place, mesh))
    among, across = (_bend(place[:, None], at, corner) for at in (place, mesh))
    bends = (np.tile(_BENDS, len(among) // len(_BENDS)) * scale)[:, None, None] ** 2
    whole = covariance + bends * among
    inverse = np.linalg.inv(whole)
    information = trend.T @ inverse @ trend
    unsure = np.linalg.inv(information)
    line = unsure @ (trend.T @ (inverse @ height)[..., None])
    rest = height[:, None] - trend @ line
    pulled = bends * (inverse @ across)
    lack = ahead - pulled.swapaxes(1, 2) @ trend
    evidence = -(_log(whole) + _log(information) + (rest * (inverse @ rest)).sum((1, 2))) / 2
    evidence[len(_HASTES) * len(_BENDS) :] -= _RARE
    drawn = pulled.swapaxes(1, 2) + lack @ unsure @ trend.T @ inverse  # from heights to the curve
    means = drawn @ height
    own = bends[..., 0] * (_bend(mesh, mesh, corner) - (across * pulled).sum(1)) + ((lack @ unsure) * lack).sum(2)
    weights = np.exp(evidence - evidence.max())
    weights /= weights.sum()
    value = weights @ means
    noise = np.sqrt(weights @ ((drawn @ covariance) * drawn).sum(2))
    error = np.sqrt(weights @ (np.maximum(own, 0.0) + (means - value) ** 2))
    gains = np.zeros((len(mesh), 0))
    if more is not None:
        at = mesh[::EVERY]
        there = bends * across[:, :, ::EVERY] + more[0]
        behind = inverse @ there
        short = ahead[::EVERY] - behind.swapaxes(1, 2) @ trend
        shared = bends * (_bend(mesh[:, None], at, corner) - across.swapaxes(1, 2) @ behind)
        shared += lack @ unsure @ short.swapaxes(1, 2)
        left = bends[..., 0] * _bend(at, at, corner) + more[1] - (there * behind).sum(1)
        left += ((short @ unsure) * short).sum(2)
        gains = np.tensordot(weights, shared**2 / np.maximum(left, covariance[0, 0])[:, None], 1)
    return Smooth(mesh, value, error, noise, gains)


def _log(matrices: np.ndarray) -> np.ndarray:
    return np.linalg.slogdet(matrices)[1]


def _bend(here: np.ndarray, there: np.ndarray, corner: float | None) -> np.ndarray:
    """Return the covariance of a random curve whose slope is a random walk from zero on, at pairs of places.

    Returns:
        For each haste, and where there is a corner for a curve that bends much more from there on, one for each of
        `_BENDS`.
    """
    walks = _walks(here, there)
    if corner is not None:
        behind = _walks(np.maximum(here - corner, 0.0), np.maximum(there - corner, 0.0))
        walks = np.concatenate([walks, walks[:1] + (_SHARP**2 - 1) * behind[:1]])
    return np.repeat(walks, len(_BENDS), axis=0)


def _walks(here: np.ndarray, there: np.ndarray) -> np.ndarray:
    both, product, near = here + there, here * there, np.minimum(here, there)
    twice = 2 * _HASTES.reshape(-1, *[1] * near.ndim)
    walk = product / (twice + 1) - both * near / (twice + 2) + near**2 / (twice + 3)
    return (2 * near) ** twice * near * walk
