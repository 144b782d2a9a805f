"""Cells that differ in strength alone, answered together: the first is run, and the others' journals are filled."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from dllm_sparsity.families import find_ffns
from dllm_sparsity.lm.journal import Answer, Compute, Work
from dllm_sparsity.lm.stacked import compute_copies
from dllm_sparsity.sparsity.clock import Clock
from dllm_sparsity.sparsity.reading import NonFiniteError
from dllm_sparsity.sparsity.sites import choose
from dllm_sparsity.sparsity.stack import Stack, StackClock
from dllm_sparsity.study import collect
from dllm_sparsity.study.counted import Counted, Facts
from dllm_sparsity.study.journal import CellJournal
from dllm_sparsity.study.setting import Setting

_log = logging.getLogger(__name__)
Each = list[Counted | NonFiniteError]
"""What a batch gave in each cell; the error where an activation was NaN or infinite, so that others are not lost."""


class StackSource(Protocol):
    """Answers planned batches for several cells at once."""

    clock: Clock

    @property
    def checked(self) -> bool:
        """As in `Source`."""
        ...

    def counted(self, works: Sequence[tuple[int, Work]]) -> Iterator[tuple[int, Each]]:
        """Yield what each batch gave in every cell, in any order.

        Args:
            works: Number and batch.
        """
        ...


class StackHost(Protocol):
    """Where the model of a cell is, and where it can be asked for several cells at once."""

    @property
    def lm(self) -> Any:
        """As in `Host`."""
        ...

    def stacked(self, settings: Sequence[Setting]) -> AbstractContextManager[StackSource]:
        """Put the rules of several cells on the model.

        Args:
            settings: Of the cells.
        """
        ...

    def facts(self, setting: Setting) -> Facts:
        """As in `Host`."""
        ...


class StackedHere:
    """Batches answered for several cells at once in this process; with the memory full, for half as many at once.

    Args:
        lm: The backend, loaded.
        settings: Of the cells, which differ in strength alone.

    Raises:
        UserError: A site is missing, or a rule refuses its strength.
    """

    def __init__(self, lm: Any, settings: Sequence[Setting]) -> None:
        self._lm, self._settings, self.clock = lm, list(settings), lm.clock
        self._notes: list[str] = []
        self._use(len(settings))
        self._stacks[0].rehearse()
        self.checked, self.ffns = self._stacks[0].checked, self._stacks[0].ffns

    def _use(self, size: int) -> None:
        """Share the cells out to stacks of a size."""
        self._size, starts = size, range(0, len(self._settings), size)
        self._stacks = [_stack(self._lm, self._settings[start : start + size]) for start in starts]

    def counted(self, works: Sequence[tuple[int, Work]]) -> Iterator[tuple[int, Each]]:
        """Yield each batch, one after another.

        Args:
            works: Number and batch.
        """
        for number, work in works:
            yield number, self.one(work)

    def one(self, work: Work) -> Each:
        """Answer one batch for every cell.

        Args:
            work: The batch.
        """
        while True:
            try:
                return [each for stack in self._stacks for each in self._on(stack, work)]
            except torch.OutOfMemoryError:
                if self._size == 1:
                    raise
            torch.cuda.empty_cache()  # only now, when the error no longer holds what the forward pass held
            self._use((self._size + 1) // 2)
            self._notes = [f"the memory held {self._size} strengths at once, not {len(self._settings)}"]
            _log.warning("%s", self._notes[0])

    def _on(self, stack: Stack, work: Work) -> Each:
        started = time.perf_counter()
        with stack:
            answers = compute_copies(self._lm, work, stack.clock)
        seconds = (time.perf_counter() - started) / len(answers)
        notes = [*stack.notes, *self._lm.clock.notes, *self._notes]
        found: Each = []
        for unit, results in zip(stack.units, answers, strict=True):
            try:
                reading = unit.take(notes)
            except NonFiniteError as error:
                found.append(error)
                continue
            table = collect.step_table(reading.columns)
            refused = unit.clock.overlap_refused
            found.append(Counted(Answer(results, seconds), table, reading.per_item, tuple(reading.notes), refused))
        return found


def _stack(lm: Any, settings: Sequence[Setting]) -> Stack:
    rules = [setting.make_rule() for setting in settings]
    return Stack(lm.model, rules, settings[0].sites, StackClock(len(rules)), layers=settings[0].layers)


def why_alone(lm: Any, setting: Setting) -> str | None:
    """Return why the strengths of a cell's rule cannot share forward passes; None where they can.

    Args:
        lm: The cell's backend; its weights are not looked at.
        setting: Of the cell.

    Raises:
        UserError: A site or layer does not exist.
    """
    if not getattr(lm, "stacks", False):
        return f"{type(lm).__name__} answers for one strength at a time"
    if any(ffn.experts for ffn in choose(find_ffns(lm.model), setting.sites, setting.layers)):
        return "experts take the tokens of all strengths together"
    return None


@dataclass(frozen=True)
class Fellow:
    """A cell whose journal is filled while another is run; `tell` is told what of the journal is damaged."""

    setting: Setting
    fingerprint: str
    journal: Path
    tell: Callable[[str], None] | None = None


class LeadHost:
    """Answers the batches of the cell that is run for other cells as well, and writes them into their journals.

    A batch is written for the others first, so whatever a crash leaves, the cell that is run lacks it and asks again.

    Args:
        host: Where the model is.
        fellows: The other cells.
    """

    def __init__(self, host: StackHost, fellows: Sequence[Fellow]) -> None:
        self._host, self._fellows, self.lm = host, list(fellows), host.lm

    @contextmanager
    def attached(self, setting: Setting) -> Iterator[_Shared]:
        """Put the rules of all these cells on the model.

        Args:
            setting: Of the cell that is run.
        """
        with ExitStack() as stack:
            source = stack.enter_context(self._host.stacked([setting, *(each.setting for each in self._fellows)]))
            shared = _Shared(source)
            for each in self._fellows:
                journal = closing(CellJournal(each.journal, each.fingerprint, shared, each.tell))
                shared.journals.append(stack.enter_context(journal))
            yield shared

    def facts(self, setting: Setting) -> Facts:
        """Return what a sealed cell says of the model.

        Args:
            setting: Of the cell.
        """
        return self._host.facts(setting)


class _Shared:
    """Batches of one cell that are other cells' as well."""

    def __init__(self, source: StackSource) -> None:
        self._source, self.clock, self.checked = source, source.clock, source.checked
        self.journals: list[CellJournal] = []
        self.others_seconds = 0.0

    def counted(self, works: Sequence[tuple[int, Work]], compute: Compute) -> Iterator[tuple[int, Counted]]:
        """Yield each batch when it is answered and the other cells have it.

        Args:
            works: Number and batch.
            compute: Not used: it knows one rule alone.

        Raises:
            NonFiniteError: An activation was NaN or infinite; in another cell it is raised when that cell is run.
        """
        asked, started = dict(works), time.perf_counter()
        for number, (mine, *others) in self._source.counted(works):
            wall = (time.perf_counter() - started) / (1 + len(others))
            for journal, counted in zip(self.journals, others, strict=True):
                if isinstance(counted, Counted):
                    journal.add(asked[number].key, counted, wall)
            if isinstance(mine, NonFiniteError):
                raise mine
            self.others_seconds += (time.perf_counter() - started) * len(others) / (1 + len(others))
            yield number, mine
            started = time.perf_counter()

    def rest(self) -> None:
        """Return nothing: rules are on the model inside of batches alone."""
        return
