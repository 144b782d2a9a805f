"""SLURM: an array of jobs, each with its part of a study in a run directory of its own; their cells are taken over.

A job that is pre-empted or runs out of time is queued again and goes on where its journals end.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_sparsity.errors import UserError, shorten
from dllm_sparsity.study.config import StudyConfig
from dllm_sparsity.study.engines import Engine, Share
from dllm_sparsity.study.files import remove, writing
from dllm_sparsity.study.records import find_damage
from dllm_sparsity.study.rundir import RunDir, is_in_use

_JOBS = 8
_MINUTES, _RENEWALS = 240, 100
"""Time limit of a job where none is given, and how often one that reaches it is queued again."""
_POLL_SECONDS = 2.0


@dataclass(frozen=True)
class Part:
    """One job: a part of a study.

    Args:
        config: The study.
        out: The part's own run directory.
        searches: As in `run_study`.
        share: Which part.
        gpus_per_worker: As in `Engine`.
    """

    config: StudyConfig
    out: Path
    searches: Any
    share: Share
    gpus_per_worker: int = 1

    def __call__(self) -> UserError | None:
        """Run it, on all GPUs that the job has; return what the user can put right."""
        from dllm_sparsity.study.engines.runner import Silent, run_study

        engine = Engine(gpus_per_worker=self.gpus_per_worker)
        try:
            run_study(self.config, self.out, Silent(), self.searches, engine, self.share).release()
        except UserError as error:
            return error
        return None

    def checkpoint(self) -> Any:
        """Be queued again; submitit calls it before the job is taken away."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def device_of(engine: Engine, device: str) -> str:
    """Return the kind of device that the jobs will have.

    Args:
        engine: What they ask for.
        device: The study's device.
    """
    if device != "auto":
        return device
    asked = [str(value) for name, value in engine.options.items() if "gpu" in name or "gres" in name]
    return "cuda" if any(value not in ("0", "") for value in asked) else "cpu"


def count_jobs(engine: Engine, cells: int) -> int:
    """Return how many jobs a study is parted into.

    Args:
        engine: How many are asked for.
        cells: Cells, those that share forward passes as one, and searches that the study has; there are not more jobs.
    """
    return min(engine.workers or _JOBS, max(1, cells))


def run(
    config: StudyConfig, rundir: RunDir, searches: Any, engine: Engine, cells: int, told: Callable[[int, int], None]
) -> None:
    """Submit the parts of a study, wait for them, and take their cells over.

    Args:
        config: The study; its device is that of the jobs.
        rundir: Where the cells go.
        searches: As in `run_study`.
        engine: How many jobs, and what each asks for.
        cells: Cells, those that share forward passes as one, and searches that the study has; there are not more jobs.
        told: Called with (jobs done, jobs in all).

    Raises:
        UserError: submitit or SLURM is missing, refuses the jobs, or some of them failed.
    """
    executor = make_executor(engine, rundir.path / "slurm")
    parts = count_jobs(engine, cells)
    root, done = (rundir.path / "parts").resolve(), (rundir.path / "cells").resolve()
    work = [
        Part(config, root / f"{n + 1}-of-{parts}", searches, Share(n, parts, done), engine.gpus_per_worker)
        for n in range(parts)
    ]
    try:
        jobs = executor.submit_array(work)
    except Exception as error:
        why = shorten(error)
        raise UserError(f"the jobs were not taken: {why}", "look at the --engine-option values") from error
    _watch(jobs, rundir.log)
    try:
        while not all([job.done() for job in jobs]):
            told(sum(job.done() for job in jobs), len(jobs))
            time.sleep(_POLL_SECONDS)
    except BaseException:
        for job in jobs:
            job.cancel(check=False)
        raise
    failed = [why for job in jobs if (why := _failure(job)) is not None]
    take_over(cells_of_parts(rundir), rundir)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(jobs)} jobs failed: {failed[0]}",
            f"their logs are in {rundir.path / 'slurm'}; the same command goes on with what is left",
        )


def _watch(jobs: list[Any], log: Path) -> None:
    """Send what sacct says of itself to the log: without accounting, it says so at every look."""
    from submitit.slurm.slurm import SlurmInfoWatcher

    class Watcher(SlurmInfoWatcher):
        """Looks at all jobs at once."""

        def _make_command(self) -> list[str] | None:
            command = super()._make_command()
            return command and ["sh", "-c", 'exec "$@" 2>>"$0"', str(log.resolve()), *command]

    watcher = Watcher(delay_s=600)
    for job in jobs:
        if isinstance(job.watcher, SlurmInfoWatcher):  # another cluster asks no sacct
            job.watcher = watcher
            watcher.register_job(job.job_id)


def cells_of_parts(rundir: RunDir) -> list[Path]:
    """Return the folders of all cells that jobs have begun or sealed.

    Args:
        rundir: Of the study.
    """
    return sorted((rundir.path / "parts").glob("*/cells/*"))


def tell_of_busy_parts(rundir: RunDir) -> None:
    """Say at once at which parts of a study jobs of an earlier run still work.

    Args:
        rundir: Of the study.

    Raises:
        UserError: The folder cannot be read.
    """
    with writing(rundir.path):
        busy = [part.name for part in sorted((rundir.path / "parts").glob("*")) if is_in_use(part)]
    if busy:
        rundir.tell(
            f"jobs of an earlier run still work on {', '.join(busy)} of parts/; a new job of the same part waits for"
            " them: let them end, or scancel them"
        )
        rundir.say()


def take_over(folders: Iterable[Path], rundir: RunDir) -> None:
    """Link cells that are sealed elsewhere to where a run has its own; they stay where they are as well.

    Args:
        folders: The cells; what is not whole is left out.
        rundir: Of the run.

    Raises:
        UserError: The folder cannot be written to.
    """
    with writing(rundir.path):
        for folder in folders:
            place = rundir.path / "cells" / folder.name
            is_new = (folder / "DONE").is_file() and not (place / "DONE").is_file()
            if is_new and find_damage(folder) is None:
                remove(place)  # what was damaged
                draft = place.with_name(f".{place.name}.{os.getpid()}")
                shutil.copytree(folder, draft, copy_function=_link)
                os.replace(draft, place)


def _link(source: str, target: str) -> None:
    """Link a file, or copy it where the disk has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _failure(job: Any) -> str | None:
    """Return why a job failed, on one line; None where it did not."""
    error = job.exception() or job.result()
    if error is None or isinstance(error, UserError):
        return None if error is None else error.message
    told = [line for line in str(error).split("\n-----")[0].splitlines() if line.strip(" -")]
    trace = [line for line in str(error).splitlines() if re.match(r"[\w.]+(Error|Exception|Exit|Interrupt)\b", line)]
    return shorten((trace or told or ["no reason given"])[-1])


def make_executor(engine: Engine, folder: Path) -> Any:
    """Return what submits jobs; it writes nothing before it does.

    Args:
        engine: What they ask for.
        folder: Where their logs and pickles go.

    Raises:
        UserError: submitit or SLURM is missing, or an option is not known.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError("submitit is not installed", "pip install '.[slurm]'") from error
    options = dict(engine.options)
    cluster = str(options.pop("cluster", "slurm"))
    try:
        executor = submitit.AutoExecutor(str(folder), cluster=cluster, slurm_max_num_timeout=_RENEWALS)
        executor.update_parameters(**{"name": "dllm-sparsity", "timeout_min": _MINUTES, **options})
    except (RuntimeError, ValueError, NameError, TypeError, AssertionError) as error:
        why = shorten(error)
        raise UserError(
            f"SLURM cannot be used: {why}", "run this where sbatch is; submitit's documentation lists the options"
        ) from error
    return executor
