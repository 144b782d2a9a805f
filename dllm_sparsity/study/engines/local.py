"""local: run a study's cells one after another in this process, finished ones first from disk."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dllm_sparsity import registry
from dllm_sparsity.errors import UserError
from dllm_sparsity.study import environment
from dllm_sparsity.study.config import ModelConfig, StudyConfig, TaskSpec
from dllm_sparsity.study.models import choose_device, make_rule, make_sampler, open_backend, resolve
from dllm_sparsity.study.plan import SEARCH_PASSES, Cell, cell_parts, expand, fingerprint
from dllm_sparsity.study.quiet import quiet
from dllm_sparsity.study.run import run_cell
from dllm_sparsity.study.rundir import RunDir
from dllm_sparsity.study.tasks import LoadedTask, load_tasks

Searches = Callable[[ModelConfig, TaskSpec, LoadedTask], Iterable[Generator[Cell, Path, None]]]
"""For a model and a task: loops that yield the cell they want next and are sent the folder it is sealed in."""


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
        share = 1.0 if self.cell.block is None else (self.cell.block[1] - self.cell.block[0]) / max(1, self.task.items)
        return self.task.cost * passes * share * (1.0 if self.cell.rule is None else 1.3)


def run_study(config: StudyConfig, out: Path, progress: Progress, searches: Searches | None = None) -> RunDir:
    """Run what is not sealed yet.

    Args:
        config: The study.
        out: The run directory; the same directory continues where an earlier run stopped.
        progress: Told what happens.
        searches: What else is asked, cell by cell, once the planned cells of a model are done.

    Raises:
        UserError: As the parts raise it; cells that were sealed before stay.
    """
    rundir = None
    try:
        _check_first(config)
        rundir = RunDir(out, config)
        with quiet(rundir.log):
            planner = _Planner(config)
            described = environment.describe(choose_device(config.device), config.seed)
            jobs = planner.all()
        runner = _Runner(config, rundir, described, progress, planner)
        runner.plan(jobs)
        open_jobs = [job for job in jobs if not rundir.is_sealed(job.fingerprint)]
        total = sum(job.cost for job in jobs)
        expected = planner.search_cost() if searches is not None else 0.0
        progress.start(total + expected, total - sum(job.cost for job in open_jobs))
        for model in config.models:
            runner.forget()
            for job in open_jobs:
                if job.cell.model == model:
                    runner.run(job)
            if searches is not None:
                for spec, task in planner.pairs():
                    for search in searches(model, spec, task):
                        runner.drive(search, task)
        return rundir
    except BaseException:
        if rundir is not None:
            rundir.release()
        raise
    finally:
        progress.stop()
        if rundir is not None:
            rundir.say()


class _Runner:
    """Runs jobs one after another; loads a model when the first job of it is not sealed yet."""

    def __init__(
        self, config: StudyConfig, rundir: RunDir, described: dict, progress: Progress, planner: _Planner
    ) -> None:
        self.config, self.rundir, self.described = config, rundir, described
        self.progress, self.planner = progress, planner
        self.planned: dict[str, dict[str, Any]] = {}
        self.lm: Any = None
        self.model: dict[str, Any] = {}

    def forget(self) -> None:
        self.lm = None

    def plan(self, jobs: list[Job]) -> None:
        """Write down what belongs to this study; what is not in the plan is not part of the report."""
        for job in jobs:
            entry: dict[str, Any] = {"fingerprint": job.fingerprint, "title": job.cell.title, "parts": job.parts}
            self.planned.setdefault(job.fingerprint, entry)
        self.rundir.write_plan(list(self.planned.values()), self.described)

    def run(self, job: Job) -> None:
        with quiet(self.rundir.log):
            if self.lm is None:
                self.lm = open_backend(job.cell.model, self.config.device, self.config.seed)
                self.lm.progress = self.progress.share
                weights = self.planner.weights[job.cell.model]
                self.model = environment.describe_model(self.lm, job.cell.model, weights)
        self.progress.cell(job.cell.title, job.cost)
        described = {**self.described, "model": self.model}
        with quiet(self.rundir.log):
            run_cell(job.cell, job.task, self.lm, job.fingerprint, job.parts, described, self.rundir)

    def drive(self, search: Generator[Cell, Path, None], task: LoadedTask) -> None:
        """Give a search the cells it asks for: sealed ones from disk."""
        try:
            cell = next(search)
            while True:
                job = self.planner.job(cell, task)
                self.plan([job])
                if not self.rundir.is_sealed(job.fingerprint):
                    self.run(job)
                cell = search.send(self.rundir.path / "cells" / job.fingerprint)
        except StopIteration:
            return


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


class _Planner:
    """Knows what goes into a fingerprint: weights, tasks and versions, each looked up once."""

    def __init__(self, config: StudyConfig) -> None:
        kinds = [registry.get("rules", rule.name) for rule in config.rules]
        kinds += [registry.get("samplers", model.sampler) for model in config.models]
        code = environment.code_identity({kind.__module__ for kind in kinds})
        device = choose_device(config.device).partition(":")[0]
        self.config = config
        self.versions = {**environment.versions(), "code": code, "device": device}
        self.weights = {
            model: environment.weights_identity(resolve(model.model), model.revision) for model in config.models
        }
        self.tasks: dict[TaskSpec, list[LoadedTask]] = {spec: load_tasks(spec, config.seed) for spec in config.tasks}

    def job(self, cell: Cell, task: LoadedTask) -> Job:
        parts = cell_parts(cell, self.config.seed, self.weights[cell.model], task.identity, self.versions)
        return Job(cell, task, fingerprint(parts), parts)

    def all(self) -> list[Job]:
        jobs: dict[str, Job] = {}
        for cell in expand(self.config):
            for task in self.tasks[cell.task]:
                job = self.job(cell, task)
                jobs.setdefault(job.fingerprint, job)
        return list(jobs.values())

    def pairs(self) -> list[tuple[TaskSpec, LoadedTask]]:
        return [(spec, task) for spec in self.config.tasks for task in self.tasks[spec]]

    def search_cost(self) -> float:
        """Guess what all searches cost: so many times the items of each curve."""
        curves = [(rule, site) for rule in self.config.rules for site in rule.sites]
        dense = [
            self.job(Cell(model, spec, None, None, None, ()), task).cost
            for model in self.config.models
            for spec, tasks in self.tasks.items()
            for task in tasks
        ]
        return SEARCH_PASSES * len(curves) * sum(dense)
