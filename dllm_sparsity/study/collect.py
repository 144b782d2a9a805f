"""From what lm-eval and a tracker return to the two tables and the record of a cell."""

from __future__ import annotations

import hashlib
import json
import math
import numbers
from typing import Any

import pyarrow as pa

from dllm_sparsity.study.records import PRIMITIVE_SITES, Quality, samples_schema, steps_schema
from dllm_sparsity.study.tasks import LoadedTask


def sample_table(task: LoadedTask, samples: list[dict], log: dict, per_item: dict) -> pa.Table:
    """Return samples.parquet of a cell; of several filters the first is kept.

    Args:
        task: The task, loaded.
        samples: lm-eval's logged samples.
        log: Item -> what the backend logged.
        per_item: Item -> site -> (kept, total).
    """
    rows: dict[str, list] = {field.name: [] for field in samples_schema()}
    first = samples[0]["filter"] if samples else None
    for sample in samples:
        if sample["filter"] != first:
            continue
        place = (task.name, sample["doc_id"])
        entry, counts = log[place], per_item.get(place, {})
        metrics = {key: value for key in sample["metrics"] if (value := _number(sample[key])) is not None}
        row = {
            "task": task.name,
            "doc_id": sample["doc_id"],
            "doc_hash": sample["doc_hash"],
            "prompt_hash": sample["prompt_hash"],
            "filter": sample["filter"],
            "answer": _answer(task.task, sample, entry),
            "correct": next(iter(metrics.values()), None),
            "metrics": json.dumps(metrics),
            "target": sample["target"] if isinstance(sample["target"], int) and len(entry.loglikelihoods) > 1 else None,
            "loglikelihoods": entry.loglikelihoods,
            "loglikelihood_errors": [None if math.isnan(error) else error for error in entry.errors],
            "target_tokens": entry.target_tokens,
            "answer_tokens": entry.answer_tokens,
            "nfe": entry.nfe,
            "new_tokens": entry.new_tokens,
            "seconds": entry.seconds,
        }
        for site in PRIMITIVE_SITES:
            row[f"kept_{site}"], row[f"total_{site}"] = counts.get(site, (None, None))
        for key, column in rows.items():
            column.append(row[key])
    table = pa.table(rows, schema=samples_schema())
    if task.shared is None:
        return table
    texts = [str(sample["doc"][task.shared]) for sample in samples if sample["filter"] == first]
    groups = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]
    return table.append_column("group", pa.array(groups, pa.string()))


def _choices(task: Any, loglikelihoods: list[float]) -> list[float]:
    """Return the scores of the choices in context; acc_mutual_info has each scored again without context."""
    twice = "acc_mutual_info" in getattr(task, "_metric_fn_list", {})
    return loglikelihoods[: len(loglikelihoods) // 2] if twice else loglikelihoods


def _answer(task: Any, sample: dict, entry: Any) -> str:
    if len(entry.loglikelihoods) > 1:
        choices = _choices(task, entry.loglikelihoods)
        return str(max(range(len(choices)), key=choices.__getitem__))
    response = sample["filtered_resps"][0]
    if isinstance(response, list) and response:  # programs are scored as lists of candidates
        response = response[0]
    return response if isinstance(response, str) else ""


def _number(value: Any) -> float | None:
    """Return a finite number; lm-eval also returns pairs and texts that only its own aggregations understand."""
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    return None


def step_table(columns: dict[str, list]) -> pa.Table:
    """Return steps.parquet of a cell.

    Args:
        columns: As a reading has them.
    """
    schema = steps_schema("rows_prev" in columns)
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def qualities(task: Any, samples: pa.Table) -> list[Quality]:
    """Return what a cell's quality is measured by; the first is the headline.

    Args:
        task: lm-eval's object.
        samples: The cell's samples.
    """
    better = task.higher_is_better()
    names = (
        [name for name in json.loads(samples["metrics"][0].as_py()) if better.get(name, True)] if len(samples) else []
    )
    values = {name: [json.loads(text).get(name) for text in samples["metrics"].to_pylist()] for name in names}
    found: list[Quality] = []
    for name in names:
        kind = _kind(name, values[name])
        chance = None
        if kind == "accuracy" and task.OUTPUT_TYPE == "multiple_choice":
            sizes = [len(_choices(task, lls)) for lls in samples["loglikelihoods"].to_pylist()]
            chance = sum(1 / max(1, size) for size in sizes) / len(sizes)
        found.append({"name": name, "kind": kind, "chance": chance})
    nll: Quality = {"name": "nll", "kind": "nll", "chance": None}
    if task.OUTPUT_TYPE == "generate_until":
        return [*found, {"name": "agreement", "kind": "agreement", "chance": None}]
    return [nll] if task.OUTPUT_TYPE == "loglikelihood_rolling" else [*found, nll]


def _kind(name: str, values: list[float | None]) -> str:
    if name.endswith("loglikelihood"):
        return "loglikelihood"
    return "accuracy" if all(value in (0.0, 1.0, None) for value in values) else "score"


def totals(samples: pa.Table) -> dict[str, Any]:
    """Return the sums of a cell.

    Args:
        samples: The cell's samples.
    """

    def total(name: str) -> Any:
        return sum(value for value in samples[name].to_pylist() if value is not None)

    sites = {
        site: {"kept": total(f"kept_{site}"), "total": total(f"total_{site}")}
        for site in PRIMITIVE_SITES
        if total(f"total_{site}")
    }
    return {"nfe": total("nfe"), "new_tokens": total("new_tokens"), "seconds": total("seconds"), "sites": sites}
