"""Workers on a Ray cluster: actors that keep a model, each with its GPUs."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from concurrent.futures import Future
from importlib.util import find_spec
from typing import Any

from dllm_sparsity.errors import UserError, shorten
from dllm_sparsity.study.engines import Engine
from dllm_sparsity.study.engines.pool import Pool
from dllm_sparsity.study.engines.worker import Worker
from dllm_sparsity.study.offline import SWITCHES

_SECONDS_TO_CONNECT = 5


def ray_pool(engine: Engine, device: str, seed: int) -> Pool:
    """Return a pool of actors; where Ray is not connected yet, it is connected or started.

    Args:
        engine: Where the cluster is, and how many actors.
        device: The study's device; `auto` takes GPUs where the cluster has them.
        seed: The study's seed.

    Raises:
        UserError: Ray is not installed, the cluster cannot be reached, or has too few GPUs.
    """
    try:
        import ray
        from ray import exceptions
    except ImportError as error:
        raise _missing() from error
    started = not ray.is_initialized()
    before = signal.getsignal(signal.SIGTERM)
    if started:
        check_reachable(engine.address)
        try:
            ray.init(engine.address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        except (ConnectionError, ValueError, RuntimeError, ImportError, TimeoutError) as error:
            where = engine.address or os.environ.get("RAY_ADDRESS") or "this machine"
            why = shorten(error)
            raise UserError(
                f"no Ray cluster at {where}: {why}",
                "ray start --head starts one; a cluster with tokens needs RAY_AUTH_MODE=token; or use --engine local",
            ) from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray puts its own there
    try:
        resources = _resources(ray, engine, device)
    except BaseException:
        if started:
            ray.shutdown()
        raise
    size, needs, kind = resources
    told = {name: os.environ[name] for name in SWITCHES if name in os.environ}  # a running cluster has its own
    actor = ray.remote(**needs, max_restarts=0, runtime_env={"env_vars": told})(_Actor)

    def start(number: int) -> _Remote:
        return _Remote(ray, actor.remote(kind, None if needs["num_gpus"] else int(needs["num_cpus"])))

    died = (
        exceptions.RayActorError,
        exceptions.WorkerCrashedError,
        exceptions.NodeDiedError,
        exceptions.OutOfMemoryError,
    )
    try:
        return _RayPool(start, size, died, seed, ray if started else None)
    except ModuleNotFoundError as error:
        raise UserError(
            f"the cluster's machines have no module {error.name}", "install dllm-sparsity on each, in the same version"
        ) from error


def check_reachable(address: str | None) -> None:
    """Refuse an address of a host and port where nothing listens; Ray itself would try for minutes.

    Args:
        address: As given; None takes RAY_ADDRESS.

    Raises:
        UserError: No connection was made.
    """
    where = address or os.environ.get("RAY_ADDRESS") or ""
    host, _, port = where.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_CONNECT):
            return
    except (OSError, OverflowError, ValueError) as error:
        given = "" if address else ", as RAY_ADDRESS says"
        raise UserError(
            f"no Ray cluster answers at {where}{given}: {error}",
            "ray start --head starts one; unset RAY_ADDRESS for one on this machine; or use --engine local",
        ) from error


def check_ray(engine: Engine, device: str) -> None:
    """Refuse what no cluster could run; none is asked.

    Args:
        engine: How many GPUs each actor is to have.
        device: The study's device.

    Raises:
        UserError: Ray is not installed, the device is one numbered GPU, or has no GPUs for actors that want several.
    """
    if find_spec("ray") is None:
        raise _missing()
    if ":" in device:
        raise UserError(f"device {device} for a cluster", "use --device cuda: Ray gives each worker its own GPU")
    if device not in ("auto", "cuda"):
        _check_without_gpus(engine, f"device {device}")


def _check_without_gpus(engine: Engine, where: str) -> None:
    if engine.gpus_per_worker > 1:
        raise UserError(
            f"{engine.gpus_per_worker} GPUs for each worker, but {where} has none to share out",
            "leave --gpus-per-worker out",
        )


def _missing() -> UserError:
    return UserError("ray is not installed", "pip install '.[ray]'")


def _resources(ray: Any, engine: Engine, device: str) -> tuple[int, dict[str, Any], str]:
    """Return how many actors there are to be, what each needs, and its device."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus, cpus = ([int(node[name]) for node in nodes if node.get(name, 0) >= 1] for name in ("GPU", "CPU"))
    kind = device if device != "auto" else "cuda" if gpus else "cpu"
    if kind == "cuda":
        own = engine.gpus_per_worker
        size = engine.workers or sum(count // own for count in gpus)
        if size < 1 or sum(count // own for count in gpus) < size:
            raise UserError(
                f"{max(size, 1)} workers with {own} GPUs each, but the cluster's nodes have {gpus or 'none'}",
                "lower --workers or --gpus-per-worker, or add nodes",
            )
        return size, {"num_gpus": own, "num_cpus": min(1, sum(cpus))}, kind
    _check_without_gpus(engine, "the cluster")
    size = engine.workers or max(1, len(cpus))
    if size > sum(cpus):
        raise UserError(
            f"{size} workers with a CPU each, but the cluster has {sum(cpus)}", "lower --workers, or add nodes"
        )
    own = min(cpus)
    if size > len(cpus):  # the most that all of them find room for
        own = max(n for n in range(1, max(cpus) + 1) if sum(count // n for count in cpus) >= size)
    return size, {"num_gpus": 0, "num_cpus": own}, kind


class _Actor:
    """A worker that gives errors back as values: Ray would dress them up."""

    def __init__(self, device: str, threads: int | None) -> None:
        self._worker = Worker(device, threads)

    def ask(self, method: str, *arguments: Any) -> tuple[Any, UserError | None]:
        try:
            return getattr(self._worker, method)(*arguments), None
        except UserError as error:
            return None, error


class _Remote:
    """A worker in an actor."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor

    def ask(self, method: str, *arguments: Any) -> Future[Any]:
        asked: Future[Any] = Future()

        def pass_on(done: Future[Any]) -> None:
            try:
                value, error = done.result()
            except Exception as failure:
                error = failure
            if error is None:
                asked.set_result(value)
            else:
                asked.set_exception(error)

        self._actor.ask.remote(method, *arguments).future().add_done_callback(pass_on)
        return asked

    def stop(self) -> None:
        self._ray.kill(self._actor)


class _RayPool(Pool):
    """A pool that leaves the cluster it has joined."""

    def __init__(self, start: Any, size: int, died: tuple[type[BaseException], ...], seed: int, ray: Any) -> None:
        self._ray = ray
        super().__init__(start, size, died, seed)

    def close(self) -> None:
        try:
            super().close()
        finally:
            if self._ray is not None:
                self._ray.shutdown()
