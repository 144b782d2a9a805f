"""Sparsity by layer where a search allocated it: one strength for all layers beside strengths by layer."""

from __future__ import annotations

from typing import Any, ClassVar

from markupsafe import Markup

from dllm_sparsity.analysis.findings import allocation_findings
from dllm_sparsity.report import words
from dllm_sparsity.report.data import ReportData
from dllm_sparsity.report.figures import OTHER_COLOUR, PARADIGM_COLOURS, Line, line_chart
from dllm_sparsity.report.panel import Chart, Option, Panel, Table, template
from dllm_sparsity.report.section import Section


class Allocation(Section):
    """Where an allocation by layer puts the zeros, and what it gained."""

    title: ClassVar[str] = "Sparsity allocated to layers"
    order: ClassVar[int] = 32
    needs: ClassVar[tuple[str, ...]] = ("summary",)

    def render(self, data: ReportData) -> Markup:
        """Return a panel, a choice for each curve with strengths by layer, and each rule as a line of Python.

        Args:
            data: What the page is made from.
        """
        found, told = data.summary or {}, _told(data)
        options = [
            Option(
                f"{own['task']}: {own['site']}, {own['rule']}, {own['model']}, {100 * own['retention']:g} %",
                [_chart(own)],
                distance=abs(own["retention"] - found["default_retention"]),
            )
            for own in told
        ]
        if not options:
            return Markup("")
        rules = [
            (option.label, pasted(own))
            for option, own in zip(options, told, strict=True)
            if own["allocation"].get("strength") is not None  # an older run has none
        ]
        return template("allocation.html", panel=Panel("allocation", "Curve", options, wide=True).html(), rules=rules)


def pasted(answer: dict[str, Any]) -> str:
    """Return the line of Python that puts an allocation on a model.

    Args:
        answer: An answer of search.json that has an allocation.
    """
    own = answer["allocation"]
    settings = ", ".join(f"{name}={value!r}" for name, value in own["rule"]["parameters"].items())
    where = f"sites={answer['site']!r}" + ("" if answer["layers"] is None else f", layers={answer['layers']!r}")
    return f"sparsify(model, Layerwise({own['strength']!r}, {settings}), {where})"


def _told(data: ReportData) -> list[dict[str, Any]]:
    search = (data.summary or {}).get("search")
    answers = search.get("curves", []) if isinstance(search, dict) else []
    return [own for own in answers if own.get("allocation", {}).get("by_layer")]


def _chart(answer: dict[str, Any]) -> Chart:
    own = answer["allocation"]
    uniform, allocated = own["by_layer"]["uniform"], own["by_layer"]["allocated"]
    layers = sorted(uniform["layers"], key=int)
    depth = [int(layer) for layer in layers]
    alone = {str(layer): each for each in own["sensitivities"] for layer in each["layers"]}
    lines = [
        Line("one strength", depth, [uniform["layers"][layer] for layer in layers], OTHER_COLOUR, "dash"),
        Line(
            "strengths by layer",
            depth,
            [allocated["layers"].get(layer) for layer in layers],
            PARADIGM_COLOURS.get(answer["paradigm"], OTHER_COLOUR),
        ),
    ]
    rows = [
        [
            layer,
            f"{uniform['strengths'][layer]:.4g}",
            words.percent(uniform["layers"][layer]),
            f"{allocated['strengths'][layer]:.4g}",
            words.percent(allocated["layers"].get(layer)),
            _lost(alone.get(layer)),
        ]
        for layer in layers
    ]
    caption = (
        f"{allocation_findings({'curves': [answer]})[0]} Measured at the strengths nearest the two crossings:"
        f" {words.percent(uniform['sparsity'])} and {words.percent(allocated['sparsity'])} in all."
        f" The allocation comes from what each layer, or group of layers, loses alone on {own['sensitivity_items']:,}"
        f" items in {own['sensitivity_quality']} ({own['sensitivity_why']}), drawn to what all layers share."
    )
    columns = ["layer", "one strength", "sparsity", "strength by layer", "sparsity", "lost alone, at its sparsity"]
    return Chart("Sparsity by layer", caption, line_chart(lines, "layer", "sparsity"), Table(columns, rows, 1))


def _lost(measured: dict[str, Any] | None) -> str:
    """Return what a layer lost alone at the sparsest strength it was measured at."""
    if measured is None:
        return words.NOTHING
    loss, error, place = (measured[name][-1] for name in ("losses", "errors", "sparsity"))
    return f"{loss:.4f} \N{PLUS-MINUS SIGN} {error:.4f} at {words.percent(place)}"
