"""Checks of untrusted result files: a cell.json and its two tables are what the record schema says, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from dllm_sparsity.analysis.arrow import pc
from dllm_sparsity.errors import UserError
from dllm_sparsity.study.records import CellRecord, find_flaw, parse_json

LARGEST_JSON_BYTES = 64 * 2**20
_NUMBER, _MAYBE = (int, float), (int, float, type(None))
_STEP: dict[str, tuple[type, ...]] = {"strength": _NUMBER, "sparsity": _MAYBE, "items": (int,)}
_ANSWER: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("paradigm", "model", "task", "rule", "site", "quality", "kind", "stopped"), (str,)),
    **dict.fromkeys(("items", "items_available", "evaluations"), (int,)),
    "rule_parameters": (dict,),
    "layers": (list, type(None)),
    "retention": _NUMBER,
    "width": _NUMBER,
    "value": _MAYBE,
    "interval": (list, type(None)),
    "dense": (dict,),
    "path": (list,),
}
_ALLOCATION: dict[str, tuple[type, ...]] = {"rule": (dict,), "sensitivities": (list,)}
MUST_BE_TOLD = ("phase", "step", "layer", "site", "rows", "kept", "total")
_LEFT_OPEN = {"branch": "cond", "token_state": "unknown", "expert": -1}


def damaged(path: Path, why: str) -> UserError:
    """Return the error for a result file that cannot be used.

    Args:
        path: The file.
        why: What is wrong with it.
    """
    hint = f"delete {path.parent} and run the study again"
    if path.parent.parent.name != "cells":  # what stands beside the cells is made from them
        hint = "run dllm-sparsity compare again: it writes this file anew and keeps the cells"
    return UserError(f"{path.parent.name}/{path.name} cannot be used: {why}", hint)


def read_json(path: Path) -> Any:
    """Read one JSON file strictly: no NaN, no Infinity, no number beyond 64 bits, a bounded size.

    Args:
        path: The file.

    Raises:
        UserError: It is missing, too large or not JSON.
    """
    try:
        if path.stat().st_size > LARGEST_JSON_BYTES:
            raise damaged(path, f"larger than {LARGEST_JSON_BYTES // 2**20} MiB")
        return parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise damaged(path, error.strerror or "it cannot be read") from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"not JSON ({error})") from error


def read_record(path: Path) -> CellRecord:
    """Read cell.json and check every field that the analysis relies on.

    Args:
        path: The file; its folder is named by the fingerprint.

    Raises:
        UserError: A field is missing or of another type, or the file is of another schema or cell.
    """
    record = read_json(path)
    if (flaw := find_flaw(record)) is not None:
        raise damaged(path, flaw)
    if record["fingerprint"] != path.parent.name:
        raise damaged(path, f"it belongs to cell {record['fingerprint'][:40]}")
    return cast(CellRecord, record)


def read_search(path: Path) -> Any:
    """Read search.json; None where there is none.

    Args:
        path: The file.

    Raises:
        UserError: It is not JSON, or an answer lacks what the analysis relies on.
    """
    search = read_json(path) if path.is_file() else None
    if search is None:
        return None
    if not isinstance(search, dict):
        raise damaged(path, "not an object")
    averages = search.get("averages", [])
    if isinstance(averages, list):  # older versions wrote others, which are passed over
        averages = [own for own in averages if not isinstance(own, dict) or "measured" in own]
    for name, answers in (("curves", search.get("curves", [])), ("averages", averages)):
        if not isinstance(answers, list) or not all(map(_is_answer, answers)):
            raise damaged(path, f"{name} is not a list of answers")
    for own in averages:
        tasks, counts = own.get("tasks", []), own.get("measured", {})
        if not isinstance(tasks, list) or not isinstance(counts, dict):
            raise damaged(path, "an average does not name its tasks")
        if not all(isinstance(each, list) and len(each) == len(tasks) for each in counts.values()):
            raise damaged(path, "an average does not say what was measured of each task")
    return search


def _is_answer(answer: Any) -> bool:
    """Tell whether an answer of a search has the fields that the analysis relies on."""
    allocation = answer.get("allocation") if isinstance(answer, dict) else None
    return (
        _has(answer, _ANSWER)
        and all(_has(step, _STEP) for step in answer["path"])
        and all(isinstance(end, _NUMBER) for end in answer["interval"] or [])
        and len(answer["interval"] or [0, 0]) == 2
        and (allocation is None or isinstance(allocation, dict))
        and (not allocation or "rule" not in allocation or _has(allocation, _ALLOCATION))
    )


def _has(value: Any, fields: dict[str, tuple[type, ...]]) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), types) for name, types in fields.items())


def read_table(path: Path, required: dict[str, pa.DataType], optional: dict[str, pa.DataType]) -> pa.Table:
    """Read a Parquet table, keep the columns of the schema, and cast them to its types.

    Args:
        path: The file.
        required: Columns that must be there.
        optional: Columns that are kept where they are there.

    Raises:
        UserError: It is missing, not Parquet, lacks a column or holds another type.
    """
    try:
        table = pq.ParquetFile(path).read()
    except (OSError, pa.ArrowException) as error:
        raise damaged(path, f"not a readable Parquet file ({str(error).splitlines()[0][:120]})") from error
    if lacking := [name for name in required if name not in table.column_names]:
        raise damaged(path, f"column {', '.join(lacking)} is missing")
    wanted = required | {name: kind for name, kind in optional.items() if name in table.column_names}
    try:
        return table.select(list(wanted)).cast(pa.schema(wanted))
    except pa.ArrowException as error:
        raise damaged(path, f"a column is of the wrong type ({str(error).splitlines()[0][:120]})") from error


def complete_steps(path: Path, steps: pa.Table) -> pa.Table:
    """Return step records without nulls: columns that may be left open get the value of a plain loop.

    Args:
        path: The file the table came from.
        steps: Rows in the step schema.

    Raises:
        UserError: A column that must be told is null somewhere.
    """
    for name in steps.column_names:
        if steps[name].null_count and name in MUST_BE_TOLD:
            raise damaged(path, f"{name} is null in {steps[name].null_count} rows")
        if steps[name].null_count:
            filled = pc.fill_null(steps[name], _LEFT_OPEN.get(name, 0))
            steps = steps.set_column(steps.column_names.index(name), name, filled)
    return steps


def check_counts(path: Path, table: pa.Table, pairs: list[tuple[str, str]]) -> None:
    """Check that every count lies between zero and its total.

    Args:
        path: The file the table came from.
        table: The table.
        pairs: Columns (count, total).

    Raises:
        UserError: A count is negative or larger than its total.
    """
    for count, total in pairs:
        sound = pc.and_(pc.greater_equal(table[count], 0), pc.less_equal(table[count], table[total]))
        if pc.all(sound, min_count=0).as_py() is False:
            raise damaged(path, f"{count} is negative or larger than {total}")
