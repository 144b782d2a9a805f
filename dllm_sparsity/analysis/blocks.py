"""Join the blocks of items that a search measured into whole cells, and hand its answers to the curves they are of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pyarrow as pa

from dllm_sparsity.analysis.loading import Cell
from dllm_sparsity.study.records import CellRecord

Answer = dict[str, Any]


@dataclass(frozen=True)
class JoinedCell(Cell):
    """Blocks of one setting, read as one cell.

    Args:
        blocks: The sealed cells, in the search's order of items.
    """

    blocks: tuple[Cell, ...] = ()

    @property
    def places(self) -> list[list[int]]:
        """Return which items the blocks hold: the first of each, and one behind the last."""
        return [_items(block) for block in self.blocks]

    @cached_property
    def samples(self) -> pa.Table:
        """Return one row per item."""
        return pa.concat_tables([block.samples for block in self.blocks], promote_options="default")

    @property
    def steps(self) -> pa.Table:
        """Return the step records of all blocks."""
        return pa.concat_tables([block.steps for block in self.blocks], promote_options="default")


def joined(cells: Sequence[Cell], answers: Sequence[Answer]) -> list[Cell]:
    """Return cells with blocks joined, and searches on the dense cells they start from.

    Of a search, the strength is kept that was measured on most items, and others on the same ones; the dense cell has
    all the others.
    Where a dense cell of all items was run as well, it stands for the search's own.

    Args:
        cells: Sealed cells.
        answers: What search.json holds of each curve and retention.
    """
    whole = [cell for cell in cells if not is_block(cell)]
    dense = {_place(cell) for cell in whole if cell.record["dense"] and not cell.record.get("replicate")}
    found = blocks_of(_paired(cells, dense))
    best: dict[str, JoinedCell] = {}
    for cell in found:
        if not cell.record["dense"]:
            before = best.get(_curve(cell.record))
            if before is None or cell.record["items"] > before.record["items"]:
                best[_curve(cell.record)] = cell
    elsewhere = []
    for cell in found:
        if cell.record["dense"]:
            whole += [] if _place(cell) in dense else [cell]
        elif cell.places == best[_curve(cell.record)].places:
            whole.append(cell)
        else:
            elsewhere.append(cell)
    return [searched_from(cell, answers, elsewhere) for cell in whole]


def blocks_of(cells: Sequence[Cell]) -> list[JoinedCell]:
    """Return the blocks of each setting as one cell.

    Args:
        cells: Sealed cells; what is no block of a curve is passed over.
    """
    grouped: dict[str, list[Cell]] = {}
    for cell in cells:
        if is_block(cell) and not is_probe(cell):
            grouped.setdefault(_setting(cell), []).append(cell)
    return [_join(group) for group in grouped.values()]


def is_block(cell: Cell) -> bool:
    """Tell whether a cell holds only a block of items that a search asked for.

    Args:
        cell: The cell.
    """
    return isinstance(cell.record.get("parts"), dict) and "block" in cell.record["parts"]


def is_probe(cell: Cell) -> bool:
    """Tell whether a cell only helped a search to plan others, or an average, so that it belongs to no curve of a task.

    Args:
        cell: The cell.
    """
    return _is_marked(cell, "probe") or is_part(cell)


def is_part(cell: Cell) -> bool:
    """Tell whether a cell is a task's part of a search on the average over tasks.

    Args:
        cell: The cell.
    """
    return _is_marked(cell, "average")


def _is_marked(cell: Cell, name: str) -> bool:
    return isinstance(cell.record.get("parts"), dict) and cell.record["parts"].get(name) is True


def answers_of(cell: Cell, rule: CellRecord) -> list[Answer]:
    """Return what was searched on a curve, on whichever quality.

    Args:
        cell: Its dense cell.
        rule: Record of one of its other cells.
    """
    return [own for own in cell.searches if is_of(own, rule)]


def is_of(answer: Answer | CellRecord, rule: CellRecord) -> bool:
    """Tell whether an answer is of the curve that a cell belongs to.

    Args:
        answer: What search.json holds of a curve, or the record of a cell that was searched on it.
        rule: Record of the cell; it is not dense.
    """
    return _curve(answer) == _curve(rule)


def _paired(cells: Sequence[Cell], dense: set[tuple[Any, ...]]) -> list[Cell]:
    """Return cells without blocks whose dense answers are damaged or not there: nothing can be said of them."""
    there = {(_place(cell), *_items(cell)) for cell in cells if is_block(cell) and cell.record["dense"]}
    return [
        cell for cell in cells if not is_block(cell) or _place(cell) in dense or (_place(cell), *_items(cell)) in there
    ]


def _items(cell: Cell) -> list[int]:
    return cell.record["parts"]["block"]


def _join(blocks: list[Cell]) -> JoinedCell:
    ordered = sorted(blocks, key=_items)
    chain = [ordered[0]]
    for cell in ordered[1:]:
        if _items(cell)[0] >= _items(chain[-1])[1]:
            chain.append(cell)
    record = dict(chain[0].record)
    record["items"] = sum(cell.record["items"] for cell in chain)
    record["totals"] = _added([cell.record["totals"] for cell in chain])
    record["notes"] = list(dict.fromkeys(note for cell in chain for note in cell.record["notes"]))
    return JoinedCell(chain[0].folder, record, blocks=tuple(chain))  # pyright: ignore[reportArgumentType]


def _added(totals: Sequence[dict[str, Any]]) -> dict[str, Any]:
    added: dict[str, Any] = {}
    for own in totals:
        for name, value in own.items():
            if isinstance(value, dict):
                added[name] = _added([added.get(name, {}), value])
            elif isinstance(value, int | float):
                added[name] = added.get(name, 0) + value
            else:
                added.setdefault(name, value)
    return added


def searched_from(cell: Cell, answers: Sequence[Answer], elsewhere: Sequence[Cell]) -> Cell:
    """Return a dense cell with what was searched from it; any other cell as it is.

    Args:
        cell: The cell.
        answers: What search.json holds of each curve and retention.
        elsewhere: Strengths that searches measured on other items than those of the curves' points; the first of a
            setting is taken.
    """
    if not cell.record["dense"] or cell.record.get("replicate"):
        return cell
    own = tuple(answer for answer in answers if _place(cell) == tuple(answer[name] for name in _PLACE))
    others = {_setting(own): own for own in reversed(elsewhere) if _place(own) == _place(cell)}
    return replace(cell, searches=own, elsewhere=tuple(others.values())) if own else cell


_PLACE = ("paradigm", "model", "task")


def _place(cell: Cell) -> tuple[Any, ...]:
    return tuple(cell.record[name] for name in _PLACE)


def _curve(own: Any) -> str:
    return json.dumps([own[name] for name in (*_PLACE, "rule", "site", "layers", "rule_parameters")], sort_keys=True)


def _setting(cell: Cell) -> str:
    return json.dumps([_curve(cell.record), cell.record["strength"], cell.record["sites_recorded"]])
