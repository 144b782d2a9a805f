"""How fast a study was: items per second, and how much of the time went into batches, by model, task and rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dllm_sparsity.analysis.loading import Cell
from dllm_sparsity.study.records import CellRecord

Speed = dict[str, Any]


def speeds(cells: Sequence[Cell]) -> list[Speed]:
    """Return one row for each model and task, dense and under each rule.

    The time is a cell's wall clock from the first request to the last score: tokenising, the task's own scoring and
    the journal are in it, loading the model and the documents is not. The time in batches is what its items'
    `seconds` add up to: padding, drawing masks, the forward passes, choosing tokens, and reading the counters. Several
    processes at work on one cell may spend more of it than the clock shows. Cells sealed without a wall clock are left
    out and counted.

    Args:
        cells: Sealed cells.

    Returns:
        Rows with `paradigm, model, task, rule` (None when dense), `cells, items, wall_seconds, batch_seconds,
        items_per_second, share_in_batches, cells_without_time`; None where no cell has the time.
    """
    grouped: dict[tuple[Any, ...], list[CellRecord]] = {}
    for cell in cells:
        record = cell.record
        place = (record["paradigm"], record["model"], record["task"], None if record["dense"] else record["rule"])
        grouped.setdefault(place, []).append(record)
    return [_speed(place, records) for place, records in grouped.items()]


def _speed(place: tuple[Any, ...], records: list[CellRecord]) -> Speed:
    timed = [record for record in records if _seconds(record, "wall_seconds")]
    items = sum(record["items"] for record in timed)
    wall = sum(_seconds(record, "wall_seconds") for record in timed)
    batches = sum(_seconds(record, "seconds") for record in timed)
    return {
        **dict(zip(("paradigm", "model", "task", "rule"), place, strict=True)),
        "cells": len(records),
        "items": items,
        "wall_seconds": wall if timed else None,
        "batch_seconds": batches if timed else None,
        "items_per_second": items / wall if timed else None,
        "share_in_batches": batches / wall if timed else None,
        "cells_without_time": len(records) - len(timed),
    }


def _seconds(record: CellRecord, name: str) -> float:
    """Return a time of a cell; 0 where it has none."""
    value = record["totals"].get(name)
    return float(value) if isinstance(value, int | float) and value > 0 else 0.0
