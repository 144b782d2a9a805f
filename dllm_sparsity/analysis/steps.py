"""Per-step tables: sparsity by phase, step, layer, noise and token state, from the sums in steps.parquet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from dllm_sparsity.analysis.arrow import pc
from dllm_sparsity.study.records import EXCLUDED_STATES

CUBE = ("phase", "branch", "step", "layer", "token_state", "site")


def counted(steps: pa.Table, after_eos: bool = False) -> pa.Table:
    """Leave out what no headline figure counts: padding, tokens behind the end, and the unconditional half of guidance.

    Args:
        steps: Rows in the step schema.
        after_eos: Keep the tokens behind the end, to show them as a line of their own.
    """
    states = [state for state in EXCLUDED_STATES if not (after_eos and state == "after_eos")]
    excluded = pc.is_in(steps["token_state"], value_set=pa.array(states))
    return steps.filter(pc.invert(pc.or_(excluded, pc.fill_null(pc.equal(steps["branch"], "uncond"), False))))


def sparsity_by(steps: pa.Table, keys: Sequence[str]) -> pa.Table:
    """Sum the counts over all but some columns, and return their sparsity.

    Args:
        steps: Rows in the step schema.
        keys: Columns to keep, such as those of `CUBE`, `noise_bin` or `layer`.

    Returns:
        The keys with `rows`, `kept`, `total` and `sparsity` = 1 - kept / total, sorted by the keys.
    """
    sums = _summed(steps, keys, ("rows", "kept", "total"))
    total = sums["total"].to_numpy().astype(float)
    kept = sums["kept"].to_numpy().astype(float)
    sparsity = np.where(total > 0, 1 - kept / np.maximum(total, 1), np.nan)
    return sums.append_column("sparsity", pa.array(sparsity, from_pandas=True))


def coarsen(steps: pa.Table, column: str, most: int) -> pa.Table:
    """Group neighbouring values of a counter so that at most `most` remain, each named by its first value.

    Args:
        steps: Rows in the step schema.
        column: The counter, such as `step`.
        most: Number of groups.
    """
    highest = pc.max(steps[column]).as_py()
    width = 1 if highest is None else -(-(highest + 1) // most)
    if width == 1:
        return steps
    grouped = pc.multiply(pc.divide(steps[column], width), width).cast(steps[column].type)
    return steps.set_column(steps.column_names.index(column), column, grouped)


def grid(table: pa.Table, down: str, across: str, value: str) -> tuple[list[int], list[int], np.ndarray]:
    """Spread a long table into a matrix.

    Args:
        table: One row per pair of `down` and `across`.
        down: Column that names the rows.
        across: Column that names the columns.
        value: Column that fills the cells; NaN where a pair is missing.

    Returns:
        Names of the rows, names of the columns, and the matrix.
    """
    rows, columns = (np.array(table[name].to_pylist(), dtype=np.int64) for name in (down, across))
    names_down, at_down = np.unique(rows, return_inverse=True)
    names_across, at_across = np.unique(columns, return_inverse=True)
    matrix = np.full((len(names_down), len(names_across)), np.nan)
    matrix[at_down, at_across] = np.array(table[value].to_pylist(), dtype=float)
    return names_down.tolist(), names_across.tolist(), matrix


def _summed(steps: pa.Table, keys: Sequence[str], columns: Sequence[str]) -> pa.Table:
    summed = steps.group_by(list(keys)).aggregate([(column, "sum") for column in columns])
    summed = summed.rename_columns(
        [name.removesuffix("_sum") if name not in keys else name for name in summed.column_names]
    )
    return summed.select([*keys, *columns]).sort_by([(key, "ascending") for key in keys])
