"""Pair the items of several cells by task, document and filter, and refuse items that are not the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dllm_sparsity.analysis.loading import Cell
from dllm_sparsity.errors import UserError

Key = tuple[str, int, str]


@dataclass(frozen=True)
class Paired:
    """The items that several cells share, in one order.

    Args:
        keys: Task, document and filter of each item.
        tables: One table per cell; row i of each is item i.
        left_out: Items that are not in every cell, at least.
        notes: What else is not shown, in words.
    """

    keys: tuple[Key, ...]
    tables: tuple[pa.Table, ...]
    left_out: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    table: pa.Table
    name: str
    remedy: str


def pair(cells: Sequence[Cell]) -> Paired:
    """Pair the items of cells; the first cell names the filter.

    A task with several answer filters has a row for each; the first one in the first cell is used.

    Args:
        cells: The dense cell first.

    Raises:
        UserError: An item occurs twice, was another document or another prompt, or nothing is shared.
    """
    record = cells[0].record
    sources = [
        _Source(
            cell.samples,
            f"cell {cell.record['fingerprint'][:12]}",
            f"delete {cell.folder} and run the study again",
        )
        for cell in cells
    ]
    return _pair(sources, record["task"], f"task {record['task']} on {record['model']}")


def pair_tables(tables: Sequence[pa.Table]) -> Paired:
    """Pair the items of sample tables, whatever the order of their rows.

    Args:
        tables: Tables in the schema of samples.parquet; the first one names the filter.

    Raises:
        UserError: An item occurs twice, was another document or another prompt, or nothing is shared.
    """
    sources = [_Source(table, f"table {number}", "give each item once") for number, table in enumerate(tables, start=1)]
    tasks = tables[0]["task"].unique().to_pylist()
    task = str(tasks[0]) if tasks else "no name"
    return _pair(sources, task, f"task {task}")


def item_groups(samples: pa.Table) -> np.ndarray | None:
    """Return the number of each item's group, from 0 without gaps; None where no two items share one, or all do.

    An item without a group stands alone; of one group alone there is nothing to resample.

    Args:
        samples: Items, with a column `group` where the task has groups: one passage, one subject, one twin pair.
    """
    if "group" not in samples.column_names:
        return None
    labels = samples["group"].to_pylist()
    named = [(row,) if label is None else label for row, label in enumerate(labels)]
    numbers = {label: number for number, label in enumerate(dict.fromkeys(named))}
    return np.array([numbers[label] for label in named], dtype=np.int64) if 1 < len(numbers) < len(named) else None


def _pair(sources: Sequence[_Source], task: str, place: str) -> Paired:
    filters = sources[0].table["filter"].unique().to_pylist()
    chosen = filters[0] if filters else None
    rows = [_rows(source, chosen) for source in sources]
    shared = sorted(set(rows[0]).intersection(*rows[1:]))
    if not shared:
        raise UserError(
            f"the cells of {place} share no item",
            "runs must use one task version and one limit: start a fresh run",
        )
    tables = tuple(
        source.table.take(pa.array([own[key] for key in shared])) for source, own in zip(sources, rows, strict=True)
    )
    for source, table in zip(sources[1:], tables[1:], strict=True):
        for column in ("doc_hash", "prompt_hash"):
            _refuse_mismatch(f"{sources[0].name} and {source.name}", column, shared, tables[0], table)
    notes = []
    if len(filters) > 1:
        notes.append(f"{task} has the filters {', '.join(map(str, filters))}; {chosen} is shown")
    return Paired(tuple(shared), tables, max(map(len, rows)) - len(shared), tuple(notes))


def _rows(source: _Source, chosen: str | None) -> dict[Key, int]:
    names = (source.table[column].to_pylist() for column in ("task", "doc_id", "filter"))
    rows: dict[Key, int] = {}
    for row, (task, doc, name) in enumerate(zip(*names, strict=True)):
        if name != chosen:
            continue
        key = (task or "", -1 if doc is None else doc, name or "")
        if key in rows:
            raise UserError(f"document {doc} of {task} occurs twice in {source.name}", source.remedy)
        rows[key] = row
    return rows


def _refuse_mismatch(places: str, column: str, keys: Sequence[Key], first: pa.Table, second: pa.Table) -> None:
    for key, ours, theirs in zip(keys, first[column].to_pylist(), second[column].to_pylist(), strict=True):
        if ours != theirs:
            raise UserError(
                f"{column} of document {key[1]} of {key[0]} differs between {places}",
                "these cells saw different items and cannot be compared; start a fresh run",
            )
