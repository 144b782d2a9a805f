"""Sparsity over the decoding of autoregressive models: by decode step, with prefill beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from markupsafe import Markup

from dllm_sparsity.analysis.arrow import pc
from dllm_sparsity.analysis.steps import coarsen, counted, sparsity_by
from dllm_sparsity.report import words
from dllm_sparsity.report.data import ReportData, StepSource
from dllm_sparsity.report.figures import OTHER_COLOUR, PARADIGM_COLOURS, STATE_STYLES, Line, line_chart
from dllm_sparsity.report.panel import Chart, Panel, Table
from dllm_sparsity.report.section import Section
from dllm_sparsity.report.stepwise import FIGURE_STEPS, TABLE_STEPS, map_chart, options_of


class Decode(Section):
    """Lines over decode steps; for likelihood, by layer and token state."""

    title: ClassVar[str] = "Autoregressive: sparsity by decode step"
    order: ClassVar[int] = 60
    needs: ClassVar[tuple[str, ...]] = ("steps",)

    def render(self, data: ReportData) -> Markup:
        """Return one panel over all autoregressive records.

        Args:
            data: What the page is made from.
        """
        options = options_of(data, lambda source: source.paradigm == "autoregressive", _charts)
        return Panel("decode", "Cell and site", options).html() if options else Markup("")


def _charts(source: StepSource, site: str) -> Sequence[Chart]:
    decode = counted(source.at(site, ("decode",)))
    if not len(decode):
        likelihood = counted(source.at(site, ("likelihood",)))
        return [_by_layer(likelihood)] if len(likelihood) else []
    what = "One decode step is one new token."
    return [_by_step(source, site), map_chart(decode, "step", "decode step", what)]


def _by_step(source: StepSource, site: str) -> Chart:
    decode, prefill = (counted(source.at(site, (phase,))) for phase in ("decode", "prefill"))
    table = sparsity_by(coarsen(decode, "step", FIGURE_STEPS), ("step",))
    steps, values = table["step"].to_pylist(), table["sparsity"].to_pylist()
    colour = PARADIGM_COLOURS["autoregressive"]
    lines = [Line("decode", steps, values, colour, markers=len(steps) < 25)]
    small = sparsity_by(coarsen(decode, "step", TABLE_STEPS), ("step",)).to_pylist()
    rows = [[f"decode {row['step']}", words.percent(row["sparsity"]), f"{row['rows']:,}"] for row in small]
    if len(prefill):
        total, kept, counts = (pc.sum(prefill[name]).as_py() for name in ("total", "kept", "rows"))
        level = 1 - kept / total if total else 0.0
        lines.append(Line("prefill (all prompt tokens)", [steps[0], steps[-1]], [level] * 2, OTHER_COLOUR, "dash"))
        rows.insert(0, ["prefill", words.percent(level), f"{counts:,}"])
    return Chart(
        "By decode step",
        "Solid: the newest token of each step. Dashed: the mean over the prompt's tokens in prefill.",
        line_chart(lines, "decode step", "sparsity"),
        Table(["phase and step", "sparsity", "token-layers"], rows),
        340,
    )


def _by_layer(likelihood: object) -> Chart:
    table = sparsity_by(likelihood, ("token_state", "layer")).to_pylist()
    lines = []
    for state in dict.fromkeys(row["token_state"] for row in table):
        own = [row for row in table if row["token_state"] == state]
        colour, dash = STATE_STYLES.get(state, (OTHER_COLOUR, "solid"))
        lines.append(Line(state, [row["layer"] for row in own], [row["sparsity"] for row in own], colour, dash))
    rows = [
        [str(row["layer"]), row["token_state"], words.percent(row["sparsity"]), f"{row['rows']:,}"] for row in table
    ]
    return Chart(
        "By layer and token state",
        "Likelihood is one forward pass, so there are no steps: prompt tokens and scored ones, layer by layer.",
        line_chart(lines, "layer", "sparsity"),
        Table(["layer", "token state", "sparsity", "tokens"], rows, 2),
        340,
    )
