"""Quality against achieved sparsity, both paradigms on one axis: relative to dense, and raw."""

from __future__ import annotations

from typing import Any, ClassVar

from markupsafe import Markup

from dllm_sparsity.analysis.headline import reading_of
from dllm_sparsity.report import words
from dllm_sparsity.report.data import ReportData
from dllm_sparsity.report.figures import DASHES, OTHER_COLOUR, PARADIGM_COLOURS, SYMBOLS, Line, line_chart
from dllm_sparsity.report.panel import Chart, Option, Panel, Table, template
from dllm_sparsity.report.section import Section

Curve = dict[str, Any]
_OF_CELLS = ("words", "flops_saved", "difference", "difference_interval", "smallest_detectable", "p", "p_holm", "test")


class Quality(Section):
    """Small multiples: a panel for each task and average, a chart for each site and rule, a line for each model."""

    title: ClassVar[str] = "Quality against achieved sparsity"
    order: ClassVar[int] = 20
    needs: ClassVar[tuple[str, ...]] = ("summary",)

    def render(self, data: ReportData) -> Markup:
        """Return a panel for each task, and for each average over tasks that was measured at several strengths.

        Args:
            data: What the page is made from.
        """
        means = _averages(data.summary) if data.summary else []
        own = [_with_path(own) for own in data.summary["curves"]] if data.summary else []
        curves = [*own, *means]
        styles = _styles(curves)
        tasks = list(dict.fromkeys(curve["task"] for curve in curves))
        kept = data.summary["default_retention"] if data.summary else 1.0
        blocks = [(task, _panel(index, task, curves, styles, kept)) for index, task in enumerate(tasks)]
        share = f"{100 * kept:g} %"
        return template("quality.html", blocks=blocks, share=share, averaged=bool(means)) if blocks else Markup("")


def _averages(found: dict[str, Any]) -> list[Curve]:
    """Return the averages as curves; what is not known of an average is None."""
    return [
        {**own, "headline": True, "points": [dict.fromkeys(_OF_CELLS) | point for point in own["points"]]}
        for own in found["averages"]
        if own["points"]
    ]


def _with_path(curve: Curve) -> Curve:
    """Return a curve with what its search measured at other strengths, each on its own items."""
    known = {point["strength"] for point in curve["points"]}
    more = [own for own in curve["path"] if own["strength"] not in known and own.get("retention") is not None]
    drawn = [*curve["points"], *(dict.fromkeys(_OF_CELLS) | {"dense": False} | own for own in more)]
    return {**curve, "drawn": sorted(drawn, key=lambda point: point["sparsity"] or 0.0)}


def _styles(curves: list[Curve]) -> dict[tuple[str, str], tuple[str, str, str]]:
    """Return colour, dash and symbol of each model: the colour says the paradigm, the rest tells models apart."""
    styles: dict[tuple[str, str], tuple[str, str, str]] = {}
    for paradigm in dict.fromkeys(curve["paradigm"] for curve in curves):
        models = dict.fromkeys(curve["model"] for curve in curves if curve["paradigm"] == paradigm)
        shift = 1 if paradigm == "diffusion" else 0
        for index, model in enumerate(models):
            colour = PARADIGM_COLOURS.get(paradigm, OTHER_COLOUR)
            styles[paradigm, model] = (colour, DASHES[index % 4], SYMBOLS[(index + shift) % 4])
    return styles


def _panel(
    index: int, task: str, curves: list[Curve], styles: dict[tuple[str, str], tuple[str, str, str]], kept: float
) -> Markup:
    own = [curve for curve in curves if curve["task"] == task]
    options = []
    for name in dict.fromkeys(curve["quality"] for curve in sorted(own, key=lambda curve: not curve["headline"])):
        for relative in (True, False):
            shown = [curve for curve in own if curve["quality"] == name]
            told = _kept(shown[0])
            label = f"{told}, relative to dense" if relative else f"{name}, raw"
            options.append(Option(label, _charts(shown, styles, relative, kept), distance=len(options)))
    legend = [
        (f"{paradigm} ({model})", *styles[paradigm, model][:2])
        for paradigm, model in dict.fromkeys((curve["paradigm"], curve["model"]) for curve in own)
    ]
    return Panel(f"quality-{index}", "Measure", options, legend=legend).html()


def _charts(
    curves: list[Curve], styles: dict[tuple[str, str], tuple[str, str, str]], relative: bool, kept: float
) -> list[Chart]:
    points = [point for curve in curves for point in _drawn(curve)]
    furthest = max((point["sparsity"] or 0.0 for point in points), default=1.0)
    value = "retention" if relative else "quality"
    ends = [end for point in points for end in point[f"{value}_interval"] if end is not None]
    ends += [point[value] for point in points if point[value] is not None]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    space = 0.06 * (high - low) or 0.05
    ranges = {"x_range": (-0.03, min(1.0, furthest) + 0.04), "y_range": (low - space, high + space)}
    charts = []
    for site, rule in dict.fromkeys((curve["site"], curve["rule"]) for curve in curves):
        shown = [curve for curve in curves if (curve["site"], curve["rule"]) == (site, rule)]
        charts.append(_chart(f"{site}, {rule}", shown, styles, relative, kept, ranges))
    return charts


def _chart(
    title: str,
    curves: list[Curve],
    styles: dict[tuple[str, str], tuple[str, str, str]],
    relative: bool,
    kept: float,
    ranges: dict[str, tuple[float, float]],
) -> Chart:
    kind, name = curves[0]["kind"], curves[0]["quality"]
    value = "retention" if relative else "quality"
    lines = []
    for curve in curves:
        colour, dash, symbol = styles[curve["paradigm"], curve["model"]]
        points = _drawn(curve)
        lines.append(
            Line(
                f"{curve['paradigm']} ({curve['model']})",
                [point["sparsity"] for point in points],
                [point[value] for point in points],
                colour,
                dash,
                symbol,
                [point[f"{value}_interval"][0] for point in points],
                [point[f"{value}_interval"][1] for point in points],
                [_hover(curve, point) for point in points],
            )
        )
    counts = ", ".join(dict.fromkeys(_count(curve) for curve in curves))
    told = [
        f"{curve['paradigm']} {words.critical(reading_of(curve, 'interpolated', kept))}"
        for curve in curves
        if reading_of(curve, "interpolated", kept)["value"] is not None
    ]
    direction = "" if relative or curves[0]["higher_is_better"] else " Lower is better."
    critical = f"Critical sparsity at {100 * kept:g} %: {'; '.join(told)}. " if told else ""
    figure = line_chart(
        lines,
        "achieved sparsity",
        f"{_kept(curves[0])} kept" if relative else name,
        x_percent=True,
        y_percent=relative or kind in ("accuracy", "agreement"),
        threshold=kept if relative else None,
        legend=False,
        **ranges,
    )
    return Chart(title, f"{critical}{counts}.{direction}", figure, _table(curves), 300)


def _drawn(curve: Curve) -> list[dict[str, Any]]:
    return curve.get("drawn", curve["points"])


def _count(curve: Curve) -> str:
    counts = [point.get("items", curve["items"]) for point in _drawn(curve)]
    return f"n={min(counts)}" + (f" to {max(counts)}" if min(counts) < max(counts) else "")


def _kept(curve: Curve) -> str:
    return "likelihood per token" if curve["kind"] == "nll" else curve["quality"]


def _hover(curve: Curve, point: dict[str, Any]) -> str:
    asked = "dense" if point["dense"] else f"asked {point['strength']:g}" if point["strength"] is not None else "asked"
    measured = f"{curve['quality']} {words.quality(point['quality'], curve['kind'])}"
    told = f"; {point['words']}" if point["words"] else ""
    return (
        f"{curve['paradigm']} ({curve['model']}), {asked}: achieved {words.percent(point['sparsity'])}, {measured}"
        f" {words.interval(point['quality_interval'], curve['kind'])}, n={point.get('items', curve['items'])}{told}"
    )


def _table(curves: list[Curve]) -> Table:
    columns = [
        *("paradigm", "model", "asked", "achieved", "against dense", "FFN FLOPs saved", "quality", "95 % interval"),
        *("less dense", "95 % interval", "smallest detectable", "p", "p, Holm", "test", "kept", "n"),
    ]
    rows = []
    own_items = any("items" in point for curve in curves for point in _drawn(curve))
    for curve in curves:
        kind = curve["kind"]
        for point in _drawn(curve):
            rows.append(
                [
                    curve["paradigm"],
                    curve["model"],
                    "dense" if point["dense"] else words.number(point["strength"], 3),
                    words.percent(point["sparsity"]),
                    point["words"] or words.NOTHING,
                    words.percent(point["flops_saved"]),
                    words.quality(point["quality"], kind),
                    words.interval(point["quality_interval"], kind),
                    words.quality(point["difference"], kind),
                    words.interval(point["difference_interval"], kind),
                    words.least(point["smallest_detectable"], kind),
                    words.p_value(point["p"]),
                    words.p_value(point["p_holm"]),
                    point["test"] or words.NOTHING,
                    words.percent(point["retention"]),
                    str(point.get("items", curve["items"])) if own_items else "",
                ]
            )
    told = [at for at, _ in enumerate(columns) if any(row[at] not in ("", words.NOTHING) for row in rows)]
    return Table([columns[at] for at in told], [[row[at] for at in told] for row in rows], 2)
