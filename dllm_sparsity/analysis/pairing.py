"""Pair the items of several cells by task, document and filter, and refuse items that are not the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        notes: What was left out, in words.
    """

    keys: tuple[Key, ...]
    tables: tuple[pa.Table, ...]
    notes: tuple[str, ...]


def pair(cells: Sequence[Cell]) -> Paired:
    """Pair the items of cells; the first cell names the filter.

    A task with several answer filters has a row for each; the first one in the first cell is used.

    Args:
        cells: The dense cell first.

    Raises:
        UserError: An item occurs twice, was another document or another prompt, or nothing is shared.
    """
    filters = cells[0].samples["filter"].unique().to_pylist()
    chosen = filters[0] if filters else None
    rows = [_rows(cell, chosen) for cell in cells]
    shared = sorted(set(rows[0]).intersection(*rows[1:]))
    if not shared:
        raise UserError(
            f"the cells of task {cells[0].record['task']} on {cells[0].record['model']} share no item",
            "runs must use one task version and one limit: start a fresh run",
        )
    tables = tuple(
        cell.samples.take(pa.array([own[key] for key in shared])) for cell, own in zip(cells, rows, strict=True)
    )
    for cell, table in zip(cells[1:], tables[1:], strict=True):
        for column in ("doc_hash", "prompt_hash"):
            _refuse_mismatch(cells[0], cell, column, shared, tables[0], table)
    notes = []
    if len(filters) > 1:
        notes.append(f"{cells[0].record['task']} has the filters {', '.join(map(str, filters))}; {chosen} is shown")
    if dropped := max(map(len, rows)) - len(shared):
        notes.append(f"{dropped} items of {cells[0].record['task']} are not in every cell and are left out")
    return Paired(tuple(shared), tables, tuple(notes))


def _rows(cell: Cell, chosen: str | None) -> dict[Key, int]:
    names = (cell.samples[column].to_pylist() for column in ("task", "doc_id", "filter"))
    rows: dict[Key, int] = {}
    for row, (task, doc, name) in enumerate(zip(*names, strict=True)):
        if name != chosen:
            continue
        key = (task or "", -1 if doc is None else doc, name or "")
        if key in rows:
            raise UserError(
                f"document {doc} of {task} occurs twice in cell {cell.record['fingerprint'][:12]}",
                f"delete {cell.folder} and run the study again",
            )
        rows[key] = row
    return rows


def _refuse_mismatch(
    dense: Cell, other: Cell, column: str, keys: Sequence[Key], first: pa.Table, second: pa.Table
) -> None:
    for key, ours, theirs in zip(keys, first[column].to_pylist(), second[column].to_pylist(), strict=True):
        if ours != theirs:
            raise UserError(
                f"{column} of document {key[1]} of {key[0]} differs between cells"
                f" {dense.record['fingerprint'][:12]} and {other.record['fingerprint'][:12]}",
                "these cells saw different items and cannot be compared; start a fresh run",
            )
