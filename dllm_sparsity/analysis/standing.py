"""Which answers of a search still stand on whole cells: what was measured for the others is damaged or not there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dllm_sparsity.analysis.blocks import Answer, blocks_of, is_part, is_probe
from dllm_sparsity.analysis.loading import Cell

_CURVE = ("paradigm", "model", "task", "rule", "site", "rule_parameters")


def standing(search: Any, cells: Sequence[Cell]) -> tuple[Any, tuple[str, ...]]:
    """Return a search without what its cells no longer say, and what is left out, in words.

    Args:
        search: What search.json holds, or None.
        cells: The sealed cells whose files are whole.
    """
    if not isinstance(search, dict) or not search:
        return None, ()
    answers = search.get("curves", [])
    averages = [own for own in search.get("averages", []) if "measured" in own]  # before: means of critical sparsities
    reached: dict[str, int] = {}
    for cell in blocks_of(cells):
        key = _key_of(cell)
        reached[key] = max(reached.get(key, 0), cell.record["items"])
    alone = {_key_of(cell) for cell in cells if is_probe(cell)}
    whole = [answer for answer in answers if _is_measured(answer, reached)]
    kept = [_with_allocation(answer, whole, alone) for answer in whole]
    sound = _sound(averages, [cell for cell in cells if is_part(cell)])
    told = [
        f"the answer of the search for {_place(answer)}"
        for answer in [*answers, *averages]
        if answer not in whole and answer not in sound
    ]
    told += [
        f"the strengths by layer for {_place(before)}"
        for before, now in zip(whole, kept, strict=True)
        if now is not before
    ]
    if not told:
        return {**search, "averages": averages}, ()
    return {"curves": kept, "averages": sound}, tuple(dict.fromkeys(told))


def _sound(averages: Sequence[Answer], parts: Sequence[Cell]) -> list[Answer]:
    """Return the answers on averages for which every task's part is there on as many items as were measured."""
    items: dict[str, int] = {}
    for cell in parts:
        key = _key_of(cell)
        items[key] = items.get(key, 0) + cell.record["items"]
    return [
        answer
        for answer in averages
        if all(
            items.get(_key({**answer, "task": task}, at, answer["layers"]), 0) >= count
            for at, counts in _measured(answer)
            for task, count in zip(answer["tasks"], counts, strict=True)
        )
    ]


def _measured(answer: Answer) -> list[tuple[float | None, list[int]]]:
    return [(None if at == "dense" else float(at), counts) for at, counts in answer["measured"].items()]


def _is_measured(answer: Answer, reached: dict[str, int]) -> bool:
    """Tell whether every strength of the search, and dense, is there on as many items as it was measured on."""
    measured = [(own["strength"], own["items"]) for own in answer["path"]]
    most = max([answer["items"], *(items for _, items in measured)])
    return reached.get(_key(answer, None, None), 0) >= most and all(
        reached.get(_key(answer, at, answer["layers"]), 0) >= items for at, items in measured
    )


def _with_allocation(answer: Answer, whole: Sequence[Answer], alone: set[str]) -> Answer:
    """Return an answer without its allocation where layers alone, or the search along it, are not there."""
    own = answer.get("allocation")
    if not own or "rule" not in own:
        return answer
    layers = [(at, list(each["layers"])) for each in own["sensitivities"] for at in each["strengths"]]
    is_along = any(each["rule_parameters"] == own["rule"]["parameters"] for each in whole)
    if is_along and all(_key(answer, *each) in alone for each in layers):
        return answer
    return {name: value for name, value in answer.items() if name != "allocation"}


def _key_of(cell: Cell) -> str:
    return _key(cell.record, cell.record["strength"], cell.record["layers"])


def _key(own: Any, strength: float | None, layers: Any) -> str:
    names = _CURVE if strength is not None else _CURVE[:3]
    return json.dumps([[own[name] for name in names], strength, layers if strength is not None else None])


def _place(answer: Answer) -> str:
    return (
        f"{answer['task']}, {answer['rule']} at {answer['site']}, {answer['paradigm']} ({answer['model']}),"
        f" {100 * answer['retention']:g} %"
    )
