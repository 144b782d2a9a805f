"""The few rows a reader wants first: dense quality, critical sparsity at each retention asked, tokens per forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

_NAMES = ("task", "site", "rule", "paradigm", "model", "quality", "kind", "items")


def headline(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row per task, site, rule, model and retention asked for, the two paradigms next to each other.

    The averages over tasks come after the tasks.

    The quality is that of the search, else the task's first; where it has no critical sparsity, because dense accuracy
    cannot be told from chance, its likelihood stands in if that has one.

    Args:
        summary: What `summary(run)` returned.

    Returns:
        Rows with `task, site, rule, paradigm, model, quality, kind, items, dense, dense_interval, retention, critical,
        interval, censored, reason, stands_in_for, tokens_per_forward`; the reason is that of the quality that another
        one stands in for.
    """
    asked = summary.get("retentions_asked", [summary["default_retention"]])
    curves = [curve for curve in summary["curves"] if curve["headline"]]
    rows = [row for curve in curves for row in _rows(summary, curve, _stand_in(summary, curve, asked), asked)]
    means = [row for own in summary.get("averages", []) for row in _rows(summary, own, own, asked)]
    return sorted(rows, key=order_of) + sorted(means, key=order_of)


def _rows(
    summary: dict[str, Any], curve: dict[str, Any], shown: dict[str, Any], asked: list[float]
) -> Iterator[dict[str, Any]]:
    for retention in asked:
        reading = reading_of(shown, summary["default_reading"], retention)
        yield {name: shown[name] for name in _NAMES} | {
            "items": reading.get("items", shown["items"]),
            "dense": shown["dense"]["value"],
            "dense_interval": shown["dense"]["interval"],
            "retention": retention,
            "critical": reading["value"],
            "interval": reading["interval"],
            "censored": reading["censored"],
            "reason": reading_of(curve, summary["default_reading"], retention)["reason"],
            "stands_in_for": None if shown is curve else curve["quality"],
            "tokens_per_forward": shown.get("tokens_per_forward"),
        }


def order_of(row: dict[str, Any]) -> list[str]:
    """Return what rows and curves are sorted by: the two paradigms come next to each other.

    Args:
        row: A row, or an entry of the summary's curves or averages.
    """
    return [row[name] for name in ("task", "site", "rule", "paradigm", "model")]


def _stand_in(summary: dict[str, Any], curve: dict[str, Any], retentions: list[float]) -> dict[str, Any]:
    """Return the likelihood curve of the same cells where that has an answer and the curve has none."""

    def has_answer(own: dict[str, Any]) -> bool:
        return any(reading_of(own, summary["default_reading"], each)["value"] is not None for each in retentions)

    same = ("task", "site", "rule", "paradigm", "model")
    others = (own for own in summary["curves"] if own["kind"] == "nll" and all(own[n] == curve[n] for n in same))
    return curve if has_answer(curve) else next((own for own in others if has_answer(own)), curve)


def without_answer(curves: Iterable[tuple[str, str, str, str | None]]) -> list[str]:
    """Return a sentence for each task and model that lacks an answer; it names the sites where others have one.

    Args:
        curves: Task, model or paradigm, site, and why there is no answer; None where there is one.
    """
    sites: dict[tuple[str, str], dict[str, None]] = {}
    lacking: dict[tuple[str, str, str], dict[str, None]] = {}
    for task, model, site, why in curves:
        sites.setdefault((task, model), {})[site] = None
        if why:
            lacking.setdefault((task, model, why), {})[site] = None
    return [
        f"{task}, {model}{'' if own == sites[task, model] else ', ' + ' and '.join(own)}: {why}"
        for (task, model, why), own in lacking.items()
    ]


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
