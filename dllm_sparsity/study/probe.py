"""Three steps of a study, timed on its device: what a forward pass takes, dense and under each rule."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from dllm_sparsity.errors import UserError
from dllm_sparsity.lm.items import PromptBatch
from dllm_sparsity.sparsity.sparsifier import sparsify
from dllm_sparsity.study.models import make_rule
from dllm_sparsity.study.plan import Cell

STEPS = 3


class _Enough(Exception):
    """Ends a probe from inside the loop that it times."""


def seconds_per_forward(lm: Any, cell: Cell, batches: Sequence[Any]) -> float:
    """Time three forward passes of a cell; of a likelihood those of the longest, the middle and the shortest batch.

    Args:
        lm: The backend, loaded.
        cell: The cell.
        batches: Its batches, as the backend makes them.

    Raises:
        UserError: The rule, a site or the device refuses.
    """
    rule = None
    if cell.rule is not None and cell.strength is not None:
        rule = make_rule(cell.rule.name, cell.strength, cell.rule.parameters)
    layers = cell.rule.layers if cell.rule is not None else None
    chosen = [batches[0], batches[len(batches) // 2], batches[-1]]
    generates = isinstance(chosen[0], PromptBatch)
    before, mc = lm.check_greedy, getattr(lm, "mc", None)
    lm.check_greedy = False  # its forward passes are as long, and only their number is another
    if cell.task.mc is not None and mc is not None:
        lm.mc = cell.task.mc
    try:
        with sparsify(lm.model, rule, cell.sites, layers=layers, clock=lm.clock) as tracker:
            _time(lm, chosen[1], 2 if generates else 1)  # the first call of a shape is slower
            found = _time(lm, chosen[1], STEPS + 1) if generates else [n for one in chosen for n in _time(lm, one, 1)]
            tracker.read()
    finally:
        lm.check_greedy = before
        if mc is not None:
            lm.mc = mc
        lm.log.clear()
    return statistics.median(found) if generates else statistics.fmean(found)


def forget_peak(device: str) -> None:
    """Count the memory of a GPU anew.

    Args:
        device: A torch device.
    """
    if device.startswith("cuda") and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: str) -> int | None:
    """Return the most memory that torch has held on a GPU since `forget_peak`; None on a CPU.

    Args:
        device: A torch device.
    """
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None


def _time(lm: Any, batch: Any, forwards: int) -> list[float]:
    """Return seconds of single forward passes, what the loop does between them included."""
    with _stop_after(lm.model, forwards) as starts:
        try:
            lm._generate(batch) if isinstance(batch, PromptBatch) else lm._score(batch)
        except _Enough:
            pass
        else:
            starts.append(_now())
    if len(starts) < 2:
        raise UserError("a batch took no forward pass", "look at the task")
    return [after - before for before, after in pairwise(starts)]


@contextmanager
def _stop_after(model: Any, forwards: int) -> Iterator[list[float]]:
    """Note when each forward pass starts, and stop before the one that is too many."""
    starts: list[float] = []

    def note(*_: Any) -> None:
        starts.append(_now())
        if len(starts) > forwards:
            raise _Enough

    handle = model.register_forward_pre_hook(note)
    try:
        yield starts
    finally:
        handle.remove()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
