"""Settings and environment: every cell with what was asked and achieved, the config, the machine, the notes."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from markupsafe import Markup

from dllm_sparsity.report import words
from dllm_sparsity.report.data import ReportData
from dllm_sparsity.report.panel import Table, template
from dllm_sparsity.report.section import Section

LONGEST_VALUE = 600
LONGEST_PARAMETERS = 160
LONGEST_LIST = 40


class Settings(Section):
    """What a reader needs to judge or to repeat the run."""

    title: ClassVar[str] = "Settings, cells and environment"
    order: ClassVar[int] = 90

    def render(self, data: ReportData) -> Markup:
        """Return notes, the table of cells, the config and the environment.

        Args:
            data: What the page is made from.
        """
        environment = data.run.environment if data.run else None
        if data.run and not isinstance(environment, dict):
            environment = data.run.cells[0].record.get("environment")
        return template(
            "settings.html",
            notes=data.notes,
            cells=_cells(data.summary["cells"]) if data.summary else None,
            speed=_speed(data.summary["speed"]) if data.summary else None,
            config=data.run.config if data.run else "",
            environment=_flat(environment) if isinstance(environment, dict) and environment else None,
        )


def _cells(cells: list[dict[str, Any]]) -> Table:
    rows = [
        [
            cell["fingerprint"][:12],
            f"{cell['paradigm']} ({cell['model']})",
            cell["task"],
            _rule(cell),
            cell["site"] or words.NOTHING,
            cell["estimator"] or words.NOTHING,
            "" if cell["strength"] is None else f"{cell['strength']:g}",
            ", ".join(f"{site} {words.percent(value)}" for site, value in cell["achieved"].items()) or words.NOTHING,
            str(cell["items"]),
            f"{cell['nfe']:,.0f}",
            words.number(cell["tokens_per_forward"], 2),
            f"{cell['seconds']:,.1f}",
        ]
        for cell in cells
    ]
    columns = ["cell", "paradigm", "task", "rule", "site", "likelihood", "asked", "achieved"]
    return Table([*columns, "n", "forward passes", "tokens per forward", "seconds"], rows, 6)


def _rule(cell: dict[str, Any]) -> str:
    if cell["dense"]:
        return f"dense, run {cell['replicate'] + 1}" if cell["replicate"] else "dense"
    return f"{cell['rule']} {_cut(cell['rule_parameters'])}" if cell["rule_parameters"] else cell["rule"]


def _cut(parameters: dict[str, Any]) -> str:
    """Return a rule's parameters; of tables that would fill the page only the size, for cell.json has them whole."""
    short = {name: _rows(own) if isinstance(own, list) else own for name, own in parameters.items()}
    told = json.dumps(short, sort_keys=True)
    return told if len(told) <= LONGEST_PARAMETERS else told[:LONGEST_PARAMETERS] + "\N{HORIZONTAL ELLIPSIS}"


def _rows(values: list[Any]) -> Any:
    return values if len(json.dumps(values)) <= LONGEST_LIST else f"{len(values)} rows"


def _speed(speeds: list[dict[str, Any]]) -> Table:
    rows = [
        [
            f"{own['paradigm']} ({own['model']})",
            own["task"],
            own["rule"] or "dense",
            str(own["cells"]),
            str(own["items"]),
            words.number(own["wall_seconds"], 1),
            words.number(own["items_per_second"], 2),
            words.percent(own["share_in_batches"]),
        ]
        for own in speeds
    ]
    columns = ["paradigm", "task", "rule", "cells", "items timed", "wall seconds", "items per second", "in batches"]
    return Table(columns, rows, 3)


def _flat(value: dict[str, Any], prefix: str = "") -> Table:
    rows: list[list[str]] = []
    for name, entry in value.items():
        if isinstance(entry, dict) and len(prefix) < LONGEST_VALUE and prefix.count(".") < 4:
            rows += [list(row) for row in _flat(entry, f"{prefix}{name}.").rows]
        else:
            text = entry if isinstance(entry, str) else json.dumps(entry, default=str)
            rows.append([f"{prefix}{name}", text[:LONGEST_VALUE]])
    return Table(["name", "value"], rows, 2)
