"""What a page is made from: the summary of a study and its step records, or the step records of a foreign loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from dllm_sparsity.analysis.arrow import pc
from dllm_sparsity.analysis.checking import MUST_BE_TOLD, complete_steps
from dllm_sparsity.analysis.headline import reading_of
from dllm_sparsity.analysis.loading import Cell, Run
from dllm_sparsity.analysis.steps import counted
from dllm_sparsity.analysis.summary import summary
from dllm_sparsity.errors import UserError
from dllm_sparsity.study.records import OVERLAP_COLUMNS, STEP_COLUMNS

FAR = 9.0
_DEFAULTS = {"phase": "forward", "branch": "cond", "block": 0, "step": 0, "noise_bin": 0, "expert": -1}
_NEEDED = ("layer", "site", "kept", "total", "rows")


@dataclass(frozen=True)
class StepSource:
    """The step records of one cell, or of one foreign loop.

    Args:
        label: The setting in words.
        group: Model and task, under which a selector lists it.
        paradigm: autoregressive, diffusion, or None where it is not known.
        task: The task; empty for a foreign loop.
        site: The site asked for; None when dense or not known.
        rule: The rule's name; None when dense or not known.
        shifted: Whether two steps in a row are two different tokens.
        distance: How far the achieved sparsity is from the critical one.
        cell: Where the records lie, or None.
        table: The records, or None where the cell has them.
    """

    label: str
    group: str
    paradigm: str | None
    task: str = ""
    site: str | None = None
    rule: str | None = None
    shifted: bool = False
    distance: float = FAR
    cell: Cell | None = None
    table: pa.Table | None = None

    @cached_property
    def steps(self) -> pa.Table:
        """Return the counted rows, with tokens behind the end kept for lines of their own."""
        table = self.table if self.table is not None else self.cell.steps if self.cell else None
        return counted(table, after_eos=True) if table is not None else pa.table({})

    @property
    def columns(self) -> list[str]:
        """Return the names of the columns of the step records."""
        return self.steps.column_names

    @cached_property
    def phases(self) -> set[str]:
        """Return the phases that occur."""
        return set(self.steps["phase"].unique().to_pylist())

    @cached_property
    def sites(self) -> list[str]:
        """Return the primitive sites that were recorded."""
        return sorted(self.steps["site"].unique().to_pylist())

    def at(self, site: str, phases: Sequence[str]) -> pa.Table:
        """Return the rows of a site in some phases.

        Args:
            site: A primitive site.
            phases: Names of phases.
        """
        wanted = pc.is_in(self.steps["phase"], value_set=pa.array(list(phases), pa.string()))
        return self.steps.filter(pc.and_(wanted, pc.equal(self.steps["site"], site)))


@dataclass(frozen=True)
class ReportData:
    """Everything that sections read.

    Args:
        title: The page's heading.
        sources: Step records, in the order of the cells.
        summary: The study's summary; None for a foreign loop.
        run: The run directory; None for a foreign loop.
        notes: What the reader should know.
    """

    title: str
    sources: tuple[StepSource, ...]
    summary: dict[str, Any] | None = None
    run: Run | None = None
    notes: tuple[str, ...] = field(default=())


def from_run(run: Run) -> ReportData:
    """Return what the page of a study is made from.

    Args:
        run: A loaded run directory.

    Raises:
        UserError: The items of two cells are not the same, or a table is damaged.
    """
    found = summary(run)
    distances = _distances(found)
    sources = [
        StepSource(
            label=cell.label,
            group=f"{cell.record['model']}, {cell.record['task']}",
            paradigm=cell.record["paradigm"],
            task=cell.record["task"],
            site=cell.record["site"],
            rule=cell.record["rule"],
            shifted=cell.record["shifted_steps"],
            distance=distances.get(cell.record["fingerprint"], FAR),
            cell=cell,
        )
        for cell in run.cells
    ]
    return ReportData(run.name, tuple(sources), found, run, tuple(found["notes"]))


def from_reading(reading: Any, title: str) -> ReportData:
    """Return what the page of a foreign loop is made from.

    Args:
        reading: Column name -> values in the step schema, or an object whose `columns` is that; it may have `notes`.
        title: The page's heading.

    Raises:
        UserError: It is no such thing, or a column is missing or of another type or length.
    """
    columns = reading.columns if hasattr(reading, "columns") else reading
    if not isinstance(columns, Mapping):
        raise UserError(
            f"a report needs columns by name, not {type(reading).__name__}", "give it what tracker.read() returned"
        )
    if lacking := [name for name in _NEEDED if name not in columns]:
        raise UserError(f"column {', '.join(lacking)} is missing", "give it what tracker.read() returned")
    length = len(columns["kept"])
    filled = {name: columns.get(name, [default] * length) for name, default in _DEFAULTS.items()}
    states = columns.get("token_state", ["unknown"] * length)
    kinds = STEP_COLUMNS | {name: kind for name, kind in OVERLAP_COLUMNS.items() if name in columns}
    values = {name: filled.get(name, states if name == "token_state" else columns.get(name)) for name in kinds}
    try:
        table = pa.table({name: pa.array(value, from_pandas=True) for name, value in values.items()})
        table = table.cast(pa.schema(kinds))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise UserError(
            f"a column is of the wrong type or length ({str(error).splitlines()[0][:120]})",
            "give it what tracker.read() returned",
        ) from error
    if holes := [name for name in MUST_BE_TOLD if table[name].null_count]:
        raise UserError(f"column {', '.join(holes)} has nulls", "give it what tracker.read() returned")
    table = complete_steps(Path("reading"), table)
    notes = tuple(str(note) for note in getattr(reading, "notes", ()))
    phases = set(table["phase"].unique().to_pylist())
    paradigm = "diffusion" if "denoise" in phases else "autoregressive" if phases & {"prefill", "decode"} else None
    source = StepSource(
        "recorded loop", title, paradigm, shifted=paradigm == "autoregressive", distance=0.0, table=table
    )
    return ReportData(title, (source,), notes=notes)


def _distances(found: dict[str, Any]) -> dict[str, float]:
    """Return how far each cell's sparsity is from the critical sparsity of its curve."""
    distances: dict[str, float] = {}
    for curve in found["curves"]:
        critical = reading_of(curve, found["default_reading"], found["default_retention"])["value"]
        if critical is None or not curve["headline"]:
            continue
        for point in curve["points"]:
            if not point["dense"] and point["sparsity"] is not None:
                distances[point["fingerprint"]] = abs(point["sparsity"] - critical)
    return distances
