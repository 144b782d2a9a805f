"""Amounts of a quality in words: points for shares, nats for likelihoods, and digits enough to be told from zero."""

from __future__ import annotations

import math
from collections.abc import Sequence

_MOST_DIGITS = 6
_UNITS = {
    "accuracy": " points",
    "agreement": " points",
    "nll": " nats per token",
    "loglikelihood": " nats",
    "score": "",
}


def unit(kind: str) -> str:
    """Return the unit of a difference, with its space.

    Args:
        kind: Kind of the quality.
    """
    return _UNITS[kind]


def amounts(values: Sequence[float], kind: str) -> list[str]:
    """Return several numbers of one quality with the same digits, so many that the first one is not shown as zero.

    Args:
        values: Numbers in the quality's own unit; the first one decides.
        kind: Kind of the quality; shares are turned into points.
    """
    shares = kind in ("accuracy", "agreement")
    scaled = [100 * value if shares else value for value in values]
    digits = 1 if shares else 3
    if scaled and math.isfinite(scaled[0]) and abs(scaled[0]) > 0:
        digits = max(digits, min(_MOST_DIGITS, -math.floor(math.log10(abs(scaled[0])))))
    # adding zero turns -0.0, which reads as a loss, into 0.0
    return [f"{round(value, digits) + 0.0:.{digits}f}" for value in scaled]


def amount(value: float, kind: str) -> str:
    """Return one number of a quality with its unit.

    Args:
        value: The number in the quality's own unit.
        kind: Kind of the quality.
    """
    return amounts([value], kind)[0] + unit(kind)
