"""Run a study: its cells one after another, each answered by this process or by the workers of an engine."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from dllm_sparsity.errors import UserError
from dllm_sparsity.study import environment
from dllm_sparsity.study.attached import Host, LocalHost
from dllm_sparsity.study.config import ModelConfig, StudyConfig
from dllm_sparsity.study.engines import Engine, Share, slurm
from dllm_sparsity.study.engines.ahead import check_first
from dllm_sparsity.study.engines.planner import Job, Planner, own_packages, together
from dllm_sparsity.study.engines.pool import Pool, PoolHost
from dllm_sparsity.study.models import choose_device, open_backend
from dllm_sparsity.study.plan import Asks, Loaded
from dllm_sparsity.study.quiet import quiet
from dllm_sparsity.study.run import run_cell
from dllm_sparsity.study.rundir import RunDir
from dllm_sparsity.study.setting import Setting
from dllm_sparsity.study.stacked import Fellow, LeadHost, why_alone

Searches = Callable[[ModelConfig, Sequence[Loaded]], Iterable[Asks]]
"""For a model and a task, or several for their average: its searches."""


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


class Silent:
    """Progress that shows nothing."""

    def start(self, total: float, done: float) -> None:
        """Show nothing."""

    def cell(self, title: str, cost: float) -> None:
        """Show nothing."""

    def share(self, done: int, total: int) -> None:
        """Show nothing."""

    def stop(self) -> None:
        """Show nothing."""


def run_study(
    config: StudyConfig,
    out: Path,
    progress: Progress,
    searches: Searches | None = None,
    engine: Engine | None = None,
    share: Share | None = None,
) -> RunDir:
    """Run what is not sealed yet.

    Args:
        config: The study.
        out: The run directory; the same directory continues where an earlier run stopped.
        progress: Told what happens.
        searches: What else is asked, cell by cell, once the planned cells of a model are done.
        engine: Who answers; this machine when None.
        share: The part of the study that is run; all of it when None.

    Raises:
        UserError: As the parts raise it; cells that were sealed before stay.
    """
    rundir, pool, engine, share = None, None, engine or Engine(), share or Share()
    try:
        check_first(engine, config)
        if engine.kind == "ray":
            with quiet(Path(os.devnull)):  # nothing is written before the cluster is there
                pool = open_pool(engine, config, Path(os.devnull))
        # a job of an earlier run may still be at its part
        rundir = RunDir(out, config, patient=share.cells is not None)
        if share.cells is not None:
            slurm.take_over(share.cells.iterdir(), rundir)
        with quiet(rundir.log):
            pool = open_pool(engine, config, rundir.log) if pool is None else pool
            described = environment.describe(choose_device(config.device), config.seed)
            if pool is not None:
                here = {**described, "code": environment.code_identity()}
                computing = {*environment.COMPUTING, *(own for model in config.models for own in own_packages(model))}
                pool.accept = partial(_check_same, here=here, computing=sorted(computing))
                described |= {**pool.describe(), "git": described.get("git"), "workers": len(pool)}
            elif engine.kind == "slurm":
                described["device"] = slurm.device_of(engine, config.device)
            planner = Planner(config, described["device"].partition(":")[0])
            stacks = share.of(together(planner.all()))
            jobs = [job for stack in stacks for job in stack]
        runner = _Runner(config, rundir, described, progress, planner, engine, pool)
        runner.plan(jobs)
        if config.search is None and share.parts == 1:  # a search may ask for its cells again, another part for its own
            rundir.drop_journals({job.fingerprint for job in jobs})
        searched = [] if searches is None else share.of(planner.searched())
        slurm.take_over(slurm.cells_of_parts(rundir), rundir)
        open_jobs = [job for job in jobs if not rundir.is_sealed(job.fingerprint)]
        total = sum(job.cost for job in jobs)
        expected = planner.search_cost() if searched else 0.0
        progress.start(total + expected, total - sum(job.cost for job in open_jobs))
        if engine.kind == "slurm" and (open_jobs or not runner.are_done(searches, searched)):
            slurm.tell_of_busy_parts(rundir)
            progress.cell("SLURM", total + expected)
            asked = config.model_copy(update={"device": described["device"]})
            with quiet(rundir.log):
                slurm.run(asked, rundir, searches, engine, max(len(stacks), len(searched)), progress.share)
            open_jobs = [job for job in jobs if not rundir.is_sealed(job.fingerprint)]
        left = {job.fingerprint for job in open_jobs}
        for model in config.models:
            runner.forget()
            for stack in stacks:
                if stack[0].cell.model == model:
                    runner.run_all([job for job in stack if job.fingerprint in left])
            for tasks in (own for each, own in searched if each == model):
                for search in searches(model, tasks) if searches is not None else ():
                    runner.drive(search)
        return rundir
    except BaseException:
        if rundir is not None:
            rundir.release()
        raise
    finally:
        progress.stop()
        if pool is not None:
            pool.close()
        if rundir is not None:
            if pool is not None and pool.replaced:
                rundir.tell(f"workers that died and were replaced: {pool.replaced}; {rundir.log.name} says how")
            rundir.say()


class _Runner:
    """Runs jobs one after another; loads a model when the first job of it is not sealed yet."""

    def __init__(
        self,
        config: StudyConfig,
        rundir: RunDir,
        described: dict[str, Any],
        progress: Progress,
        planner: Planner,
        engine: Engine,
        pool: Pool | None,
    ) -> None:
        self.config, self.rundir, self.described = config, rundir, described
        self.progress, self.planner, self.engine, self.pool = progress, planner, engine, pool
        self.planned: dict[str, dict[str, Any]] = {}
        self.host: LocalHost | PoolHost | None = None

    def forget(self) -> None:
        self.host = None

    def plan(self, jobs: list[Job]) -> None:
        """Write down what belongs to this study; what is not in the plan is not part of the report."""
        for job in jobs:
            entry: dict[str, Any] = {"fingerprint": job.fingerprint, "title": job.cell.title, "parts": job.parts}
            self.planned.setdefault(job.fingerprint, entry)
        self.rundir.write_plan(list(self.planned.values()), self.described)

    def run_all(self, jobs: list[Job]) -> None:
        """Run jobs that differ in strength alone: the first fills the others' journals, where that is possible."""
        if len(jobs) > 1:
            why = why_alone(self._ready(jobs[0]).lm, self._setting(jobs[0]))
            if why is None:
                title = f"{jobs[0].cell.title} and {len(jobs) - 1} more"
                at, tell = self.rundir.journal_path, self.rundir.tell
                fellows = [Fellow(self._setting(job), job.fingerprint, at(job.fingerprint), tell) for job in jobs[1:]]
                self._run(jobs[0], LeadHost(self._ready(jobs[0]), fellows), title, sum(job.cost for job in jobs))
                for job in jobs[1:]:
                    self._run(job, self._ready(job), job.cell.title, 0.0)
                return
            self.rundir.tell(f"{jobs[0].cell.model.name} runs one strength at a time: {why}")
        for job in jobs:
            self.run(job)

    def run(self, job: Job) -> None:
        self._run(job, self._ready(job), job.cell.title, job.cost)

    def _run(self, job: Job, host: Host, title: str, cost: float) -> None:
        self.progress.cell(title, cost)
        with quiet(self.rundir.log):
            run_cell(job.cell, job.task, host, job.fingerprint, job.parts, self.described, self.rundir)

    def _setting(self, job: Job) -> Setting:
        return Setting.of(job.cell, job.parts["seed"])

    def _ready(self, job: Job) -> LocalHost | PoolHost:
        """Return the host of a job's model, which is loaded where it is not there yet."""
        if self.host is None:
            with quiet(self.rundir.log):
                self.host = self._open(job.cell.model)
                self.host.lm.progress = self.progress.share
        return self.host

    def _open(self, model: ModelConfig) -> LocalHost | PoolHost:
        if self.engine.kind == "slurm":
            raise UserError("a cell was not sealed by its job", "the same command submits it again")
        if self.pool is None:
            return LocalHost(open_backend(model, self.config.device, self.config.seed))
        return PoolHost(self.pool, open_backend(model, "meta", self.config.seed))

    def are_done(self, searches: Searches | None, searched: Sequence[tuple[ModelConfig, list[Loaded]]]) -> bool:
        """Tell whether all searches come to their end on sealed cells alone."""
        trial = copy.deepcopy(searches)  # they keep what they find
        return trial is None or all(
            self._is_done(search) for model, tasks in searched for search in trial(model, tasks)
        )

    def _is_done(self, search: Asks) -> bool:
        return self._follow(search, lambda job: self.rundir.is_sealed(job.fingerprint))

    def drive(self, search: Asks) -> None:
        """Give a search the cells it asks for: sealed ones from disk."""

        def sealed(job: Job) -> bool:
            self.plan([job])
            if not self.rundir.is_sealed(job.fingerprint):
                self.run(job)
            return True

        self._follow(search, sealed)

    def _follow(self, search: Asks, sealed: Callable[[Job], bool]) -> bool:
        """Send a search the cells it asks for while they are sealed; return whether it came to its end."""
        try:
            asked = next(search)
            while sealed(job := self.planner.job(*asked)):
                asked = search.send(self.rundir.path / "cells" / job.fingerprint)
            return False
        except StopIteration:
            return True


def open_pool(engine: Engine, config: StudyConfig, log: Path) -> Pool | None:
    """Return the workers of an engine; None where this process does the work itself.

    Args:
        engine: Who is to answer.
        config: The study.
        log: File that takes what libraries print.

    Raises:
        UserError: There are not enough GPUs, or the engine cannot be reached.
    """
    if engine.kind == "slurm":
        return None  # its jobs do the work
    if engine.kind == "ray":
        from dllm_sparsity.study.engines.ray import ray_pool

        return ray_pool(engine, config.device, config.seed)
    from dllm_sparsity.study.engines.local import local_pool

    return local_pool(engine, config.device, config.seed, log)


def _check_same(there: dict[str, Any], here: dict[str, Any], computing: Sequence[str]) -> None:
    """Refuse a worker whose code or packages are not those that fingerprints are made of."""
    for name in computing:
        theirs, ours = (each["packages"].get(name, "not installed") for each in (there, here))
        if theirs != ours:
            raise UserError(
                f"{name} is {theirs} on a worker and {ours} here", "install the same versions on all machines"
            )
    if there["code"] != here["code"]:
        raise UserError("a worker runs other code of dllm-sparsity", "install the same version on all machines")
