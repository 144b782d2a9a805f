"""Numbers as the report prints them: percent with one digit, intervals in brackets, a dash for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dllm_sparsity.analysis.amounts import amount

NOTHING = "\N{EN DASH}"


def percent(value: float | None) -> str:
    """Return a share as percent.

    Args:
        value: The share, or None.
    """
    return NOTHING if value is None else f"{100 * value:.1f} %"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with a fixed count of digits.

    Args:
        value: The number, or None.
        digits: Digits behind the point.
    """
    return NOTHING if value is None else f"{value:.{digits}f}"


def quality(value: float | None, kind: str) -> str:
    """Return a quality: percent for shares, three digits for everything else.

    Args:
        value: The quality, or None.
        kind: Its kind.
    """
    return percent(value) if kind in ("accuracy", "agreement") else number(value)


def interval(ends: Sequence[float | None] | None, kind: str = "accuracy") -> str:
    """Return an interval in brackets.

    Args:
        ends: Its two ends, or None.
        kind: Kind of the quality; shares are printed as percent.
    """
    if ends is None or ends[0] is None or ends[1] is None:
        return ""
    shares = kind in ("accuracy", "agreement")
    low, high = (f"{100 * end:.1f}" if shares else f"{end:.3f}" for end in ends if end is not None)
    return f"[{low}, {high}]"


def p_value(value: float | None) -> str:
    """Return a p-value with three digits, or that it is smaller than these can show.

    Args:
        value: The p-value, or None.
    """
    return "<0.001" if value is not None and value < 0.0005 else number(value, 3)


def least(value: float | None, kind: str) -> str:
    """Return a smallest detectable difference: points for shares, the quality's own unit for everything else.

    Args:
        value: The difference, or None where there was no spread to go by.
        kind: Kind of the quality.
    """
    return NOTHING if value is None else amount(value, kind)


def critical(reading: dict[str, Any]) -> str:
    """Return a critical sparsity with its interval; `>=` where no measured point failed.

    Args:
        reading: An entry of a curve's `critical` in the summary.
    """
    if reading["value"] is None:
        return NOTHING
    sign = "\N{GREATER-THAN OR EQUAL TO} " if reading["censored"] else ""
    return f"{sign}{percent(reading['value'])} {interval(reading['interval'])}".strip()
