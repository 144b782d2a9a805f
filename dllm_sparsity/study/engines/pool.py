"""A pool of workers: hands planned batches out, takes the answers in as they come, and replaces workers that die."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from typing import Any, Protocol

from dllm_sparsity.errors import UserError
from dllm_sparsity.lm.journal import Compute, Work
from dllm_sparsity.sparsity.clock import Clock
from dllm_sparsity.study.counted import Counted, Facts
from dllm_sparsity.study.setting import Setting
from dllm_sparsity.study.stacked import Each

_AHEAD = 2  # batches that a worker has: the one it is at and the next, so that it never waits for this process
_PATIENCE_SECONDS = 60.0
_DEATHS = 3  # workers that one batch may take with it
_SEE_LOG = "log.txt in the run directory says how; a script that calls compare() needs if __name__ == '__main__':"
_log = logging.getLogger(__name__)


class Handle(Protocol):
    """One worker, somewhere."""

    def ask(self, method: str, *arguments: Any) -> Future[Any]:
        """Call a method of the worker; calls are done in their order.

        Args:
            method: Its name.
            arguments: What it takes.
        """
        ...

    def stop(self) -> None:
        """End it, whatever it does."""
        ...


class _Member:
    """A worker of the pool and the batches that it has."""

    def __init__(self, handle: Handle, seed: int) -> None:
        self.handle = handle
        self.ready: Future[Any] = handle.ask("describe", seed)
        self.load, self.accepted = 0, False


class Pool:
    """Workers that each keep a model.

    Args:
        start: Starts a worker, given its number.
        size: How many.
        died: What a call raises when its worker is gone.
        seed: The study's seed.
    """

    def __init__(
        self, start: Callable[[int], Handle], size: int, died: tuple[type[BaseException], ...], seed: int
    ) -> None:
        self._start, self._died, self._seed = start, died, seed
        self._members: list[_Member] = []
        self.deaths = 0  # since a batch was last answered
        self.replaced = 0
        self.accept: Callable[[dict[str, Any]], None] = lambda described: None
        """Raises where a worker, which describes itself, may not answer."""
        try:
            for number in range(size):
                self._members.append(self._new(number))
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._members)

    def _new(self, number: int) -> _Member:
        return _Member(self._start(number), self._seed)

    def describe(self) -> dict[str, Any]:
        """Return what the first worker runs on.

        Raises:
            UserError: No worker could be started.
        """
        return {name: value for name, value in self._first_ready().ready.result().items() if name != "code"}

    def facts(self, setting: Setting) -> Facts:
        """Return what a sealed cell says of the model, told by any worker.

        Args:
            setting: Of the cell.

        Raises:
            UserError: The model cannot be loaded, or several workers died of it.
        """
        for _ in range(_DEATHS):
            member = self._first_ready()
            try:
                return member.handle.ask("facts", setting).result()
            except self._died as error:
                self._replace(member, error)
        raise UserError(f"{_DEATHS} workers died one after another", _SEE_LOG)

    def _first_ready(self) -> _Member:
        while True:
            done, _ = wait([member.ready for member in self._members], _PATIENCE_SECONDS, FIRST_COMPLETED)
            if not done:
                _log.warning("no worker is there yet: the cluster may have no room for one")
                continue
            member = next(each for each in self._members if each.ready in done)
            try:
                self._check(member)
                return member
            except self._died as error:
                self._replace(member, error)

    def counted(
        self, setting: Setting | tuple[Setting, ...], works: Sequence[tuple[int, Work]]
    ) -> Iterator[tuple[int, Any]]:
        """Yield each batch when a worker has answered it, as `Worker.answer` does.

        Args:
            setting: Of the batches' cell, or of several cells that are answered at once.
            works: Number and batch.

        Raises:
            UserError: A batch could not be answered, or took several workers with it.
        """
        waiting, deaths = deque(works), dict.fromkeys((number for number, _ in works), 0)
        running: dict[Future[Any], tuple[_Member, int, Work]] = {}
        while waiting or running:
            self._hand_out(setting, waiting, running)
            starting = [member.ready for member in self._members if not member.ready.done()] if waiting else []
            done, _ = wait([*running, *starting], return_when=FIRST_COMPLETED)
            for future in [each for each in running if each in done]:  # in order: the first of a dead one killed it
                member, number, work = running.pop(future)
                member.load -= 1
                try:
                    counted = future.result()
                except self._died as error:
                    first = member in self._members  # calls behind the one that killed it fail as well
                    if first:
                        deaths[number] += 1
                        self._replace(member, error)
                    if deaths[number] >= _DEATHS:
                        raise UserError(
                            f"a batch of {_size(work)} killed {_DEATHS} workers",
                            "most likely memory: lower batch_size or stack, or give each worker more",
                        ) from error
                    waiting.appendleft((number, work))
                else:
                    self.deaths = 0
                    yield number, counted

    def _hand_out(
        self,
        setting: Setting | tuple[Setting, ...],
        waiting: deque[tuple[int, Work]],
        running: dict[Future[Any], tuple[_Member, int, Work]],
    ) -> None:
        for member in list(self._members):
            try:
                if member.ready.done():
                    self._check(member)
            except self._died as error:
                self._replace(member, error)
        for _ in range(_AHEAD):  # one each before anyone gets a second
            for member in self._members:
                if waiting and member.ready.done() and member.load < _AHEAD:
                    number, work = waiting.popleft()
                    running[member.handle.ask("answer", setting, work)] = member, number, work
                    member.load += 1

    def _check(self, member: _Member) -> None:
        """Look at a worker once that has just come."""
        described = member.ready.result()
        if not member.accepted:
            self.accept(described)
            member.accepted = True

    def _replace(self, member: _Member, error: BaseException) -> None:
        """Put a new worker in the place of a dead one; it is given batches when it is there."""
        number = self._members.index(member)
        self.deaths += 1
        _log.warning("worker %d died and is replaced: %s", number, " ".join(str(error).split())[:300])
        member.handle.stop()
        if self.deaths > _DEATHS * len(self._members):
            raise UserError(f"{self.deaths} workers died, and no batch was answered", _SEE_LOG)
        self._members[number] = self._new(number)
        self.replaced += 1

    def close(self) -> None:
        """End all workers."""
        for member in self._members:
            member.handle.stop()
        self._members.clear()


class PoolHost:
    """A model in the workers of a pool; here is only what plans batches.

    Args:
        pool: The workers.
        lm: The model's backend, without its weights.
    """

    def __init__(self, pool: Pool, lm: Any) -> None:
        self.pool, self.lm = pool, lm

    @contextmanager
    def attached(self, setting: Setting) -> Iterator[_There]:
        """Return where the batches of a cell are answered.

        Args:
            setting: Of the cell.
        """
        yield _There(self.pool, setting, self.lm.clock)

    @contextmanager
    def stacked(self, settings: Sequence[Setting]) -> Iterator[_TogetherThere]:
        """Return where the batches of several cells are answered at once.

        Args:
            settings: Of the cells, which differ in strength alone.
        """
        yield _TogetherThere(self.pool, tuple(settings), self.lm.clock)

    def facts(self, setting: Setting) -> Facts:
        """Return what a sealed cell says of the model.

        Args:
            setting: Of the cell.
        """
        return self.pool.facts(setting)


class _There:
    """Batches of one cell, answered by the workers of a pool."""

    checked = True
    """A worker looks behind its first batch that every site acted."""
    others_seconds = 0.0

    def __init__(self, pool: Pool, setting: Setting, clock: Clock) -> None:
        self._pool, self._setting, self.clock = pool, setting, clock

    def counted(self, works: Sequence[tuple[int, Work]], compute: Compute) -> Iterator[tuple[int, Counted]]:
        """Yield each batch when it is answered.

        Args:
            works: Number and batch.
            compute: Not used: the model is elsewhere.
        """
        return self._pool.counted(self._setting, works)

    def rest(self) -> None:
        """Return nothing: workers count inside of batches alone."""
        return


class _TogetherThere:
    """Batches of several cells at once, answered by the workers of a pool."""

    checked = True

    def __init__(self, pool: Pool, settings: tuple[Setting, ...], clock: Clock) -> None:
        self._pool, self._settings, self.clock = pool, settings, clock

    def counted(self, works: Sequence[tuple[int, Work]]) -> Iterator[tuple[int, Each]]:
        """Yield what each batch gave in every cell when it is answered.

        Args:
            works: Number and batch.
        """
        return self._pool.counted(self._settings, works)


def _size(work: Work) -> str:
    batch = work.batch if isinstance(work.batch, Sequence) else work.batch.prompts
    return f"{len(batch)} requests"
