"""Checks of untrusted result files: a cell.json and its two tables are what the record schema says, or an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn, cast

import pyarrow as pa
import pyarrow.parquet as pq

from dllm_sparsity.analysis.arrow import pc
from dllm_sparsity.errors import UserError
from dllm_sparsity.study.records import SCHEMA_VERSION, CellRecord

LARGEST_JSON_BYTES = 64 * 2**20
KINDS = ("accuracy", "nll", "loglikelihood", "agreement", "score")
_NUMBER = (int, float)
_FIELDS: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "fingerprint": (str,),
    "paradigm": (str,),
    "model": (str,),
    "task": (str,),
    "output_type": (str,),
    "dense": (bool,),
    "rule": (str, type(None)),
    "rule_parameters": (dict,),
    "strength": (*_NUMBER, type(None)),
    "site": (str, type(None)),
    "sites_recorded": (list,),
    "layers": (list, type(None)),
    "qualities": (list,),
    "estimator": (str, type(None)),
    "shifted_steps": (bool,),
    "ffn": (dict,),
    "simulated": (bool,),
    "items": (int,),
    "totals": (dict,),
    "notes": (list,),
}
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
    """Read one JSON file strictly: no NaN, no Infinity, a bounded size.

    Args:
        path: The file.

    Raises:
        UserError: It is missing, too large or not JSON.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        if path.stat().st_size > LARGEST_JSON_BYTES:
            raise damaged(path, f"larger than {LARGEST_JSON_BYTES // 2**20} MiB")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
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
    if not isinstance(record, dict):
        raise damaged(path, "not an object")
    for name, types in _FIELDS.items():
        if not isinstance(record.get(name), types) or (isinstance(record.get(name), bool) and bool not in types):
            raise damaged(path, f"{name} is missing or of the wrong type")
    if record["schema"] != SCHEMA_VERSION:
        raise damaged(path, f"schema {record['schema']}, this version reads schema {SCHEMA_VERSION}")
    if record["fingerprint"] != path.parent.name:
        raise damaged(path, f"it belongs to cell {record['fingerprint'][:40]}")
    if not record["dense"] and (record["site"] is None or record["rule"] is None):
        raise damaged(path, "a cell with a rule needs its rule and its site")
    again = record.get("replicate", 1)
    if type(again) is not int or again < 1 or ("replicate" in record and not record["dense"]):
        raise damaged(path, "replicate is not the number of a further dense run")
    sites = record["totals"].get("sites", {})
    counts = list(sites.values()) if isinstance(sites, dict) else [None]
    if not all(isinstance(own, dict) and all(isinstance(value, _NUMBER) for value in own.values()) for own in counts):
        raise damaged(path, "totals.sites is not a count for each site")
    for quality in record["qualities"]:
        if not isinstance(quality, dict) or not isinstance(quality.get("name"), str):
            raise damaged(path, "a quality without a name")
        if quality.get("kind") not in KINDS or not isinstance(quality.get("chance"), (*_NUMBER, type(None))):
            raise damaged(path, f"quality {quality['name'][:40]} is of an unknown kind")
    return cast(CellRecord, record)


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
