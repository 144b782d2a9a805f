"""Times calls in turn, A, B, C, A, B, C, ...: by events on a GPU, by the clock on a CPU; and captures CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

_FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU so far
_BEFORE_CAPTURE = 3  # calls on a side stream, as torch asks for


@dataclass(frozen=True)
class Contestant:
    """One of the calls that are timed in turn.

    Args:
        name: What tables call it.
        call: What is timed.
        before: Run before each call, not timed.
        over: The contestant whose time its own is divided by.
        mode: `eager`, or `graph` for the replay of a CUDA graph.
    """

    name: str
    call: Callable[[], object]
    before: Callable[[], object] | None = None
    over: str | None = None
    mode: str = "eager"


class Watch:
    """Measure single calls on a device.

    Args:
        device: Where they run.
        flushes: Times that a GPU's L2 cache is written over before each call. What this takes also hides the time
            that the host needs to launch a short call, which is then longer than the call.
    """

    def __init__(self, device: torch.device, flushes: int = 0) -> None:
        self._device, self._flushes = device, flushes
        if device.type == "cuda":
            self._start, self._end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._spare = torch.empty(_FLUSH_BYTES if flushes else 0, dtype=torch.int8, device=device)

    def seconds(self, call: Callable[[], object]) -> float:
        """Return how long a call takes.

        Args:
            call: May leave work queued on the device; that work counts.
        """
        if self._device.type != "cuda":
            started = time.perf_counter()
            call()
            return time.perf_counter() - started
        torch.cuda.synchronize(self._device)
        for _ in range(self._flushes):
            self._spare.zero_()
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3


def capture(call: Callable[[], object]) -> Callable[[], None]:
    """Return the replay of a call that is captured as a CUDA graph.

    Args:
        call: Must not wait for the device.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_BEFORE_CAPTURE):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def race(contestants: Sequence[Contestant], repeats: int, warmup: int, watch: Watch) -> list[dict[str, Any]]:
    """Time all contestants once a round, and return their times as plain data.

    A ratio is the median of the ratios within each round, so what slows the whole machine for a while cancels out.

    Args:
        contestants: In the order of a round.
        repeats: Rounds that count.
        warmup: Rounds before them that do not.
        watch: Measures.
    """
    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for number in range(warmup + repeats):
        for contestant in contestants:
            if contestant.before is not None:
                contestant.before()
            seconds = watch.seconds(contestant.call)
            if number >= warmup:
                times[contestant.name].append(seconds)
    return [_summary(contestant, times) for contestant in contestants]


def _summary(contestant: Contestant, times: dict[str, list[float]]) -> dict[str, Any]:
    seconds = times[contestant.name]
    found = {
        "name": contestant.name,
        "mode": contestant.mode,
        "median_seconds": median(seconds),
        "min_seconds": min(seconds),
        "max_seconds": max(seconds),
        "over": contestant.over,
        "seconds": seconds,
    }
    if contestant.over is not None:
        ratios = [mine / other for mine, other in zip(seconds, times[contestant.over], strict=True)]
        found |= {"ratio": median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    return found
