"""A panel: charts with their tables under one selector, as HTML that also reads without JavaScript."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dllm_sparsity.analysis.summary import clean


@dataclass(frozen=True)
class Table:
    """A table of finished strings.

    Args:
        columns: Headings.
        rows: Cells; foreign text is allowed, it is escaped.
        text_columns: How many columns on the left are text; the others are set flush right.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


@dataclass(frozen=True)
class Chart:
    """One chart.

    Args:
        title: Heading above it.
        caption: What it shows, how to read it, what is counted.
        figure: Plotly's JSON: `data` and `layout`.
        table: Its numbers.
        height: Height in pixels.
    """

    title: str
    caption: str
    figure: dict[str, Any]
    table: Table
    height: int = 320


@dataclass(frozen=True)
class Option:
    """One choice of a panel's selector.

    Args:
        label: Its name.
        charts: What it shows.
        group: Heading in the selector under which it stands.
        distance: The option with the smallest distance is shown first.
    """

    label: str
    charts: Sequence[Chart]
    group: str = ""
    distance: float = 0.0


@dataclass(frozen=True)
class Panel:
    """Charts under one selector.

    Args:
        name: Unique on the page, letters and hyphens.
        selector: What is chosen.
        options: The choices.
        wide: One chart a row in the place of small multiples.
        legend: Keys of the legend above: (label, colour, line style).
    """

    name: str
    selector: str
    options: Sequence[Option]
    wide: bool = False
    legend: Sequence[tuple[str, str, str]] = field(default=())

    def html(self) -> Markup:
        """Return the panel with its first choice in plain HTML and all of them as packed data."""
        order = sorted(range(len(self.options)), key=lambda index: self.options[index].distance)
        first = order[0]
        groups: dict[str, list[tuple[int, Option]]] = {}
        for index, option in enumerate(self.options):
            groups.setdefault(option.group, []).append((index, option))
        payload = [[_chart(chart) for chart in option.charts] for option in self.options]
        return template(
            "panel.html", panel=self, groups=groups, first=first, chosen=self.options[first], packed=pack(payload)
        )


def _chart(chart: Chart) -> dict[str, Any]:
    return {
        "title": chart.title,
        "caption": chart.caption,
        "figure": chart.figure,
        "height": chart.height,
        "table": {"columns": chart.table.columns, "rows": chart.table.rows, "text": chart.table.text_columns},
    }


def pack(value: Any) -> str:
    """Return a value as base64 of gzipped JSON, so that no text of it can end a script block.

    Args:
        value: Anything that `clean` makes JSON of.
    """
    text = json.dumps(clean(value), separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


@cache
def _environment() -> Environment:
    loader = PackageLoader("dllm_sparsity.report", "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def template(name: str, **values: Any) -> Markup:
    """Render one of the package's templates; everything but Markup is escaped.

    Args:
        name: File in report/templates/.
        values: What it shows.
    """
    return Markup(_environment().get_template(name).render(**values))
