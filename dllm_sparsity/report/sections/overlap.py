"""How much the kept sets of two steps have in common, beside what independent sets would have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from markupsafe import Markup

from dllm_sparsity.analysis.overlap import AGAINST, has_overlap, overlap_by
from dllm_sparsity.analysis.steps import coarsen, counted
from dllm_sparsity.report import words
from dllm_sparsity.report.data import ReportData, StepSource
from dllm_sparsity.report.figures import OTHER_COLOUR, PARADIGM_COLOURS, Line, line_chart
from dllm_sparsity.report.panel import Chart, Panel, Table
from dllm_sparsity.report.section import Section
from dllm_sparsity.report.stepwise import FIGURE_STEPS, TABLE_STEPS, options_of

_TITLES = {"prev": "With the step before", "first": "With the first step"}
_PHASES = ("denoise", "decode", "forward")


class Overlap(Section):
    """Jaccard index by step, pooled and per token."""

    title: ClassVar[str] = "Overlap of the kept activations between steps"
    order: ClassVar[int] = 50
    needs: ClassVar[tuple[str, ...]] = ("steps", "steps.inter_prev")

    def render(self, data: ReportData) -> Markup:
        """Return one panel over all records with overlap, diffusion first.

        Args:
            data: What the page is made from.
        """
        options = [
            replace(option, distance=option.distance + 10 * shifted)
            for shifted in (False, True)
            for option in options_of(data, lambda source, shifted=shifted: source.shifted == shifted, _charts)
        ]
        # an overlap of one token with itself is what the reader came for; AR's stands behind it
        return Panel("overlap", "Cell and site", options).html() if options else Markup("")


def _charts(source: StepSource, site: str) -> Sequence[Chart]:
    steps = counted(source.at(site, _PHASES))
    return [
        chart
        for against in AGAINST
        if has_overlap(steps, against) and (chart := _chart(source, steps, against)) is not None
    ]


def _chart(source: StepSource, steps: object, against: str) -> Chart | None:
    table = overlap_by(coarsen(steps, "step", FIGURE_STEPS), ("step",), against)
    if not len(table):
        return None
    at = table["step"].to_pylist()
    colour = PARADIGM_COLOURS.get(source.paradigm or "", OTHER_COLOUR)
    styles = (("pooled", colour, "solid"), ("per_token", colour, "dot"), ("independent", OTHER_COLOUR, "dash"))
    lines = [
        Line(name.replace("_", " "), at, table[name].to_pylist(), shade, dash, markers=len(at) < 25)
        for name, shade, dash in styles
    ]
    rows = [
        [str(row["step"]), *(words.percent(row[name]) for name, _, _ in styles), f"{row['rows']:,}"]
        for row in overlap_by(coarsen(steps, "step", TABLE_STEPS), ("step",), against).to_pylist()
    ]
    what = (
        "Two steps of decoding are two different tokens, so this is the overlap between neighbouring tokens."
        if source.shifted
        else "Each token is compared with itself at an earlier step."
    )
    return Chart(
        _TITLES[against] + (" (two different tokens)" if source.shifted else ""),
        f"Jaccard index: intersection over union of the kept sets. {what} Pooled: over all tokens and neurons."
        " Per token: the mean of each token's index. Dashed: independent sets of the same density; above it, the"
        " pattern persists.",
        line_chart(lines, "step", "overlap"),
        Table(["step", "pooled", "per token", "independent", "token-layers"], rows),
        340,
    )
