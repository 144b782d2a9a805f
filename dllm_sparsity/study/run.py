"""Run one cell: attach the rule, let lm-eval ask the backend, seal what came out."""

from __future__ import annotations

import time
from typing import Any

from dllm_sparsity.errors import UserError
from dllm_sparsity.sparsity.sparsifier import sparsify
from dllm_sparsity.study import collect
from dllm_sparsity.study.models import make_rule
from dllm_sparsity.study.plan import Cell
from dllm_sparsity.study.records import SCHEMA_VERSION, CellRecord
from dllm_sparsity.study.rundir import RunDir
from dllm_sparsity.study.tasks import LoadedTask


def run_cell(
    cell: Cell,
    task: LoadedTask,
    lm: Any,
    fingerprint: str,
    parts: dict[str, Any],
    environment: dict[str, Any],
    rundir: RunDir,
) -> None:
    """Run and seal one cell.

    Args:
        cell: What to run.
        task: The task, loaded.
        lm: The backend, loaded.
        fingerprint: Name of the cell's folder.
        parts: What the fingerprint was made of.
        environment: Versions and machine.
        rundir: Where it is sealed.

    Raises:
        UserError: The task asks for what the backend cannot do, a site is missing, or the disk is full.
    """
    from lm_eval.evaluator import evaluate

    rule = None
    if cell.rule is not None and cell.strength is not None:
        rule = make_rule(cell.rule.name, cell.strength, cell.rule.parameters)
    lm.log.clear()
    lm.check_greedy = needs_greedy(task.task)
    mc = getattr(lm, "mc", None)
    if cell.task.mc is not None and mc is not None:
        lm.mc = cell.task.mc
    layers = cell.rule.layers if cell.rule is not None else None
    task.task.set_fewshot_seed(seed=parts["seed"])  # lm-eval draws on from cell to cell; pairs need the same examples
    started = time.perf_counter()
    try:
        with sparsify(lm.model, rule, cell.sites, layers=layers, clock=lm.clock) as tracker:
            results: Any = evaluate(
                lm,
                {"tasks": {task.name: task.task}},
                limit=cell.task.limit,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=cell.task.chat_template,
                confirm_run_unsafe_code=cell.task.run_code,
            )
        estimator = lm.estimator
    finally:
        if mc is not None:
            lm.mc = mc
    seconds = time.perf_counter() - started
    reading = tracker.read()
    samples = collect.sample_table(task.task, task.name, results["samples"][task.name], lm.log, reading.per_item)
    if not len(samples):
        raise UserError(f"task {task.name} gave no items", "raise --limit, or choose another task")
    ffn = tracker.ffns[0]
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
        "ffn": {
            "d_model": ffn.d_model,
            "d_ffn": ffn.d_ffn,
            "num_layers": len({f.layer for f in tracker.ffns}),
            "gated": ffn.gated,
        },
        "simulated": True,
        "items": len(samples),
        "totals": {**collect.totals(samples), "wall_seconds": seconds},
        "parts": parts,
        "environment": environment,
        "notes": [*reading.notes, *getattr(lm.model, "shims", ())],
    }
    rundir.seal(fingerprint, dict(record), samples, collect.step_table(reading.columns))


def needs_greedy(task: Any) -> bool:
    """Tell whether a task looks at is_greedy; of multiple choice only exact_match does.

    Args:
        task: lm-eval's object.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return True
    return "exact_match" in getattr(task, "_metric_fn_list", {})
