"""Sparsity by layer, the two paradigms on one chart, each at the cell nearest its critical sparsity."""

from __future__ import annotations

from typing import ClassVar

from markupsafe import Markup

from dllm_sparsity.analysis.steps import counted, sparsity_by
from dllm_sparsity.report import words
from dllm_sparsity.report.data import ReportData, StepSource
from dllm_sparsity.report.figures import DASHES, OTHER_COLOUR, PARADIGM_COLOURS, Line, line_chart
from dllm_sparsity.report.panel import Chart, Option, Panel, Table
from dllm_sparsity.report.section import Section


class Layers(Section):
    """Where in the depth of the model the zeros are."""

    title: ClassVar[str] = "Sparsity by layer"
    order: ClassVar[int] = 30
    needs: ClassVar[tuple[str, ...]] = ("steps",)

    def render(self, data: ReportData) -> Markup:
        """Return one panel: a choice for each task, site and rule.

        Args:
            data: What the page is made from.
        """
        places = dict.fromkeys((source.task, source.site, source.rule) for source in data.sources)
        options = []
        for task, site, rule in places:
            own = [source for source in data.sources if (source.task, source.site, source.rule) == (task, site, rule)]
            if own[0].cell is not None and site is None:
                continue
            nearest = [
                min((source for source in own if source.group == group), key=lambda source: source.distance)
                for group in dict.fromkeys(source.group for source in own)
            ]
            label = f"{task}: {site}, {rule}" if task else "recorded loop"
            options.append(Option(label, _charts(nearest), distance=max(source.distance for source in nearest)))
        return Panel("layers", "Task and site", options).html() if options else Markup("")


def _charts(sources: list[StepSource]) -> list[Chart]:
    charts = []
    for site in dict.fromkeys(site for source in sources for site in source.sites):
        lines, rows, told = [], [], []
        for source in (source for source in sources if site in source.sites):
            own = [
                row for row in sparsity_by(counted(source.steps), ("site", "layer")).to_pylist() if row["site"] == site
            ]
            if not own:
                continue
            name = source.paradigm or source.label
            colour = PARADIGM_COLOURS.get(name, OTHER_COLOUR)
            depth = [row["layer"] for row in own]
            same = sum(line.colour == colour for line in lines)
            lines.append(Line(name, depth, [row["sparsity"] for row in own], colour, DASHES[same % 4], markers=True))
            told.append(f"{name}: {source.label} ({source.group})" if source.cell else source.label)
            rows += [[str(row["layer"]), name, words.percent(row["sparsity"]), f"{row['rows']:,}"] for row in own]
        if lines:
            charts.append(
                Chart(
                    site,
                    f"{'; '.join(told)}. All phases together, without padding and tokens behind the end.",
                    line_chart(lines, "layer", "sparsity"),
                    Table(["layer", "paradigm", "sparsity", "tokens"], rows, 2),
                    320,
                )
            )
    return charts
