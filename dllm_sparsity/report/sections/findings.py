"""What the study found: in sentences, as dots with intervals, and in one table with all four readings."""

from __future__ import annotations

from typing import Any, ClassVar

from markupsafe import Markup

from dllm_sparsity.analysis.critical import DEFAULT_READING, READINGS
from dllm_sparsity.analysis.findings import first_worse
from dllm_sparsity.analysis.headline import order_of, reading_of, without_answer
from dllm_sparsity.analysis.searched import ends
from dllm_sparsity.report import words
from dllm_sparsity.report.data import ReportData
from dllm_sparsity.report.figures import dot_chart, plain
from dllm_sparsity.report.panel import Chart, Option, Panel, Table, template
from dllm_sparsity.report.section import Section


class Findings(Section):
    """Critical sparsity of both paradigms at a glance."""

    title: ClassVar[str] = "What was found"
    order: ClassVar[int] = 10
    needs: ClassVar[tuple[str, ...]] = ("summary",)

    def render(self, data: ReportData) -> Markup:
        """Return sentences, the dot chart and the main table.

        Args:
            data: What the page is made from.
        """
        found = data.summary or {}
        curves = [curve for curve in found["curves"] if curve["headline"]]
        curves.sort(key=order_of)
        shown = [*curves, *sorted(found["averages"], key=order_of)]
        options = [
            Option(f"{100 * retention:g} %", [chart], distance=float(retention != found["default_retention"]))
            for retention in found["retentions"]
            if (chart := _dots(shown, retention)) is not None
        ]
        panel = Panel("findings-dots", "Share of the dense quality to keep", options, wide=True) if options else None
        return template(
            "findings.html",
            found=found,
            panel=panel.html() if panel else "",
            table=_table(shown, found["retentions_asked"]),
            averaged=list({own["task"]: own["tasks"] for own in found["averages"]}.items()),
            ends=_ends(found),
            against=_against_dense(curves),
            share=" or ".join(f"{100 * own:g} %" for own in found["retentions_asked"]),
            reasons=sorted(
                without_answer(
                    (own["task"], own["model"], own["site"], why) for own in shown for why in _why(found, own) or [None]
                )
            ),
        )


def _why(found: dict[str, Any], curve: dict[str, Any]) -> list[str]:
    readings = (reading_of(curve, DEFAULT_READING, retention) for retention in found["retentions_asked"])
    return [reading["reason"] for reading in readings if reading["reason"]]


def _dots(curves: list[dict[str, Any]], retention: float) -> Chart | None:
    several_rules = len({curve["rule"] for curve in curves}) > 1
    rows: dict[str, int] = {}
    dots, lines, items = [], [], set[int]()
    for curve in curves:
        reading = reading_of(curve, DEFAULT_READING, retention)
        if reading["value"] is None:
            continue
        rule = f", {curve['rule']}" if several_rules else ""
        place = f"{plain(curve['task'])}<br>{plain(curve['site'] + rule)}"
        told = words.critical(reading)
        count = reading.get("items", curve["items"])
        hover = f"{curve['paradigm']} ({curve['model']}): {told}, {curve['quality']}, n={count}"
        dots.append(
            {
                "row": rows.setdefault(place, len(rows)),
                "paradigm": curve["paradigm"],
                "value": reading["value"],
                "interval": reading["interval"],
                "bound": reading["censored"],
                "hover": hover,
            }
        )
        lines.append([curve["task"], curve["site"], curve["rule"], curve["paradigm"], curve["model"], told])
        items.add(count)
    if not dots:
        return None
    counts = sorted(items)
    return Chart(
        f"Highest sparsity that keeps {100 * retention:g} % of the dense quality",
        "Further right is more sparsity at the same quality. A dot is the interpolated reading with its 95 % paired"
        " bootstrap interval, or a search's answer with its own; a triangle means that no measured point fell below the"
        " threshold, so the true value is at least that. Headline quality of each task;"
        f" {_between(counts)} items a curve.",
        dot_chart(list(rows), dots, "achieved sparsity"),
        Table(["task", "site", "rule", "paradigm", "model", "critical sparsity"], lines, 5),
        height=80 + 52 * len(rows),
    )


def _between(counts: list[int]) -> str:
    return f"{counts[0]} to {counts[-1]}" if counts[0] != counts[-1] else str(counts[0])


def _table(curves: list[dict[str, Any]], retentions: list[float]) -> Table:
    order = [DEFAULT_READING, *(name for name in READINGS if name != DEFAULT_READING)]
    rows = []
    for curve in curves:
        dense = curve["dense"]
        value = words.quality(dense["value"], curve["kind"])
        unit = "" if curve["kind"] == "accuracy" else f" {curve['quality']}"
        for retention in retentions:
            kept = [f"{100 * retention:g} %"] if len(retentions) > 1 else []
            rows.append(
                [
                    curve["task"],
                    curve["site"],
                    f"{curve['paradigm']} ({curve['model']})",
                    curve["rule"],
                    *kept,
                    f"{value}{unit} {words.interval(dense['interval'], curve['kind'])}",
                    str(reading_of(curve, DEFAULT_READING, retention).get("items", curve["items"])),
                    words.number(curve.get("tokens_per_forward"), 2),
                    *(words.critical(reading_of(curve, name, retention)) for name in order),
                ]
            )
    told = ["kept"] if len(retentions) > 1 else []
    columns = ["task", "site", "paradigm", "rule", *told, "dense quality", "n", "tokens per forward"]
    return Table([*columns, *(name.replace("_", " ") for name in order)], rows, 4 + len(told))


def _ends(found: dict[str, Any]) -> Table | None:
    """Return why each search stopped, and what it took."""
    rows = [
        [
            *(row["task"], row["site"], f"{row['paradigm']} ({row['model']})", row["rule"], row["quality"]),
            f"{100 * row['retention']:g} %",
            row["ended"],
            row["evaluations"],
            f"{row['items']:,} of {row['items_available']:,}",
        ]
        for row in ends(found.get("search"))
    ]
    columns = ["task", "site", "paradigm", "rule", "measure", "kept", "ended by (width in points)"]
    return Table([*columns, "evaluations", "items"], rows, 7) if rows else None


def _against_dense(curves: list[dict[str, Any]]) -> Table:
    """Return the least sparse cell of each curve that is worse than dense, and the one before it, in words."""
    rows = []
    for curve in curves:
        told = [
            "none" if point is None else f"at {words.percent(point['sparsity'])} {point['words']}"
            for point in first_worse(curve)
        ]
        model = f"{curve['paradigm']} ({curve['model']})"
        rows.append([curve["task"], curve["site"], model, curve["rule"], curve["quality"], *told])
    columns = ["task", "site", "paradigm", "rule", "measure", "first cell worse", "the cell before, or the last"]
    return Table(columns, rows, len(columns))
