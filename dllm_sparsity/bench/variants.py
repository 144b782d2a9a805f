"""The contestants of the model part: dense, sparsified, and the paper's hooks, each on its own copy of the modules."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dllm_sparsity.bench.against import Paper
from dllm_sparsity.bench.model import share
from dllm_sparsity.bench.timing import Contestant, Watch, capture, race
from dllm_sparsity.families import find_ffns
from dllm_sparsity.sparsity.clock import Clock, Compare, Phase, Slot, TokenState
from dllm_sparsity.sparsity.rule import Rule
from dllm_sparsity.sparsity.sparsifier import Tracker, sparsify

DENSE, DENSE_EAGER = "dense", "dense, eager"
FULL, NO_OVERLAP, PAPER = "sparsified, all statistics", "sparsified, without overlap", "the paper's hooks"


class Sparsified:
    """A model with a rule attached, and a clock that is told of every forward pass, as a denoising loop tells it.

    Args:
        stack: Ends the attachment.
        model: Hooks go onto a copy of it.
        ids: Token ids, `[batch, tokens]`.
        rule: What to keep.
        sites: Where.
        metrics: What to count beside density.
        forwards: Forward passes to make room for.
    """

    def __init__(
        self,
        stack: ExitStack,
        model: nn.Module,
        ids: Tensor,
        rule: Rule,
        sites: Sequence[str],
        metrics: Sequence[str],
        forwards: int,
    ) -> None:
        self._model, self._ids, self._steps = share(model), ids, itertools.count()
        self._states = torch.full_like(ids, TokenState.MASKED)
        self._passes = 0
        self.clock = Clock()
        self.tracker: Tracker = stack.enter_context(
            sparsify(self._model, rule, sites, clock=self.clock, metrics=metrics)
        )
        stack.enter_context(self.clock.batch(list(range(len(ids))), forwards))
        self.tick(Compare.START)
        self.run()

    def tick(self, compare: Compare = Compare.PREVIOUS) -> None:
        """Announce the next step.

        Args:
            compare: As in `Clock.tick`.
        """
        self.clock.tick(Slot(Phase.DENOISE, step=next(self._steps)), self._states, compare)

    def run(self) -> Tensor:
        """Run one forward pass and return what the model gives."""
        self._passes += 1
        return self._model(input_ids=self._ids, use_cache=False)[0]

    def captured(self) -> Callable[[], None]:
        """Return what replays one forward pass as a CUDA graph."""
        self.tick()
        replay = capture(self.run)
        self._passes -= 1  # the pass that is captured does not run
        self.tick()

        def run() -> None:
            self._passes += 1
            replay()

        return run

    def sparsity(self) -> dict[str, float]:
        """Return the sparsity of each site, after the block.

        Raises:
            RuntimeError: The counters did not count every forward pass, so their time means nothing.
        """
        reading = self.tracker.read()
        rows = self._passes * self._ids.numel() * len(self.tracker.ffns) * len(self.tracker.sites)
        if sum(reading["rows"]) != rows:
            raise RuntimeError(f"the counters saw {sum(reading['rows'])} rows, {rows} passed")
        return {site: reading.sparsity(site=site) for site in self.tracker.sites}


def race_models(
    model: nn.Module,
    ids: Tensor,
    rule: Rule,
    sites: Sequence[str],
    paper: Paper | None,
    graph: bool,
    repeats: int,
    warmup: int,
) -> dict[str, Any]:
    """Time forward passes over one batch in turn, and return the times and what was counted as plain data.

    Args:
        model: The dense model.
        ids: Token ids, `[batch, tokens]`.
        rule: What to keep.
        sites: Where.
        paper: The paper's code, or None.
        graph: Whether to replay CUDA graphs; the paper's hooks wait for the device and are run eagerly all the same.
        repeats: Rounds that count.
        warmup: Rounds before them.
    """
    mode = "graph" if graph else "eager"

    def dense() -> None:
        model(input_ids=ids, use_cache=False)

    with ExitStack() as stack:
        contestants = [Contestant(DENSE, capture(dense) if graph else dense, mode=mode)]
        attached: list[Sparsified] = []
        for name, metrics in ((FULL, ("density", "overlap")), (NO_OVERLAP, ("density",))):
            ours = Sparsified(stack, model, ids, rule, sites, metrics, forwards=4 + warmup + repeats)
            call, before = (ours.captured(), None) if graph else (ours.run, ours.tick)
            contestants.append(Contestant(name, call, before, over=DENSE, mode=mode))
            attached.append(ours)
        full = attached[0]
        hooked = None
        if paper is not None:
            hooked, forget = _hooked(paper, model, full.tracker.sites)
            if graph:
                contestants.append(Contestant(DENSE_EAGER, dense))
            over = DENSE_EAGER if graph else DENSE
            contestants.append(Contestant(PAPER, lambda: hooked(input_ids=ids, use_cache=False), forget, over))
        timings = race(contestants, repeats, warmup, Watch(ids.device, flushes=int(graph)))
        clock = race([Contestant("clock", _other_clock(ids))], repeats, warmup, Watch(ids.device))[0]
        difference = None
        if hooked is not None:
            full.tick()
            theirs = hooked(input_ids=ids, use_cache=False)[0]
            difference = (full.run().float() - theirs.float()).abs().max().item() / theirs.float().abs().max().item()
    counted = [ours.sparsity() for ours in attached]
    batch, tokens = ids.shape
    return {
        "batch": batch,
        "tokens": tokens,
        "mode": mode,
        "timings": timings,
        "clock_seconds": clock["median_seconds"],
        "sparsity": counted[0],
        "sites": dict(full.tracker.kernels),
        "tracker_notes": list(full.tracker.notes),
        "difference_from_paper": difference,
    }


def _hooked(paper: Paper, model: nn.Module, sites: Sequence[str]) -> tuple[nn.Module, Callable[[], object]]:
    """Return a copy with the paper's hooks at our sites, and what forgets their counts."""
    hooked = share(model)
    names = {module: name for name, module in hooked.named_modules()}
    points = [ffn.points[site] for ffn in find_ffns(hooked) for site in sites]
    return hooked, paper.attach(hooked, [(names[point.module], point.side) for point in points])


def _other_clock(ids: Tensor) -> Callable[[], None]:
    """Return what announces a step to a clock that no counters listen to."""
    clock, states, steps = Clock(), torch.full_like(ids, TokenState.MASKED), itertools.count()
    clock.begin(list(range(len(ids))))
    return lambda: clock.tick(Slot(Phase.DENOISE, step=next(steps)), states, Compare.PREVIOUS)
