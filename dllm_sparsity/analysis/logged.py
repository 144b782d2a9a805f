"""A cell and a study as numbers by name: what an experiment tracker is told."""

from __future__ import annotations

from typing import Any

import numpy as np

from dllm_sparsity.analysis.headline import headline
from dllm_sparsity.analysis.loading import Cell
from dllm_sparsity.analysis.qualities import pairs


def cell_numbers(cell: Cell) -> dict[str, float]:
    """Return a cell's strength, qualities, sparsity of each site, items and seconds, under its task, model and setting.

    Agreement with dense needs the dense cell beside this one and is left to the report.

    Args:
        cell: A sealed cell.
    """
    record, samples = cell.record, cell.samples
    found: dict[str, float] = {} if record["strength"] is None else {"strength": record["strength"]}
    for quality in record["qualities"]:
        top, bottom = pairs(quality, samples, samples)
        counted = np.isfinite(top + bottom)
        if quality["kind"] != "agreement" and counted.any():
            found[quality["name"]] = float(top[counted].sum() / bottom[counted].sum())
    for site, counts in record["totals"].get("sites", {}).items():
        if counts.get("total"):
            found[f"sparsity_{site}"] = 1 - counts["kept"] / counts["total"]
    found |= {"items": record["items"], "seconds": float(record["totals"].get("wall_seconds", 0.0))}
    setting = cell.label if record["dense"] else f"{record['rule']}, {record['site']}"
    if record["layers"] is not None:
        setting += f", layers {'-'.join(map(str, record['layers']))}"
    return {f"{record['task']}/{record['model']}/{setting}/{name}": value for name, value in found.items()}


def study_numbers(summary: dict[str, Any]) -> dict[str, float]:
    """Return the dense quality and the critical sparsity, with its interval, of every row of the main table.

    Args:
        summary: What `summary(run)` returned.
    """
    found: dict[str, float] = {}
    for row in headline(summary):
        place = f"{row['task']}/{row['model']}/{row['rule']}, {row['site']}"
        low, high = row["interval"] or (None, None)
        told = {"dense": row["dense"], "critical": row["critical"], "critical_low": low, "critical_high": high}
        found |= {f"{place}/{name}": value for name, value in told.items() if value is not None}
    return found
