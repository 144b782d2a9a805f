"""local: run a study's cells one after another in this process, finished ones first from disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dllm_sparsity import registry
from dllm_sparsity.errors import UserError
from dllm_sparsity.study import environment
from dllm_sparsity.study.config import ModelConfig, StudyConfig, TaskSpec
from dllm_sparsity.study.models import choose_device, make_rule, make_sampler, open_backend, resolve
from dllm_sparsity.study.plan import Cell, cell_parts, expand, fingerprint
from dllm_sparsity.study.quiet import quiet
from dllm_sparsity.study.run import run_cell
from dllm_sparsity.study.rundir import RunDir
from dllm_sparsity.study.tasks import LoadedTask, load_tasks


class Progress(Protocol):
    """What an engine tells while it runs."""

    def start(self, total: float, done: float) -> None:
        """Begin; both numbers are rough costs."""

    def cell(self, title: str, cost: float) -> None:
        """Begin a cell."""

    def share(self, done: int, total: int) -> None:
        """Report how many of the running cell's requests are answered."""

    def stop(self) -> None:
        """End."""


@dataclass(frozen=True)
class Job:
    """A cell with its task loaded and its fingerprint known."""

    cell: Cell
    task: LoadedTask
    fingerprint: str
    parts: dict[str, Any]

    @property
    def cost(self) -> float:
        """Rough cost beside other jobs: characters, times how often a model reads them."""
        model, mc = self.cell.model, self.cell.task.mc or self.cell.model.mc
        if self.task.output_type == "generate_until":
            passes = model.steps or 32 if model.paradigm == "diffusion" else 3
        else:
            passes = mc if model.paradigm == "diffusion" and isinstance(mc, int) else 1
        return self.task.cost * passes * (1.0 if self.cell.rule is None else 1.3)


def run_study(config: StudyConfig, out: Path, progress: Progress) -> RunDir:
    """Run what is not sealed yet.

    Args:
        config: The study.
        out: The run directory; the same directory continues where an earlier run stopped.
        progress: Told what happens.

    Raises:
        UserError: As the parts raise it; cells that were sealed before stay.
    """
    try:
        _check_first(config)
        rundir = RunDir(out, config)
        with quiet(rundir.log):
            jobs = _plan(config)
            described = {**environment.describe(), "device": choose_device(config.device)}
        plan = [{"fingerprint": job.fingerprint, "title": job.cell.title, "parts": job.parts} for job in jobs]
        rundir.write_plan(plan, described)
        open_jobs = [job for job in jobs if not rundir.is_sealed(job.fingerprint)]
        total = sum(job.cost for job in jobs)
        progress.start(total, total - sum(job.cost for job in open_jobs))
        for model in config.models:
            mine = [job for job in open_jobs if job.cell.model == model]
            if mine:
                _run_model(model, mine, config, rundir, described, progress)
    finally:
        progress.stop()
    return rundir


def _run_model(
    model: ModelConfig, jobs: list[Job], config: StudyConfig, rundir: RunDir, described: dict, progress: Progress
) -> None:
    with quiet(rundir.log):
        lm = open_backend(model, config.device, config.seed)
    lm.progress = progress.share
    for job in jobs:
        progress.cell(job.cell.title, job.cost)
        with quiet(rundir.log):
            run_cell(job.cell, job.task, lm, job.fingerprint, job.parts, described, rundir)


def _check_first(config: StudyConfig) -> None:
    """Refuse bad rules, strengths and missing models before a task or a weight is loaded."""
    from dllm_sparsity.lm.loading import check_exists

    for rule in config.rules:
        for strength in rule.strengths:
            if make_rule(rule.name, strength, rule.parameters).is_dense:
                raise UserError(
                    f"strength {strength:g} of {rule.name} is its dense setting", "leave it out: every study runs dense"
                )
    for model in config.models:
        if model.paradigm == "diffusion":
            make_sampler(model)
        check_exists(resolve(model.model), model.revision)


def _plan(config: StudyConfig) -> list[Job]:
    kinds = [registry.get("rules", rule.name) for rule in config.rules]
    kinds += [registry.get("samplers", model.sampler) for model in config.models]
    versions = {**environment.versions(), "code": environment.code_identity({kind.__module__ for kind in kinds})}
    device = choose_device(config.device).partition(":")[0]
    identities = {model: environment.weights_identity(resolve(model.model), model.revision) for model in config.models}
    tasks: dict[TaskSpec, list[LoadedTask]] = {spec: load_tasks(spec, config.seed) for spec in config.tasks}
    jobs: dict[str, Job] = {}
    for cell in expand(config):
        for task in tasks[cell.task]:
            parts = cell_parts(cell, config.seed, identities[cell.model], task.identity, {**versions, "device": device})
            number = fingerprint(parts)
            jobs.setdefault(number, Job(cell, task, number, parts))
    return list(jobs.values())
