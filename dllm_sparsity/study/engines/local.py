"""Workers of the local engine: one process for each GPU."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from dllm_sparsity.errors import UserError
from dllm_sparsity.study.engines import Engine, worker
from dllm_sparsity.study.engines.pool import Pool


def local_pool(engine: Engine, device: str, seed: int, log: Path) -> Pool | None:
    """Return a pool of processes, or None where this process does as well: one GPU, or none, or one that is named.

    Args:
        engine: How many are asked for.
        device: The study's device.
        seed: The study's seed.
        log: File that takes what libraries print.

    Raises:
        UserError: More workers are asked for than there are GPUs for.
    """
    workers, gpus = count_workers(engine, device)
    if workers == 1:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = None if gpus else max(1, cores // workers)

    def start(number: int) -> _Process:
        own = gpus[number * engine.gpus_per_worker :][: engine.gpus_per_worker]
        return _Process((str(log.resolve()), ",".join(own) or None, device, threads))

    return Pool(start, workers, (BrokenProcessPool,), seed)


def count_workers(engine: Engine, device: str) -> tuple[int, list[str]]:
    """Return how many workers there are to be, and the GPUs for them.

    Args:
        engine: How many are asked for.
        device: The study's device.

    Raises:
        UserError: There are not the GPUs that the workers ask for.
    """
    gpus = visible_gpus() if device in ("auto", "cuda") else []
    workers = engine.workers
    if engine.gpus_per_worker > 1 and not gpus:
        raise UserError(
            f"{engine.gpus_per_worker} GPUs for each worker, but device {device} has none to share out",
            "use --device cuda" if device.startswith("cuda:") else "leave --gpus-per-worker out",
        )
    if workers is None:
        workers = max(1, len(gpus) // engine.gpus_per_worker)
    elif device.startswith("cuda:") and workers > 1:
        raise UserError(f"{workers} workers on device {device}", "use --device cuda: each worker takes its own GPU")
    if gpus and workers * engine.gpus_per_worker > len(gpus):
        raise UserError(
            f"{workers} workers with {engine.gpus_per_worker} GPUs each, but torch sees {len(gpus)}",
            "lower --workers or --gpus-per-worker",
        )
    return workers, gpus


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that this process sees, as CUDA_VISIBLE_DEVICES takes them."""
    import torch

    count = torch.cuda.device_count()  # makes no CUDA context
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] if named else [str(number) for number in range(count)]


class _Process:
    """A worker in a process of its own."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        before = {process.pid for process in multiprocessing.active_children()}
        self._executor = ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), initializer=worker.start, initargs=arguments
        )
        self._executor.submit(os.getpid)
        self._children = [each for each in multiprocessing.active_children() if each.pid not in before]

    def ask(self, method: str, *arguments: Any) -> Future[Any]:
        try:
            return self._executor.submit(worker.ask, method, *arguments)
        except BrokenProcessPool as error:
            failed: Future[Any] = Future()
            failed.set_exception(error)
            return failed

    def stop(self) -> None:
        for process in self._children:
            process.kill()
        self._executor.shutdown(cancel_futures=True)
