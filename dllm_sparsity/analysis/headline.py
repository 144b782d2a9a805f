"""The few rows a reader wants first: dense quality, critical sparsity at each retention asked, tokens per forward."""

from __future__ import annotations

from typing import Any

_NAMES = ("task", "site", "rule", "paradigm", "model", "quality", "kind", "items")


def headline(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row per task, site, rule, model and retention asked for, the two paradigms next to each other.

    The quality is the task's first; where dense accuracy cannot be told from chance, its likelihood stands in.

    Args:
        summary: What `summary(run)` returned.

    Returns:
        Rows with `task, site, rule, paradigm, model, quality, kind, items, dense, dense_interval, retention, critical,
        interval, censored, reason, tokens_per_forward`.
    """
    rows = []
    for curve in summary["curves"]:
        if not curve["headline"]:
            continue
        first = reading_of(curve, summary["default_reading"], summary["default_retention"])
        if first["reason"]:
            curve = _stand_in(summary, curve)
        for retention in summary.get("retentions_asked", [summary["default_retention"]]):
            reading = reading_of(curve, summary["default_reading"], retention)
            rows.append(
                {name: curve[name] for name in _NAMES}
                | {
                    "dense": curve["dense"]["value"],
                    "dense_interval": curve["dense"]["interval"],
                    "retention": retention,
                    "critical": reading["value"],
                    "interval": reading["interval"],
                    "censored": reading["censored"],
                    "reason": first["reason"],
                    "tokens_per_forward": curve["tokens_per_forward"],
                }
            )
    return sorted(rows, key=lambda row: [row[name] for name in ("task", "site", "rule", "paradigm", "model")])


def _stand_in(summary: dict[str, Any], curve: dict[str, Any]) -> dict[str, Any]:
    """Return the likelihood curve of the same cells, or the curve itself where there is none."""
    same = ("task", "site", "rule", "paradigm", "model")
    others = (own for own in summary["curves"] if own["kind"] == "nll" and all(own[n] == curve[n] for n in same))
    return next(others, curve)


def reading_of(curve: dict[str, Any], reading: str, retention: float) -> dict[str, Any]:
    """Return one reading of a curve in a summary.

    Args:
        curve: An entry of the summary's curves.
        reading: Name of the reading.
        retention: Share of the dense quality.
    """
    found = (own for own in curve["critical"] if (own["reading"], own["retention"]) == (reading, retention))
    nothing = {"value": None, "interval": None, "censored": False, "reason": "nobody asked for this retention"}
    return next(found, {"reading": reading, "retention": retention, **nothing})
