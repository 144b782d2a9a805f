"""Figures as Plotly's own JSON: lines with intervals, heat maps, and paired dots. Colours are fixed per paradigm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# from Okabe and Ito's colour-blind-safe set, with a contrast of 3:1 or more on white and on the dark page
PARADIGM_COLOURS = {"autoregressive": "#2f81c7", "diffusion": "#d55e00"}
OTHER_COLOUR = "#7a7f87"
STATE_STYLES = {
    "prompt": ("#7a7f87", "dot"),
    "masked": ("#c964a0", "solid"),
    "committed_now": ("#c98a00", "dash"),
    "committed": ("#009e73", "solid"),
    "after_eos": ("#7a7f87", "dashdot"),
    "unknown": ("#7a7f87", "solid"),
}
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up")
_TICKS = 10
_MARGIN = {"l": 56, "r": 14, "t": 10, "b": 46}


@dataclass(frozen=True)
class Line:
    """One line of a chart; fractions in, percent on the axis."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: str
    dash: str = "solid"
    symbol: str = "circle"
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    hover: Sequence[str] | None = None
    markers: bool = True


def plain(text: str) -> str:
    """Return text that Plotly shows as it is: it would read tags and links out of it.

    Args:
        text: Foreign text.
    """
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def rounded(values: Sequence[float | None] | np.ndarray, digits: int = 4) -> list[float | None]:
    """Return numbers with few digits and None where they are not finite, to keep the page small.

    Args:
        values: Numbers.
        digits: Digits behind the point.
    """
    return [None if value is None or not np.isfinite(value) else round(float(value), digits) for value in list(values)]


def line_chart(
    lines: Sequence[Line],
    x_title: str,
    y_title: str,
    x_percent: bool = False,
    y_percent: bool = True,
    y_range: tuple[float, float] | None = None,
    x_range: tuple[float, float] | None = None,
    threshold: float | None = None,
    legend: bool = True,
) -> dict[str, Any]:
    """Return a chart of lines.

    Args:
        lines: The lines.
        x_title: Title of the horizontal axis.
        y_title: Title of the vertical axis.
        x_percent: Whether x is a fraction.
        y_percent: Whether y is a fraction.
        y_range: Ends of the vertical axis; found when None.
        x_range: Ends of the horizontal axis; found when None.
        threshold: Height of a dashed line across.
        legend: Whether the chart names its lines itself.
    """
    shapes = [] if threshold is None else [_across(threshold)]
    layout: dict[str, Any] = {
        "margin": _MARGIN | ({"t": 34} if legend else {}),
        "xaxis": _axis(x_title, x_percent, x_range) | _whole_ticks(lines),
        "yaxis": _axis(y_title, y_percent, y_range),
        "showlegend": legend,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hovermode": "closest",
        "shapes": shapes,
    }
    return {"data": [_trace(line) for line in lines], "layout": layout}


def heat_map(
    x: Sequence[Any], y: Sequence[Any], z: np.ndarray, x_title: str, y_title: str, value: str
) -> dict[str, Any]:
    """Return a heat map of fractions in the cividis scale.

    Args:
        x: Names of the columns.
        y: Names of the rows.
        z: The matrix; NaN leaves a gap.
        x_title: Title of the horizontal axis.
        y_title: Title of the vertical axis.
        value: Name of what is shown.
    """
    trace = {
        "type": "heatmap",
        "x": list(x),
        "y": list(y),
        "z": [rounded(row, 3) for row in z],
        "colorscale": "Cividis",
        "colorbar": {"tickformat": ".3~p", "thickness": 12, "outlinewidth": 0},
        "hovertemplate": f"{x_title} %{{x}}<br>{y_title} %{{y}}<br>{value} %{{z:.1%}}<extra></extra>",
        "hoverongaps": False,
    }
    layout = {"margin": _MARGIN, "xaxis": _axis(x_title, False, None), "yaxis": _axis(y_title, False, None)}
    return {"data": [trace], "layout": layout}


def dot_chart(rows: Sequence[str], dots: Sequence[dict[str, Any]], x_title: str) -> dict[str, Any]:
    """Return dots with intervals on named rows, the paradigms of a row one above the other.

    Args:
        rows: Names of the rows from the top; `<br>` breaks a line.
        dots: `row` (index), `paradigm`, `name`, `value`, `interval`, `bound` (whether it is a lower bound), `hover`.
        x_title: Title of the horizontal axis.
    """
    data = []
    for paradigm in dict.fromkeys(dot["paradigm"] for dot in dots):
        own = [dot for dot in dots if dot["paradigm"] == paradigm]
        shift = {"autoregressive": -0.15, "diffusion": 0.15}.get(paradigm, 0.0)
        values = [dot["value"] for dot in own]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": plain(paradigm),
                "x": rounded(values),
                "y": [dot["row"] + shift for dot in own],
                "text": [plain(dot["hover"]) for dot in own],
                "hovertemplate": "%{text}<extra></extra>",
                "marker": {
                    "color": PARADIGM_COLOURS.get(paradigm, OTHER_COLOUR),
                    "size": 11,
                    "symbol": ["triangle-right" if dot["bound"] else "circle" for dot in own],
                },
                "error_x": _errors(values, [dot["interval"][0] for dot in own], [dot["interval"][1] for dot in own]),
            }
        )
    layout = {
        "margin": {"l": 10, "r": 14, "t": 10, "b": 46},
        "xaxis": _axis(x_title, True, None) | {"rangemode": "tozero"},
        "yaxis": {
            "tickvals": list(range(len(rows))),
            "ticktext": list(rows),
            "range": [len(rows) - 0.5, -0.5],
            "automargin": True,
            "zeroline": False,
            "ticks": "",
        },
        "showlegend": False,
        "hovermode": "closest",
    }
    return {"data": data, "layout": layout}


def _trace(line: Line) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers" if line.markers else "lines",
        "name": plain(line.name),
        "x": rounded(line.x),
        "y": rounded(line.y),
        "line": {"color": line.colour, "dash": line.dash, "width": 2},
        "marker": {"color": line.colour, "symbol": line.symbol, "size": 7 if line.low is not None else 4},
    }
    if line.low is not None and line.high is not None:
        trace["error_y"] = _errors(line.y, line.low, line.high)
    if line.hover is not None:
        trace |= {"text": [plain(text) for text in line.hover], "hovertemplate": "%{text}<extra></extra>"}
    return trace


def _errors(
    values: Sequence[float | None], low: Sequence[float | None], high: Sequence[float | None]
) -> dict[str, Any]:
    def gap(first: float | None, second: float | None) -> float:
        return max(0.0, first - second) if first is not None and second is not None else 0.0

    return {
        "type": "data",
        "symmetric": False,
        "array": rounded([gap(top, value) for top, value in zip(high, values, strict=True)]),
        "arrayminus": rounded([gap(value, bottom) for bottom, value in zip(low, values, strict=True)]),
        "thickness": 1.4,
        "width": 3,
    }


def _axis(title: str, percent: bool, ends: tuple[float, float] | None) -> dict[str, Any]:
    axis: dict[str, Any] = {"title": {"text": plain(title), "standoff": 6}, "automargin": True, "zeroline": False}
    if percent:
        axis["tickformat"] = ".3~p"  # three digits: a narrow range must not repeat its labels
    if ends is not None:
        axis["range"] = list(ends)
    return axis


def _whole_ticks(lines: Sequence[Line]) -> dict[str, Any]:
    """Return ticks at whole numbers, where all of a chart's places are such: there is no layer 0.5."""
    places = [place for line in lines for place in line.x]
    if not places or not all(isinstance(place, int) for place in places):
        return {}
    return {"tick0": 0, "dtick": max(1, math.ceil((max(places) - min(places)) / _TICKS))}


def _across(height: float) -> dict[str, Any]:
    line = {"color": OTHER_COLOUR, "dash": "dash", "width": 1.3}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": height, "y1": height, "line": line}
