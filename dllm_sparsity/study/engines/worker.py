"""A worker: a process that keeps a model and answers planned batches that it is sent. Imports torch late."""

from __future__ import annotations

import multiprocessing
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dllm_sparsity.lm.journal import Work
    from dllm_sparsity.study.attached import LocalHost
    from dllm_sparsity.study.counted import Counted, Facts, Here
    from dllm_sparsity.study.setting import Setting
    from dllm_sparsity.study.stacked import Each, StackedHere


class Worker:
    """One model at a time, with one cell's rule on it, until a batch of another cell comes.

    Args:
        device: A torch device, or `auto`.
        threads: Threads that torch may use on a CPU; None leaves it to torch.
    """

    def __init__(self, device: str, threads: int | None = None) -> None:
        self._device = device
        self._settings: tuple[Setting, ...] | None = None
        self._host: LocalHost | None = None
        self._here: Here | StackedHere | None = None
        self._open = ExitStack()
        if threads is not None:
            import torch

            torch.set_num_threads(threads)

    def describe(self, seed: int) -> dict[str, Any]:
        """Return what the worker runs on, its kind of device and the identity of its code.

        Args:
            seed: The study's seed.
        """
        from dllm_sparsity.study import environment
        from dllm_sparsity.study.models import choose_device

        device = choose_device(self._device)
        return {**environment.describe(device, seed), "code": environment.code_identity()}

    def answer(self, setting: Setting | tuple[Setting, ...], work: Work) -> Counted | Each:
        """Answer a batch, and count in it.

        Args:
            setting: Of the batch's cell; of several cells that it is answered for at once, for what each of them gets.
            work: The batch.

        Raises:
            UserError: The model cannot be loaded, or a site is missing.
            NonFiniteError: An activation was NaN or infinite.
        """
        from dllm_sparsity.study.stacked import StackedHere

        host, here = self._use(setting)
        try:
            if isinstance(here, StackedHere):
                return here.one(work)
            counted = here.one(work, host.lm.compute)
            here.tracker.check("in a batch")
            return counted
        except BaseException:
            self._drop()  # what the batch left behind is not known
            raise

    def facts(self, setting: Setting) -> Facts:
        """Return what a sealed cell says of the model.

        Args:
            setting: Of the cell.
        """
        host, _ = self._use(setting)
        return host.facts(setting)

    def _use(self, asked: Setting | tuple[Setting, ...]) -> tuple[LocalHost, Here | StackedHere]:
        """Load the model and put the rules on it, where they are not those of the batch before."""
        from dllm_sparsity.study.attached import LocalHost, prepared
        from dllm_sparsity.study.models import open_backend

        settings = asked if isinstance(asked, tuple) else (asked,)
        if self._here is None or self._host is None or settings != self._settings:
            self._drop()
            setting = settings[0]
            if self._host is None or self._settings is None or setting.model != self._settings[0].model:
                self._host = None  # free the model before the next one is loaded
                self._host = LocalHost(open_backend(setting.model, self._device, setting.seed))
            self._settings = settings
            on = self._host.stacked(settings) if len(settings) > 1 else self._host.attached(setting)
            try:
                self._open.enter_context(prepared(self._host.lm, setting))
                self._here = self._open.enter_context(on)
            except BaseException:
                self._drop()
                raise
        return self._host, self._here

    def _drop(self) -> None:
        """Take the rule off the model; nothing more is checked, for each batch was."""
        stack, self._open, self._here = self._open, ExitStack(), None
        stack.__exit__(GeneratorExit, GeneratorExit(), None)


_worker: Worker | None = None


def start(log: str, gpus: str | None, device: str, threads: int | None) -> None:
    """Make this process's worker; the first thing that a process runs.

    Args:
        log: File that takes what libraries print.
        gpus: Numbers of the GPUs that it sees; None leaves all.
        device: A torch device, or `auto`.
        threads: Threads that torch may use on a CPU.
    """
    global _worker
    import signal
    import threading

    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is shared by processes, and left behind by one that is killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that plans; it ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    _worker = Worker(device, threads)


def _end_with_parent() -> None:
    """End this process when the one that plans is gone, so that none is left behind with a model."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def ask(method: str, *arguments: Any) -> Any:
    """Call a method of this process's worker.

    Args:
        method: Its name.
        arguments: What it takes.
    """
    return getattr(_worker, method)(*arguments)
