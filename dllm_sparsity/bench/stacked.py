"""`python -m dllm_sparsity.bench.stacked`: times strengths that share forward passes beside the same ones one by one.

Random weights, a clock that is told of each pass, top_p at site `all`, density and overlap counted. Apart: the passes
of k strengths one after another, each attached as a study attaches it, so that kernels take over where they can.
Stacked: one pass over k copies of the batch. A time is the median of several request batches, for one forward pass.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from dllm_sparsity.bench import environment
from dllm_sparsity.bench.model import build
from dllm_sparsity.bench.settings import Plan, Settings, plan
from dllm_sparsity.bench.shapes import SHAPES
from dllm_sparsity.bench.timing import Watch
from dllm_sparsity.errors import UserError
from dllm_sparsity.sparsity.clock import Clock, Compare, Phase, Slot, TokenState
from dllm_sparsity.sparsity.rules.top_p import TopP
from dllm_sparsity.sparsity.sparsifier import sparsify
from dllm_sparsity.sparsity.stack import Copy, Stack, StackClock

STRENGTHS = (0.97, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
COPIES = (2, 4, 8)
_ON_GPU = {"embedded": 5, "qwen2.5-7b": 4, "llama-3.1-8b": 8}  # shapes and their layers
_ON_CPU = {"embedded": 1}
_BATCHES_ON_GPU = ((1, 128), (4, 128), (16, 128), (16, 512))
_BATCHES_ON_CPU = ((1, 16), (4, 16))
_FORWARDS = 8  # of a request batch that is timed
_WARMUP = 3  # forward passes
_SEED = 0


@torch.inference_mode()
def race_stacks(chosen: Plan) -> Iterator[dict[str, Any]]:
    """Time a model and yield a row for each batch and number of copies.

    Args:
        chosen: Model, batches and device; of the rule only its sites are used.

    Returns:
        Rows with `shape, batch, tokens, copies, dense_seconds, apart_seconds, stacked_seconds, peak_bytes`; the last
        two are None where the memory was full, and the last one on a CPU.
    """
    model, watch = build(chosen.shape, chosen.layers, chosen.dtype, chosen.device, chosen.head), Watch(chosen.device)
    for batch, tokens in chosen.batches:
        generator = torch.Generator(chosen.device).manual_seed(_SEED)
        ids = torch.randint(chosen.shape.vocabulary, (batch, tokens), generator=generator, device=chosen.device)
        dense = _seconds(watch, lambda count, ids=ids: [model(input_ids=ids) for _ in range(count)], 7)
        alone = []
        for strength in STRENGTHS:
            clock = Clock()
            with sparsify(model, TopP(strength), chosen.sites, clock=clock):
                alone.append(_seconds(watch, _counted(model, clock, ids, list(range(batch))), 5))
        for copies in COPIES:
            stacked, peak = _stacked(model, watch, chosen, ids, copies)
            yield {
                "shape": chosen.name,
                "batch": batch,
                "tokens": tokens,
                "copies": copies,
                "dense_seconds": dense,
                "apart_seconds": sum(alone[:copies]),
                "stacked_seconds": stacked,
                "peak_bytes": peak,
            }


def _stacked(model: nn.Module, watch: Watch, chosen: Plan, ids: Tensor, copies: int) -> tuple[float | None, int | None]:
    """Return the seconds of a pass over several copies, and the most memory; None where that was full."""
    is_gpu, clock = chosen.device.type == "cuda", StackClock(copies)
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    items = [Copy(number, item) for number in range(copies) for item in range(len(ids))]
    found: float | None = None
    try:
        with Stack(model, [TopP(strength) for strength in STRENGTHS[:copies]], chosen.sites, clock) as stack:
            found = _seconds(watch, _counted(model, clock, ids.repeat(copies, 1), items), 7)
    except torch.OutOfMemoryError:
        pass
    if found is None:
        torch.cuda.empty_cache()  # only now, when the error no longer holds what the forward pass held
        return None, None
    zeros = [unit.read().sparsity() for unit in stack.units]
    if zeros != sorted(zeros):
        raise RuntimeError(f"sparsity does not rise with the strengths {STRENGTHS[:copies]}: {zeros}")
    return found, torch.cuda.max_memory_allocated() if is_gpu else None


def _counted(model: nn.Module, clock: Clock, ids: Tensor, items: Sequence[Hashable]) -> Callable[[int], None]:
    """Return what runs one counted forward pass after another within one request batch."""
    states = torch.full(ids.shape, int(TokenState.COMMITTED), device=ids.device)

    def run(count: int) -> None:
        with clock.batch(items, count):
            for step in range(count):
                clock.tick(Slot(Phase.DENOISE, step=step), states, Compare.PREVIOUS if step else Compare.START)
                model(input_ids=ids)

    return run


def _seconds(watch: Watch, run: Callable[[int], object], repeats: int) -> float:
    """Return the median time of one forward pass of a request batch."""
    run(_WARMUP)
    return median(watch.seconds(lambda: run(_FORWARDS)) / _FORWARDS for _ in range(repeats))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of RESULTS.md; on a CPU a small one.

    Args:
        arguments: Of the command line; None takes the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", help="cpu, cuda or cuda:0; the GPU where there is one")
    parser.add_argument("--shape", action="append", metavar="NAME", help=f"one of {', '.join(SHAPES)}; may be repeated")
    asked = parser.parse_args(arguments)
    try:
        device = plan(Settings(device=asked.device)).device
        is_gpu = device.type == "cuda"
        layers, batches = (_ON_GPU, _BATCHES_ON_GPU) if is_gpu else (_ON_CPU, _BATCHES_ON_CPU)
        plans = [
            plan(Settings(shape=name, layers=layers.get(name), batches=batches, device=asked.device))
            for name in asked.shape or layers
        ]
    except UserError as error:
        sys.exit(f"error: {error}")
    found = environment.describe(device)
    _say(f"{found['device']}, torch {found['packages']['torch']}; times in ms")
    _say(f"{'model':<14}{'layers':>7}{'batch':>8}{'k':>3}{'dense':>9}{'apart':>9}{'stacked':>9}{'ratio':>7}{'GiB':>6}")
    with torch.cuda.device(device) if is_gpu else nullcontext():
        for chosen in plans:
            for row in race_stacks(chosen):
                _say(_line(row, chosen.layers))


def _line(row: dict[str, Any], layers: int) -> str:
    dense, apart, stacked = row["dense_seconds"], row["apart_seconds"], row["stacked_seconds"]
    size = f"{row['batch']}x{row['tokens']}"
    told = f"{row['shape']:<14}{layers:>7}{size:>8}{row['copies']:>3}{dense * 1e3:>9.2f}{apart * 1e3:>9.2f}"
    if stacked is None:
        return f"{told}  out of memory"
    peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}"
    return f"{told}{stacked * 1e3:>9.2f}{apart / stacked:>7.2f}{peak:>6}"


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
