"""What a study would take, before it runs: forward passes, FLOPs, memory, disk, hours, what it could detect."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from dllm_sparsity.errors import UserError, shorten
from dllm_sparsity.families import find_ffns
from dllm_sparsity.study import expected, plan, probe
from dllm_sparsity.study.architectures import build, find_architecture
from dllm_sparsity.study.check import BYTES, check_study
from dllm_sparsity.study.config import ModelConfig, StudyConfig, TaskSpec
from dllm_sparsity.study.cost import Costs, costs, disk_bytes
from dllm_sparsity.study.dry_search import expect, like_a_search, unsearchable
from dllm_sparsity.study.fetch import check_weights
from dllm_sparsity.study.models import choose_device, open_backend, resolve
from dllm_sparsity.study.offline import missing_files, why_not_loaded
from dllm_sparsity.study.tasks import LoadedTask, load_tasks
from dllm_sparsity.study.workload import Workload, make_planner, workload

_ACCURACY = re.compile("acc|exact|match|pass|^em$")


@dataclass
class Part:
    """One model on one task: its cells, and what they take together.

    Args:
        model: What people see.
        paradigm: autoregressive or diffusion.
        task: lm-eval's name, or as given where it cannot be loaded.
        cells: Cells that are planned, the dense one among them; those of searches come on top.
        runs: How often the items are gone through: once for each cell, and what searches are likely to take.
        passes: How often forward passes are made for planned cells: fewer than these where strengths share them.
        stack: Strengths that share a forward pass, at most.
        searched: Cells that searches are likely to run, each on a block of items.
        forwards: Forward passes of all runs; None where they cannot be known.
        work: Forward passes of one cell; None where they cannot be known.
        why: Why something is not known; empty where all is.
        ffn_flops: FLOPs of the FFNs, dense, of all runs.
        flops: FLOPs of the whole model, dense, of all runs.
        peak: Estimated bytes of memory.
        measured_peak: Bytes of GPU memory that the probe took at most; None on a CPU or without a probe.
        disk: Estimated bytes of the sealed cells.
        seconds: Estimated seconds of all runs; None without a probe.
        no_probe: Why nothing was timed.
        comparisons: Planned cells of all models on this task that are set against dense, each once.
        detectable: Smallest difference of two accuracies that this many items show among these, without pairing; None
            where the task has none.
    """

    model: str
    paradigm: str
    task: str
    cells: int
    runs: float
    passes: int
    stack: int = 1
    searched: int = 0
    forwards: int | None = None
    work: Workload | None = None
    why: str = ""
    ffn_flops: float | None = None
    flops: float | None = None
    peak: int | None = None
    measured_peak: int | None = None
    disk: int = 0
    seconds: float | None = None
    no_probe: str = ""
    comparisons: int = 0
    detectable: float | None = None


@dataclass
class DryRun:
    """What a study would take.

    Args:
        name: Of the study.
        device: Where it would run.
        cells: Its cells.
        parts: By model and task.
        models: By name: whether the FFNs have a gate, bytes of weights, FLOPs of a token in the FFNs and in all.
        problems: What has to be put right first.
        notes: What is worth knowing.
        cpu: The machine's threads that torch uses.
    """

    name: str
    device: str
    cells: int
    parts: list[Part]
    models: dict[str, dict[str, Any]]
    problems: list[str]
    notes: list[str]
    cpu: int


def dry_run(config: StudyConfig, tell: Callable[[str], None] = lambda text: None) -> DryRun:
    """Find out what a study would take; nothing is written, and nothing but three steps of each kind is run.

    Args:
        config: The study.
        tell: Told what it is at.
    """
    import torch

    tell("checking the study")
    checked = check_study(config, here=True)
    problems, notes = list(checked.problems), list(checked.notes)
    tasks: dict[TaskSpec, list[LoadedTask] | UserError] = {}
    for spec in config.tasks:
        tell(f"reading task {spec.name or spec.text}")
        try:
            tasks[spec] = load_tasks(spec, config.seed)
        except UserError as error:
            tasks[spec] = why = why_not_loaded(spec, error)
            _say(problems, why)
    for model in config.models:
        try:
            if Path(resolve(model.model)).is_dir():  # check may be given a folder without weights, a run may not
                check_weights(model)
        except UserError as error:
            _say(problems, error, f"{model.name}: ")
    problems += unsearchable(config, _loaded(tasks), problems)
    cells = plan.expand(config)
    device = choose_device(config.device)
    found = DryRun(config.name, device, 0, [], {}, problems, notes, torch.get_num_threads())
    for model in config.models:
        _model(model, cells, tasks, config, found, tell)
    found.cells = sum(part.cells for part in found.parts)
    if config.search is not None:
        notes.append(expected.words(config.search, len(_loaded(tasks)) > 1))
    return found


def _say(problems: list[str], error: UserError, where: str = "") -> None:
    """Add a problem that was not seen before."""
    if not any(error.message in own for own in problems):
        problems.append(f"{where}{error.message}; {error.hint}")


def _model(
    model: ModelConfig,
    cells: list[plan.Cell],
    tasks: dict,
    config: StudyConfig,
    found: DryRun,
    tell: Callable[[str], None],
) -> None:
    planner, price, why, stacked = None, None, "", False
    try:
        architecture = find_architecture(resolve(model.model), model.revision)
        built = build(architecture, model.trust_remote_code)
        ffns = find_ffns(built)
        price = costs(built, ffns, architecture.config, BYTES[model.dtype])
        found.models[model.name] = {
            "gated": all(ffn.gated for ffn in ffns),
            "weights": price.weights,
            "ffn_flops": price.ffn,
            "flops": None if price.ffn is None else price.ffn + price.rest + price.head,
        }
        planner = make_planner(model, built, architecture.config, _tokenizer(model), config.seed)
        stacked = planner.stacks and not any(ffn.experts for ffn in ffns)
    except UserError as error:
        why = error.message
    made: list[tuple[Part, list, list]] = []
    for spec in config.tasks:
        of_task, loaded = [cell for cell in cells if cell.task == spec], tasks[spec]
        own = [cell for cell in of_task if cell.model == model]
        for task in [None] if isinstance(loaded, UserError) else loaded:
            name = task.name if task is not None else str(spec.name or spec.text)
            why_not = loaded.message if isinstance(loaded, UserError) else why
            stacks = plan.stack_sizes(own) if stacked else [1] * len(own)
            most = max(stacks, default=1)
            part = Part(model.name, model.paradigm, name, len(own), len(own), len(stacks), most)
            part.why = why_not
            found.parts.append(part)
            if task is None or planner is None or price is None:
                continue
            tell(f"counting {model.name} on {name}")
            try:
                part.work, batches = workload(planner, task, spec)
            except UserError as error:
                part.why = error.message
                continue
            _fill(part, part.work, price, own)
            if config.search is not None:
                expect(part, planner, (task, spec), _loaded(tasks), config, price)
            if (flops := price.flops(part.work)) is not None:
                part.ffn_flops, part.flops = (each * part.runs for each in flops)
            part.comparisons = sum(cell.rule is not None for cell in of_task)
            part.detectable = detectable(part.work.items, part.comparisons) if has_accuracy(task) else None
            made.append((part, own or like_a_search(config, model, spec), batches))
    _probe(model, made, config, found, tell)


def _loaded(tasks: dict[TaskSpec, list[LoadedTask] | UserError]) -> list[LoadedTask]:
    return [task for own in tasks.values() if not isinstance(own, UserError) for task in own]


def _fill(part: Part, work: Workload, price: Costs, cells: list) -> None:
    part.forwards = work.forwards * part.passes
    part.peak = price.peak_bytes(work.stacked(part.stack))
    part.disk = sum(disk_bytes(work, price.layers, len(cell.sites)) for cell in cells)


def has_accuracy(task: LoadedTask) -> bool:
    """Tell whether items of a task are right or wrong, as far as the names of its metrics say.

    Args:
        task: The task, loaded.
    """
    if task.output_type in ("multiple_choice", "loglikelihood_rolling"):
        return task.output_type == "multiple_choice"
    return any(_ACCURACY.search(name) for name in task.task.higher_is_better())


def detectable(items: int, comparisons: int = 1) -> float:
    """Return the smallest difference of two accuracies near one half that is found four times in five.

    Two binomial shares of the same number of items, at the 5 % level, not paired; a paired test finds smaller ones.

    Args:
        items: Items of each.
        comparisons: How many share the 5 %, as at the first step of Holm's correction.
    """
    normal = NormalDist()
    z = normal.inv_cdf(1 - 0.05 / max(1, comparisons) / 2) + normal.inv_cdf(0.8)
    return min(1.0, z * math.sqrt(2 * 0.25 / items)) if items else 1.0


def _tokenizer(model: ModelConfig) -> Any:
    """Return a model's tokenizer where it is on this machine."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            resolve(model.model),
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            local_files_only=True,
        )
    except Exception:  # not here, or code of its own that is not trusted: a stand-in counts instead, and says so
        return None


def _probe(model: ModelConfig, made: list, config: StudyConfig, found: DryRun, tell: Callable[[str], None]) -> None:
    """Time three steps of every task, dense and under each rule."""
    if not made:
        return
    lacking = missing_files(model)
    why = f"not on this machine: {', '.join(lacking[:3])}" if lacking else ""
    lm = None
    if not why:
        tell(f"loading {model.name}")
        try:
            probe.forget_peak(found.device)
            lm = open_backend(model, config.device, config.seed)
        except (UserError, RuntimeError, MemoryError) as error:  # a GPU that is too small raises RuntimeError
            why = shorten(getattr(error, "message", error))
    for part, cells, batches in made:
        part.no_probe = why
        if lm is None or not batches:
            continue
        tell(f"timing {model.name} on {part.task}")
        try:
            speed: dict[str | None, float] = {}
            for cell in cells:
                rule = cell.rule.name if cell.rule is not None else None
                if rule not in speed:
                    speed[rule] = probe.seconds_per_forward(lm, cell, batches)
            each = [speed[cell.rule.name if cell.rule is not None else None] for cell in cells]
            searched = part.forwards - part.work.forwards * part.passes
            part.seconds = sum(each) / len(each) * (part.cells * part.work.forwards + searched)
            part.measured_peak = probe.peak_bytes(found.device)
        except (UserError, RuntimeError) as error:
            part.no_probe = shorten(getattr(error, "message", error))
