"""What the sections about steps share: which records belong to them, and charts of sparsity by step and layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from dllm_sparsity.analysis.arrow import pc
from dllm_sparsity.analysis.steps import coarsen, counted, grid, sparsity_by
from dllm_sparsity.report import words
from dllm_sparsity.report.data import ReportData, StepSource
from dllm_sparsity.report.figures import OTHER_COLOUR, STATE_STYLES, Line, heat_map, line_chart
from dllm_sparsity.report.panel import Chart, Option, Table

FIGURE_STEPS = 64
TABLE_STEPS = 12
_DENSE_BELOW = 5e-4


def options_of(
    data: ReportData, wanted: Callable[[StepSource], bool], charts: Callable[[StepSource, str], Sequence[Chart]]
) -> list[Option]:
    """Return one choice for each record and primitive site that has something to show.

    Args:
        data: What the page is made from.
        wanted: Whether a record belongs to the section.
        charts: The charts of a record at a site.
    """
    options = []
    for source in data.sources:
        if not wanted(source):
            continue
        for site in source.sites:
            if (made := charts(source, site)) and not _is_dense(source, site):
                label = source.label if source.site == site else f"{source.label}: {site}"
                label = f"{source.task}: {label}" if source.task else label
                # shown first: a generation task, near its critical sparsity, at the intermediate site
                behind = (not source.phases & {"denoise", "decode"}) + 0.2 * (site != "intermediate")
                options.append(Option(label, made, source.group, source.distance + behind))
    return options


def _is_dense(source: StepSource, site: str) -> bool:
    """Return whether a cell without a rule has no natural zeros either: then there is nothing to look at."""
    if source.cell is None or not source.cell.record["dense"]:
        return False
    own = source.steps.filter(pc.equal(source.steps["site"], site))
    kept, total = (pc.sum(own[name]).as_py() or 0 for name in ("kept", "total"))
    return total == 0 or 1 - kept / total < _DENSE_BELOW


def map_chart(steps: pa.Table, across: str, across_title: str, what: str) -> Chart:
    """Return a heat map of sparsity by layer and another column.

    Args:
        steps: Rows of one site.
        across: `step` or `noise_bin`.
        across_title: What it is called.
        what: What is counted, for the caption.
    """
    steps = counted(steps)
    shown = coarsen(steps, across, FIGURE_STEPS)
    layers, columns, matrix = grid(sparsity_by(shown, ("layer", across)), "layer", across, "sparsity")
    figure = heat_map(columns, layers, matrix, across_title, "layer", "sparsity")
    narrow = coarsen(steps, across, TABLE_STEPS)
    table_layers, table_columns, small = grid(sparsity_by(narrow, ("layer", across)), "layer", across, "sparsity")
    rows = [
        [str(layer), *("" if np.isnan(value) else f"{100 * value:.1f}" for value in row)]
        for layer, row in zip(table_layers, small, strict=True)
    ]
    grouped = "" if shown is steps else " Neighbouring steps are grouped, each group named by its first."
    grouped += "" if narrow is steps else " The table groups neighbouring steps; tables/steps.csv has every one."
    tokens = pc.sum(steps["rows"]).as_py() or 0
    return Chart(
        f"By {across_title} and layer",
        f"Share of activations that were zero; brighter is sparser. {what}{grouped} {tokens:,} token-layers counted.",
        figure,
        Table(["layer", *(f"{across_title} {column}" for column in table_columns)], rows),
        max(240, min(440, 130 + 11 * len(layers))),
    )


def state_chart(steps: pa.Table, across: str, across_title: str, what: str) -> Chart:
    """Return lines of sparsity over another column, one for each token state.

    Args:
        steps: Rows of one site, with tokens behind the end.
        across: `step` or `noise_bin`.
        across_title: What it is called.
        what: What is counted, for the caption.
    """
    table = sparsity_by(coarsen(steps, across, FIGURE_STEPS), ("token_state", across))
    states, places, values = (table[name].to_pylist() for name in ("token_state", across, "sparsity"))
    lines, rows = [], []
    for state in sorted(
        set(states), key=lambda state: list(STATE_STYLES).index(state) if state in STATE_STYLES else 99
    ):
        own = [(x, y) for name, x, y in zip(states, places, values, strict=True) if name == state]
        colour, dash = STATE_STYLES.get(state, (OTHER_COLOUR, "solid"))
        lines.append(Line(state, [x for x, _ in own], [y for _, y in own], colour, dash, markers=len(own) < 25))
    small = sparsity_by(coarsen(steps, across, TABLE_STEPS), (across, "token_state")).to_pylist()
    rows = [[str(row[across]), row["token_state"], words.percent(row["sparsity"]), f"{row['rows']:,}"] for row in small]
    return Chart(
        f"By {across_title} and token state",
        f"{what} Tokens behind the end of a text, if shown, are counted nowhere else."
        f" {pc.sum(steps['rows']).as_py() or 0:,} token-layers.",
        line_chart(lines, across_title, "sparsity"),
        Table([across_title, "token state", "sparsity", "token-layers"], rows, 2),
        340,
    )
