"""A smooth curve through a few points that were measured with errors, and how sure it is anywhere between them."""

from __future__ import annotations

import numpy as np

_BENDS = np.geomspace(10.0, 3000.0, 8)
"""How strongly a curve may bend, in the height of its first point; each is weighed by how well it fits the points."""
_LEAST = 1e-4
"""Smallest error of a point, in the same unit: keeps points without noise apart."""


def smooth(
    place: np.ndarray, height: np.ndarray, covariance: np.ndarray, mesh: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return a cubic smoothing spline and its standard error, averaged over how far the curve bends.

    Args:
        place: Where the points are, ascending from the first, which sets the scale.
        height: What was measured there.
        covariance: Of the errors of what was measured.
        mesh: Where the curve is wanted.

    Source: Wahba 1978, Improper priors, spline smoothing and the problem of guarding against model errors in
        regression; Nychka 1988, Bayesian confidence intervals for smoothing splines. Differs: the bend is averaged over
        a range with its restricted likelihood, not chosen, for a few points do not tell it.
    """
    scale = max(abs(float(height[0])), 1e-9)
    noise = covariance + np.eye(len(place)) * (_LEAST * scale) ** 2
    trend, ahead = (np.stack([np.ones_like(at), at], axis=1) for at in (place, mesh))
    among, across = _bend(place, place), _bend(place, mesh)
    bends = (_BENDS * scale)[:, None, None] ** 2
    whole = noise + bends * among
    inverse = np.linalg.inv(whole)
    information = trend.T @ inverse @ trend
    unsure = np.linalg.inv(information)
    line = unsure @ (trend.T @ (inverse @ height)[..., None])
    rest = height[:, None] - trend @ line
    pulled = bends * (inverse @ across)
    lack = ahead - pulled.swapaxes(1, 2) @ trend
    evidence = -(_log(whole) + _log(information) + (rest * (inverse @ rest)).sum((1, 2))) / 2
    means = (ahead @ line + pulled.swapaxes(1, 2) @ rest)[..., 0]
    variances = bends[..., 0] * (mesh**3 / 3 - (across * pulled).sum(1)) + ((lack @ unsure) * lack).sum(2)
    weights = np.exp(evidence - evidence.max())
    weights /= weights.sum()
    value = weights @ means
    return value, np.sqrt(weights @ (np.maximum(variances, 0) + (means - value) ** 2))


def _log(matrices: np.ndarray) -> np.ndarray:
    return np.linalg.slogdet(matrices)[1]


def _bend(here: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Return the covariance of a random curve whose slope is a random walk from zero on."""
    short, far = np.minimum(here[:, None], there), np.maximum(here[:, None], there)
    return short**2 * (3 * far - short) / 6
