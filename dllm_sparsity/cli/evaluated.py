"""What dllm-sparsity eval leaves behind: a table on the terminal, and its records beside lm-eval's results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm_sparsity.errors import UserError

_SCHEMA = 1


def summarize(reading: Any, lm: Any, model: str, model_args: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was asked and achieved, per site and per task.

    Args:
        reading: The counts of all processes.
        lm: The backend that ran.
        model: Its name in lm-eval.
        model_args: Its model arguments.
    """
    from dllm_sparsity import registry
    from dllm_sparsity.lm.items import site_totals
    from dllm_sparsity.study.environment import describe

    by_task: dict[str, dict] = {}
    for item, sites in reading.per_item.items():
        by_task.setdefault(str(item[0]), {})[item] = sites
    rule = lm.tracker.rule
    return {
        "schema": _SCHEMA,
        "model": model,
        "model_args": dict(model_args),
        "rule": None if rule is None else registry.name_of("rules", type(rule)),
        "strength": None if rule is None else rule.strength,
        "sites": list(lm.tracker.sites),
        "estimator": lm.estimator,
        "simulated": True,
        "processes": lm.world_size,
        "totals": site_totals(reading.per_item),
        "tasks": {task: {"items": len(items), **site_totals(items)} for task, items in sorted(by_task.items())},
        "notes": list(reading.notes),
        "environment": describe(str(lm.call.device), lm.seed),
    }


def table(summary: dict[str, Any]) -> str:
    """Return the summary as lines of text.

    Args:
        summary: As `summarize` returns it.
    """
    rule = "dense" if summary["rule"] is None else f"{summary['rule']} {summary['strength']:g}"
    lines = [f"Sparsity, {rule}: share of activations that were zero (masks simulated, padding left out)"]
    rows = [("task", "items", "site", "sparsity", "activations")]
    for task, sites in summary["tasks"].items():
        for site, counts in ((name, value) for name, value in sites.items() if name != "items"):
            rows.append((task, str(sites["items"]), site, f"{counts['sparsity']:.4f}", f"{counts['total']:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *(f"note: {note}" for note in summary["notes"])])


def write(
    reading: Any, log: Mapping[Any, Any], summary: dict[str, Any], results: Path, indices: Mapping[str, list[int]]
) -> Path:
    """Write the records under the date of lm-eval's results file, and return the small JSON that names them.

    Args:
        reading: The counts of all processes.
        log: What the backend logged of each item.
        summary: As `summarize` returns it.
        results: lm-eval's file.
        indices: Task -> the documents that were chosen of it; all of a task that is not there.

    Raises:
        UserError: The folder cannot be written to.
    """
    import pyarrow.parquet as pq

    from dllm_sparsity.study.collect import step_table

    date = results.stem.rpartition("_")[2]
    steps, items = results.with_name(f"steps_{date}.parquet"), results.with_name(f"items_{date}.parquet")
    record = results.with_name(f"sparsity_{date}.json")
    files = {"results": results.name, "steps": steps.name, "items": items.name}
    try:
        pq.write_table(step_table(reading.columns), steps)
        pq.write_table(item_table(reading.per_item, log, indices), items)
        record.write_text(json.dumps({**summary, "files": files}, indent=2, default=str), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write beside {results}: {error}", "free space, or give another --output_path"
        ) from error
    return record


def item_table(per_item: Mapping[Any, Any], log: Mapping[Any, Any], indices: Mapping[str, list[int]]) -> Any:
    """Return one row an item: its log-likelihoods, forward passes and counts; to pair runs by.

    Args:
        per_item: Item -> site -> (kept, total).
        log: What the backend logged of each item.
        indices: As in `write`.
    """
    import pyarrow as pa

    from dllm_sparsity.study.records import PRIMITIVE_SITES, SAMPLE_COLUMNS

    names = ["task", "doc_id", "loglikelihoods", "loglikelihood_errors", "target_tokens", "answer_tokens"]
    names += ["nfe", "new_tokens", "seconds"]
    rows = []
    for item in sorted(log, key=lambda item: (str(item[0]), item[1])):
        entry, counts = log[item], per_item.get(item, {})
        document = indices[item[0]][item[1]] if item[0] in indices else item[1]
        row = {"task": item[0], "doc_id": document, "loglikelihood_errors": entry.errors}
        row |= {name: getattr(entry, name) for name in names if name not in row}
        for site in PRIMITIVE_SITES:
            row[f"kept_{site}"], row[f"total_{site}"] = counts.get(site, (None, None))
        rows.append(row)
    fields = [*names, *(f"{count}_{site}" for site in PRIMITIVE_SITES for count in ("kept", "total"))]
    return pa.Table.from_pylist(rows, schema=pa.schema({name: SAMPLE_COLUMNS[name] for name in fields}))
