"""Run one cell: attach the rule, let lm-eval ask the backend, seal what came out."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

import pyarrow as pa

from dllm_sparsity.errors import UserError
from dllm_sparsity.study import collect
from dllm_sparsity.study.attached import Host, prepared
from dllm_sparsity.study.environment import describe_data, describe_model
from dllm_sparsity.study.journal import CellJournal
from dllm_sparsity.study.plan import Cell, item_order
from dllm_sparsity.study.records import SCHEMA_VERSION, CellRecord
from dllm_sparsity.study.rundir import RunDir
from dllm_sparsity.study.setting import Setting
from dllm_sparsity.study.tasks import LoadedTask


def run_cell(
    cell: Cell,
    task: LoadedTask,
    host: Host,
    fingerprint: str,
    parts: dict[str, Any],
    environment: dict[str, Any],
    rundir: RunDir,
) -> None:
    """Run and seal one cell.

    Args:
        cell: What to run.
        task: The task, loaded.
        host: Where the model is.
        fingerprint: Name of the cell's folder.
        parts: What the fingerprint was made of.
        environment: Versions and machine.
        rundir: Where it is sealed.

    Raises:
        UserError: The task asks for what the backend cannot do, a site is missing, or the disk is full.
    """
    from lm_eval.evaluator import evaluate

    lm, setting = host.lm, Setting.of(cell, parts["seed"])
    if cell.replicate and not hasattr(lm, "order_seed"):
        raise UserError(
            f"backend {cell.model.paradigm} cannot batch its requests in another order", "leave out replicates"
        )
    layers = cell.rule.layers if cell.rule is not None else None
    task.task.set_fewshot_seed(seed=parts["seed"])  # lm-eval draws on from cell to cell; pairs need the same examples
    chosen = None
    if cell.block is not None:
        chosen = sorted(item_order(task.items, parts["seed"])[slice(*cell.block)])
    started = time.perf_counter()
    with prepared(lm, setting):
        with (
            host.attached(setting) as source,
            closing(CellJournal(rundir.journal_path(fingerprint), fingerprint, source, rundir.tell)) as journal,
        ):
            lm.journal, lm.check_greedy = journal, needs_greedy(task.task)
            lm.order_seed = cell.replicate or None
            results: Any = evaluate(
                lm,
                {"tasks": {task.name: task.task}},
                limit=cell.task.limit if chosen is None else None,
                samples=None if chosen is None else {task.name: chosen},
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=cell.task.chat_template,
                confirm_run_unsafe_code=cell.task.run_code,
            )
            facts = host.facts(setting)
        estimator = lm.estimator
        steps, per_item, notes = journal.finish()
    seconds = time.perf_counter() - started + journal.replayed_seconds - source.others_seconds
    samples = collect.sample_table(task, _placed(results["samples"][task.name], chosen), lm.log, per_item)
    samples = _named(samples, chosen)
    if not len(samples):
        raise UserError(f"task {task.name} gave no items", "raise --limit, or choose another task")
    generates = task.output_type == "generate_until"
    record: CellRecord = {
        "schema": SCHEMA_VERSION,
        "fingerprint": fingerprint,
        "paradigm": cell.model.paradigm,
        "backend": cell.model.paradigm,
        "model": cell.model.name,
        "model_id": cell.model.model,
        "task": task.name,
        "output_type": task.output_type,
        "dense": cell.rule is None,
        "rule": cell.rule.name if cell.rule else None,
        "rule_parameters": dict(cell.rule.parameters) if cell.rule else {},
        "strength": cell.strength,
        "site": cell.site,
        "sites_recorded": list(cell.sites),
        "layers": list(layers) if layers is not None else None,
        "qualities": collect.qualities(task.task, samples),
        "estimator": None if generates else estimator,
        "shifted_steps": cell.model.paradigm == "autoregressive",
        "ffn": facts.ffn,
        "simulated": True,
        "items": len(samples),
        "totals": {**collect.totals(samples), "wall_seconds": seconds},
        "parts": parts,
        "environment": {
            **environment,
            "model": describe_model(facts.model, cell.model, parts["weights"]),
            "data": describe_data(task.task, samples["prompt_hash"].to_pylist()),
        },
        "notes": [*notes, *facts.shims],
    }
    if cell.replicate:
        record["replicate"] = cell.replicate
        if journal.batches < 2:
            record["notes"].append(f"{task.name} on {cell.model.name} is one batch: run again it is the same batch")
    rundir.seal(fingerprint, dict(record), samples, steps)


def _placed(answers: list[dict], chosen: list[int] | None) -> list[dict]:
    """Number samples as requests are: lm-eval numbers requests within the chosen items, samples within all."""
    if chosen is None:
        return answers
    places = {document: place for place, document in enumerate(chosen)}
    return [{**answer, "doc_id": places[answer["doc_id"]]} for answer in answers]


def _named(samples: pa.Table, chosen: list[int] | None) -> pa.Table:
    """Number items as the task does."""
    if chosen is None:
        return samples
    index = samples.column_names.index("doc_id")
    documents = pa.array([chosen[place] for place in samples["doc_id"].to_pylist()], type=pa.int64())
    return samples.set_column(index, samples.schema.field("doc_id"), documents)


def needs_greedy(task: Any) -> bool:
    """Tell whether a task looks at is_greedy; of multiple choice only exact_match does.

    Args:
        task: lm-eval's object.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return True
    return "exact_match" in getattr(task, "_metric_fn_list", {})
