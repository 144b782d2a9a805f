"""The tables beside a report: points, critical sparsities, steps, layers, overlap and items of every cell."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa

from dllm_sparsity.analysis.arrow import pc
from dllm_sparsity.analysis.findings import tested
from dllm_sparsity.analysis.overlap import AGAINST, has_overlap, overlap_by
from dllm_sparsity.analysis.steps import counted, sparsity_by
from dllm_sparsity.report.data import ReportData, StepSource

_CURVE = ("paradigm", "model", "task", "rule", "site", "quality", "kind", "items")
_CELL = ("fingerprint", "paradigm", "model", "task", "rule", "site", "strength")
_COST = ("items", "nfe", "new_tokens", "seconds", "tokens_per_forward")
_STEP = ("phase", "branch", "block", "step", "noise_bin", "site", "token_state")


def tables_of(data: ReportData) -> dict[str, pa.Table]:
    """Return the tables of a study by name. The full cube of a cell stays in its own steps.parquet.

    Args:
        data: What the page of a study is made from.
    """
    found = data.summary or {"curves": [], "averages": [], "cells": []}
    return {
        "points": _flat(
            {name: curve[name] for name in _CURVE}
            | {"measure": curve["quality"]}  # a point's own `quality` is its value
            | {name: value for name, value in point.items() if name != "short"}
            for curve in found["curves"]
            for point in tested(curve)
        ),
        "critical": _flat(
            {name: curve[name] for name in _CURVE} | reading
            for curve in [*found["curves"], *found["averages"]]
            for reading in curve["critical"]
        ),
        "items": _flat({name: cell[name] for name in (*_CELL, "replicate", *_COST)} for cell in found["cells"]),
        "speed": _flat(found.get("speed", [])),
        "steps": _joined(data, lambda steps: sparsity_by(steps, _STEP)),
        "layers": _joined(data, lambda steps: sparsity_by(counted(steps), ("phase", "layer", "site"))),
        "overlap": _joined(data, _overlap),
    }


def _flat(rows: Iterable[dict[str, Any]]) -> pa.Table:
    """Return rows as a table, an interval as two columns."""
    flat = []
    for row in rows:
        entry: dict[str, Any] = {}
        for name, value in row.items():
            if name.endswith("interval"):
                entry[f"{name}_low"], entry[f"{name}_high"] = value if value is not None else (None, None)
            else:
                entry[name] = value
        flat.append(entry)
    names = list(dict.fromkeys(name for row in flat for name in row))
    return pa.table({name: _column([row.get(name) for row in flat]) for name in names})


def _column(values: list[Any]) -> pa.Array:
    if any(isinstance(value, float) for value in values):
        values = [None if value is None else float(value) for value in values]
    array = pa.array(values)
    return array.cast(pa.string()) if pa.types.is_null(array.type) else array


def _joined(data: ReportData, made: Callable[[pa.Table], pa.Table | None]) -> pa.Table:
    parts = [_labelled(source, table) for source in data.sources if (table := made(source.steps)) is not None]
    return (
        pa.concat_tables(parts, promote_options="permissive")
        if parts
        else pa.table({"fingerprint": pa.array([], pa.string())})
    )


def _labelled(source: StepSource, table: pa.Table) -> pa.Table:
    record: dict[str, Any] = dict(source.cell.record) if source.cell else {}
    for name in reversed(_CELL):
        kind = pa.float64() if name == "strength" else pa.string()
        # the site asked for stands beside the primitive site that was counted
        label = "asked_site" if name == "site" else name
        table = table.add_column(0, label, pa.array([record.get(name)] * len(table), kind))
    return table


def _overlap(steps: pa.Table) -> pa.Table | None:
    parts = []
    for against in AGAINST:
        if has_overlap(steps, against):
            part = overlap_by(counted(steps), ("phase", "step", "site", "token_state"), against)
            parts.append(part.append_column("against", pa.array([against] * len(part), pa.string())))
    joined = pa.concat_tables(parts) if parts else None
    return joined.filter(pc.greater(joined["rows"], 0)) if joined is not None else None
