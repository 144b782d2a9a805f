"""Overlap of kept sets between steps, pooled and per token, beside what independent sets would give."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

AGAINST = ("prev", "first")


def has_overlap(steps: pa.Table, against: str = "prev") -> bool:
    """Return whether the overlap columns were recorded.

    Args:
        steps: Rows in the step schema.
        against: `prev` (the step before) or `first` (the first step).
    """
    names = (f"{name}_{against}" for name in ("rows", "inter", "union", "kept", "jaccard_sum"))
    return all(name in steps.column_names for name in names)


def overlap_by(steps: pa.Table, keys: Sequence[str], against: str = "prev") -> pa.Table:
    """Sum the overlap counts over all but some columns, and return the overlap of kept sets.

    `pooled` is the Jaccard index over all tokens and neurons together, inter / union. `per_token` is the mean over
    tokens of each token's own index. `independent` is what two independent sets of the same densities would give.

    Args:
        steps: Rows in the step schema with its overlap columns.
        keys: Columns to keep.
        against: `prev` or `first`.

    Returns:
        The keys with `rows`, `pooled`, `per_token` and `independent`; only groups that compared a token.

    Source: J = |A and B| / |A or B|; independent sets of densities d1, d2 have J = d1 d2 / (d1 + d2 - d1 d2), which is
        d / (2 - d) for equal ones. Differs: groups over unequal layers sum d1 d2 and d1 + d2 - d1 d2 over rows of the
        record before dividing, because density differs by layer.
    """
    names = {name: f"{name}_{against}" for name in ("rows", "inter", "union", "kept", "jaccard_sum")}
    raw = {name: _floats(steps, column) for name, column in names.items()}
    rows, total = _floats(steps, "rows"), _floats(steps, "total")
    slots = raw["rows"] * np.divide(total, rows, out=np.zeros_like(total), where=rows > 0)
    inverse = np.divide(1.0, slots, out=np.zeros_like(slots), where=slots > 0)
    before = raw["kept"] * inverse
    now = (raw["inter"] + raw["union"] - raw["kept"]) * inverse
    sums = {
        "rows": raw["rows"],
        "inter": raw["inter"],
        "union": raw["union"],
        "jaccard": raw["jaccard_sum"],
        "both": slots * before * now,
        "either": slots * (before + now - before * now),
    }
    table = pa.table({key: steps[key] for key in keys} | {f"#{name}": pa.array(value) for name, value in sums.items()})
    summed = table.group_by(list(keys)).aggregate([(f"#{name}", "sum") for name in sums])
    summed = summed.sort_by([(key, "ascending") for key in keys])
    value = {name: summed[f"#{name}_sum"].to_numpy() for name in sums}
    ratios = {
        "pooled": ("inter", "union"),
        "per_token": ("jaccard", "rows"),
        "independent": ("both", "either"),
    }
    columns: dict[str, pa.Array | pa.ChunkedArray] = {key: summed[key] for key in keys}
    columns["rows"] = pa.array(value["rows"].astype(np.int64))
    for name, (top, bottom) in ratios.items():
        ratio = np.full(len(summed), np.nan)
        np.divide(value[top], value[bottom], out=ratio, where=value[bottom] > 0)
        columns[name] = pa.array(ratio, from_pandas=True)
    return pa.table(columns).filter(pa.array(value["rows"] > 0))


def _floats(steps: pa.Table, column: str) -> np.ndarray:
    return np.nan_to_num(steps[column].cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False).astype(float))
