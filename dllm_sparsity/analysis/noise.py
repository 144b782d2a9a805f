"""The noise floor: how far the dense cell moves when nothing but the order of its batches is changed (an A/A test)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dllm_sparsity.analysis.loading import Cell
from dllm_sparsity.analysis.paired import paired_tests
from dllm_sparsity.analysis.pairing import item_groups, pair_tables
from dllm_sparsity.analysis.qualities import pairs
from dllm_sparsity.analysis.statistics import DRAWS, SEED
from dllm_sparsity.errors import UserError
from dllm_sparsity.study.records import Quality

_ONE_BATCH = "is one batch: run again it is the same batch"
"""How the note ends that a sealed cell of one batch has."""


@dataclass(frozen=True)
class NoiseFloor:
    """What two runs of one dense cell differ by.

    Args:
        difference: The second run less the first, in the quality's unit.
        interval: 95 % paired bootstrap interval.
        floor: The larger end of the interval in size; a difference up to it is what the order of batches can do.
        changed: Items whose value differs.
        items: Number of items.
    """

    difference: float
    interval: tuple[float, float]
    floor: float
    changed: int
    items: int


def noise_floor(
    first: pa.Table, second: pa.Table, quality: Quality, draws: int = DRAWS, seed: int = SEED
) -> NoiseFloor:
    """Return the noise floor of a quality from two runs of the same dense cell.

    Args:
        first: Items of the one run, in the schema of samples.parquet, in any order.
        second: Items of the other.
        quality: Which quality.
        draws: Bootstrap samples.
        seed: Seed of the resampling.

    Raises:
        UserError: The two tables do not hold the same items, or none has a value.
    """
    paired = pair_tables([first, second])
    values = [pairs(quality, table, paired.tables[0]) for table in paired.tables]
    counted = np.isfinite(np.array(values)).all((0, 1))
    if not counted.any():
        raise UserError(f"no item has a value of {quality['name']} in both runs", "choose a quality of this task")
    kept = pa.array(counted)
    one, two = ((top[counted], bottom[counted]) for top, bottom in values)
    test = paired_tests(one, [two], item_groups(paired.tables[0].filter(kept)), draws, seed)[0]
    floor = max(abs(end) for end in test.interval)
    return NoiseFloor(test.difference, test.interval, floor, test.changed, test.items)


def replicates_of(dense: Cell, cells: Sequence[Cell]) -> tuple[list[Cell], list[str]]:
    """Return the further runs of a dense cell, and why others are none, in words.

    Args:
        dense: The cell that curves start from.
        cells: All cells of the run.
    """
    found, notes = [], []
    same = ("paradigm", "model", "task", "dense")
    for cell in cells:
        if not cell.record.get("replicate") or any(cell.record[name] != dense.record[name] for name in same):
            continue
        ours, theirs = _parts(dense), _parts(cell)
        other = [name for name in {**ours, **theirs} if name != "replicate" and ours.get(name) != theirs.get(name)]
        if other:
            place = f"{dense.record['task']} on {dense.record['model']}"
            notes.append(f"the second dense run of {place} gives no noise floor: {', '.join(other)} differs")
        else:
            found.append(cell)
    return found, notes


def is_one_batch(cell: Cell) -> bool:
    """Tell whether a further run had one batch alone, so that no order of batches could change it.

    Args:
        cell: A further run of a dense cell.
    """
    return any(str(note).endswith(_ONE_BATCH) for note in cell.record["notes"])


def _parts(cell: Cell) -> dict[str, Any]:
    parts = cell.record.get("parts")
    return parts if isinstance(parts, dict) else {}


def floors_of(
    dense: Cell, replicates: Sequence[Cell], quality: Quality, draws: int = DRAWS, seed: int = SEED
) -> NoiseFloor | None:
    """Return the highest noise floor over the further runs of a dense cell, or None where there is none.

    Args:
        dense: The cell that curves start from.
        replicates: Its further runs.
        quality: Which quality.
        draws: Bootstrap samples.
        seed: Seed of the resampling.

    Raises:
        UserError: A further run does not hold the same items.
    """
    floors = [noise_floor(dense.samples, cell.samples, quality, draws, seed) for cell in replicates]
    return max(floors, key=lambda own: own.floor, default=None)
