"""Load a run directory: its sealed cells, their tables on demand, and the files that describe the study."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from dllm_sparsity.analysis.checking import (
    check_counts,
    complete_steps,
    read_json,
    read_record,
    read_search,
    read_table,
)
from dllm_sparsity.errors import UserError
from dllm_sparsity.study.records import (
    OPTIONAL_SAMPLE_COLUMNS,
    OVERLAP_COLUMNS,
    PRIMITIVE_SITES,
    SAMPLE_COLUMNS,
    STEP_COLUMNS,
    CellRecord,
    find_damage,
)

LARGEST_TEXT = 200_000


@dataclass(frozen=True)
class Cell:
    """One sealed cell: its record, and its two tables, read when asked for.

    Args:
        folder: The cell's folder.
        record: What its cell.json holds.
        searches: Of a dense cell: what was searched from it, as search.json has it.
        elsewhere: Of a dense cell: strengths that searches measured on other items than those of the curves' points.
    """

    folder: Path
    record: CellRecord
    searches: tuple[dict[str, Any], ...] = ()
    elsewhere: tuple[Cell, ...] = ()

    @cached_property
    def samples(self) -> pa.Table:
        """Return one row per item."""
        path = self.folder / "samples.parquet"
        table = read_table(path, SAMPLE_COLUMNS, OPTIONAL_SAMPLE_COLUMNS)
        check_counts(path, table, [(f"kept_{site}", f"total_{site}") for site in PRIMITIVE_SITES])
        return table

    @property
    def steps(self) -> pa.Table:
        """Return sums by phase, step, layer, site and token state; read anew each time, for a study's are large."""
        path = self.folder / "steps.parquet"
        table = complete_steps(path, read_table(path, STEP_COLUMNS, OVERLAP_COLUMNS))
        check_counts(path, table, [("kept", "total")])
        return table

    @property
    def label(self) -> str:
        """Return the setting in words: `dense`, or the rule, its strength and the site."""
        if self.record["dense"]:
            again = self.record.get("replicate")
            return f"dense, run {again + 1}" if again else "dense"
        strength = "" if self.record["strength"] is None else f" {self.record['strength']:g}"
        return f"{self.record['rule']}{strength}, {self.record['site']}"


@dataclass(frozen=True)
class Run:
    """A run directory as it lies on disk.

    Args:
        path: The directory.
        cells: Its sealed cells, ordered by paradigm, model, task, site and strength.
        unsealed: Number of cell folders without DONE; they are not counted anywhere.
        damaged: Each cell whose files are not those that were sealed, and what is wrong; they are not counted either.
        config: The text of config.yaml; empty when there is none.
        plan: What plan.json holds, or None.
        environment: What environment.json holds, or None.
        search: What search.json holds, or None.
        unfounded: Its answers that are left out, for their cells are damaged or not there, each in words.
    """

    path: Path
    cells: tuple[Cell, ...]
    unsealed: int = 0
    damaged: tuple[str, ...] = ()
    config: str = ""
    plan: Any = None
    environment: Any = field(default=None)
    search: Any = None
    unfounded: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the study's name: the name of its directory."""
        return self.path.name


def load(run_dir: str | Path) -> Run:
    """Load the sealed cells of a run directory; those with damaged files are named and left out.

    Args:
        run_dir: Directory that holds `cells/`.

    Raises:
        UserError: It is no run directory, holds no whole cell, or a sealed file is of another schema.
    """
    path = Path(run_dir).resolve()
    folders = sorted(entry for entry in (path / "cells").glob("[!.]*") if entry.is_dir())
    if not folders:
        raise UserError(f"{run_dir} holds no cells", "give the folder that dllm-sparsity compare wrote, runs/<name>")
    plan = _maybe_json(path / "plan.json")
    planned = _planned(plan)  # cells that an earlier study left in the same folder do not belong to this one
    folders = [folder for folder in folders if planned is None or folder.name in planned]
    sealed = [folder for folder in folders if (folder / "DONE").is_file()]
    if not sealed:
        raise UserError(
            f"{run_dir} has {len(planned or folders)} cells and none is finished",
            "run dllm-sparsity compare again, it resumes",
        )
    found, damaged = _whole(sealed, _titles(plan))
    if not found:
        raise UserError(
            f"the files of all {len(damaged)} finished cells of {run_dir} are damaged; the first is {damaged[0]}",
            "run dllm-sparsity compare again: it computes damaged cells anew",
        )
    from dllm_sparsity.analysis.blocks import joined
    from dllm_sparsity.analysis.standing import standing

    search, unfounded = standing(read_search(path / "search.json"), found)
    answers = search.get("curves", []) if isinstance(search, dict) else []
    cells = sorted(joined(found, answers), key=_order)
    return Run(
        path=path,
        cells=tuple(cells),
        unsealed=len(planned or folders) - len(sealed),
        damaged=tuple(damaged),
        config=_text(path / "config.yaml"),
        plan=plan,
        environment=_maybe_json(path / "environment.json"),
        search=search,
        unfounded=unfounded,
    )


def _planned(plan: Any) -> set[str] | None:
    """Return the fingerprints of a plan, or None where there is no plan to go by."""
    return set(_titles(plan)) if isinstance(plan, list) else None


def _titles(plan: Any) -> dict[str, str]:
    entries = [entry for entry in plan if isinstance(entry, dict)] if isinstance(plan, list) else []
    return {
        entry["fingerprint"]: str(entry.get("title", ""))
        for entry in entries
        if isinstance(entry.get("fingerprint"), str)
    }


def _whole(folders: list[Path], titles: dict[str, str]) -> tuple[list[Cell], list[str]]:
    """Return the cells whose files have the checksums that they were sealed with, and what is wrong with the others."""
    found, damaged = [], []
    for folder in folders:
        damage = find_damage(folder)
        if damage is None:
            found.append(Cell(folder, read_record(folder / "cell.json")))
        else:
            title = titles.get(folder.name)
            damaged.append(f"cell {folder.name}{f' ({title})' if title else ''}: {damage}")
    return found, damaged


def _order(cell: Cell) -> tuple[Any, ...]:
    record = cell.record
    strength = record["strength"] if record["strength"] is not None else 0.0
    site, rule = record["site"] or "", record["rule"] or ""
    names = (record["paradigm"], record["model"], record["task"])
    return *names, not record["dense"], record.get("replicate", 0), rule, site, strength, cell.folder


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")[:LARGEST_TEXT] if path.is_file() else ""
    except OSError:
        return ""


def _maybe_json(path: Path) -> Any:
    return read_json(path) if path.is_file() else None
