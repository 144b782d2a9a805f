"""How steeply each layer loses: a convex curve for each, drawn to what all share where its own points are noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

_POWERS = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
_MESH = np.linspace(0, 1, 65)
_ROUNDS = 12
_LEAST_ERROR = 1e-3
"""An error counts as at least this share of the largest loss: losses that agree by chance are not certain."""
_LEAST_SCALE = 0.01


@dataclass(frozen=True)
class Sensitivity:
    """What is lost when some layers alone are sparse, all others dense.

    Args:
        layers: The layers.
        strengths: What was measured, from denser to sparser; dense is not among them.
        sparsity: Sparsity of these layers at each strength.
        losses: Quality lost against dense on the same items.
        errors: Standard errors of the losses.
        total: Activations of these layers on those items.
        natural: Sparsity of these layers when dense.
        trail: Further strengths and the sparsity of these layers there, from searches of the whole model.
    """

    layers: tuple[int, ...]
    strengths: tuple[float, ...]
    sparsity: tuple[float, ...]
    losses: tuple[float, ...]
    errors: tuple[float, ...]
    total: float
    natural: float = 0.0
    trail: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Slope:
    """A convex loss over the activations dropped, in straight lines between its knots.

    Args:
        dropped: At the knots, from 0 on, ascending.
        losses: At the knots, from 0 on.
        strengths: At the knots, from dense on.
    """

    dropped: np.ndarray
    losses: np.ndarray
    strengths: np.ndarray


def slopes_of(measured: Sequence[Sensitivity], dense: float) -> list[Slope]:
    """Return each layer's convex, never falling loss, 0 at dense.

    All layers share a shape, and each has a scale of its own. Scales are drawn together, and each layer's points to its
    scaled shape, by as much of their spread as their errors explain: layers that noise alone tells apart come out
    alike, and points without errors stay where they are. Curves are sums of powers with no negative part.

    Args:
        measured: All layers, or groups of layers, at the same strengths.
        dense: The rule's dense strength.

    Source: DerSimonian and Laird 1986, Meta-analysis in clinical trials, for the spread beyond the errors; Efron and
        Morris 1975, Data analysis using Stein's estimator and its generalizations, for the shrinkage.
    """
    place = np.array([[(x - own.natural) / max(1 - own.natural, 1e-9) for x in own.sparsity] for own in measured])
    place = np.clip(place, 0, 1)
    losses = np.array([own.losses for own in measured])
    errors = np.array([own.errors for own in measured])
    errors = np.maximum(errors, max(_LEAST_ERROR * float(np.abs(losses).max(initial=0)), 1e-12))
    shape, scales = _common(place, losses, errors)
    common = _powers(place) @ shape
    scales = _drawn(scales, 1 / np.maximum((common**2 / errors**2).sum(1), 1e-300))
    expected = scales[:, None] * common
    points = expected + (losses - expected) * _own_share(losses - expected, expected, errors)
    spread = np.sqrt(errors**2 + (0.02 * expected) ** 2)
    return [
        _slope(own, dense, x, _fit(_powers(x) / e[:, None], y / e))
        for own, x, y, e in zip(measured, place, points, spread, strict=True)
    ]


def _powers(place: np.ndarray) -> np.ndarray:
    return place[..., None] ** _POWERS


def _common(place: np.ndarray, losses: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the shape that all layers share, and each layer's scale, 1 in the mean: least squares in turns."""
    scales, shape = np.ones(len(place)), np.zeros(len(_POWERS))
    matrix = _powers(place) / errors[..., None]
    for _ in range(_ROUNDS):
        scaled = scales[:, None, None] * matrix
        shape = _fit(scaled.reshape(-1, len(_POWERS)), (losses / errors).ravel())
        common = matrix @ shape
        power = (common**2).sum(1)
        if not power.all():
            return shape, np.ones(len(place))
        scales = np.maximum((common * losses / errors).sum(1) / power, 0)
        if not scales.any():
            return shape, np.ones(len(place))
        shape, scales = shape * scales.mean(), scales / scales.mean()
    return shape, scales


def _drawn(values: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """Return values drawn to their mean by the share of their spread that their errors explain."""
    weights = 1 / variances
    mean = float((weights * values).sum() / weights.sum())
    excess = float((weights * (values - mean) ** 2).sum()) - (len(values) - 1)
    free = float(weights.sum() - (weights**2).sum() / weights.sum())
    between = max(0.0, excess / free) if free > 0 else 0.0
    drawn = (values * between + mean * variances) / (between + variances)
    return np.maximum(drawn, _LEAST_SCALE * mean)


def _own_share(rest: np.ndarray, expected: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Return how far points are believed where they leave the common shape, relative to which they may stray."""
    known = len(rest) + 2
    strain = float((expected**2 / errors**2).sum())
    relative = max(0.0, float((rest**2 / errors**2).sum()) - (rest.size - known)) / strain if strain > 0 else 0.0
    own = relative * expected**2
    return own / (own + errors**2)


def _slope(own: Sensitivity, dense: float, place: np.ndarray, shape: np.ndarray) -> Slope:
    """Return a curve on a fine mesh up to the sparsest point measured, with the strengths that lead there."""
    known = sorted([*zip(own.strengths, place, strict=True), *_trail(own)], key=lambda row: abs(row[0] - dense))
    strengths = np.array([dense, *(row[0] for row in known)])
    reached = np.maximum.accumulate([0.0, *(row[1] for row in known)])
    mesh = _MESH * float(place.max(initial=0))
    kept = np.concatenate([[True], np.diff(mesh) > 1e-9])
    return Slope(
        dropped=(mesh * (1 - own.natural) * own.total)[kept],
        losses=(_powers(mesh) @ shape)[kept],
        strengths=np.interp(mesh, reached, strengths)[kept],
    )


def _trail(own: Sensitivity) -> list[tuple[float, float]]:
    """Return further strengths between those measured, as places."""
    most = max(own.sparsity, default=0.0)
    return [(at, max(0.0, x - own.natural) / max(1 - own.natural, 1e-9)) for at, x in own.trail if x <= most]


def _fit(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the least-squares solution without negative entries; of so few columns every choice is tried."""
    columns = matrix.shape[1]
    gram, target = matrix.T @ matrix, matrix.T @ wanted
    best, most = np.zeros(columns), 0.0
    for size in range(1, columns + 1):
        for chosen in map(list, combinations(range(columns), size)):
            own = np.linalg.lstsq(gram[np.ix_(chosen, chosen)], target[chosen], rcond=1e-12)[0]
            gained = 2 * own @ target[chosen] - own @ gram[np.ix_(chosen, chosen)] @ own
            if (own >= 0).all() and gained > most * (1 + 1e-12):
                best, most = np.zeros(columns), float(gained)
                best[chosen] = own
    return best
