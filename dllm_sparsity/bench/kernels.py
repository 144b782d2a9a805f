"""The kernel part: one site's rows through our kernel, through a plain copy, and through the paper's function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dllm_sparsity.bench.against import Paper
from dllm_sparsity.bench.timing import Contestant, Watch, race
from dllm_sparsity.sparsity.clock import TokenState
from dllm_sparsity.sparsity.kernels import fused
from dllm_sparsity.sparsity.rule import Rule

COPY, RULE, FULL, PAPER = "copy", "the rule", "the rule, all statistics", "the paper's function"
_COLUMNS = 14  # of the ledger, with density and overlap
_SEQUENCE = 512  # rows that count into one line of it
_FLUSHES = 4
_LARGE_BYTES = 1 << 30
_WARMUP = 5
_SEED = 0


def bandwidth(device: torch.device, repeats: int) -> float:
    """Return the bytes a second, read and written, of a copy of 1 GiB.

    Args:
        device: A GPU.
        repeats: Copies that count.
    """
    source = torch.zeros(_LARGE_BYTES, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timed = race([Contestant(COPY, lambda: target.copy_(source))], repeats, _WARMUP, Watch(device))[0]
    return 2 * _LARGE_BYTES / timed["median_seconds"]


def make_rows(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return rows as a SiLU-GLU makes them: `silu(a) * b` of normal numbers, the same in every run.

    Args:
        rows: Tokens.
        width: Entries of a row.
        dtype: Of the entries.
        device: Where they are.
    """
    generator = torch.Generator(device).manual_seed(_SEED)
    gate, up = (torch.randn(rows, width, generator=generator, device=device) for _ in range(2))
    return (torch.nn.functional.silu(gate) * up).to(dtype)


def race_kernels(rows: Tensor, rule: Rule, paper: Paper | None, bytes_a_second: float, repeats: int) -> dict[str, Any]:
    """Time one pass over rows in turn, the L2 cache flushed before each, and return the times as plain data.

    Args:
        rows: `[rows, width]`, on a GPU.
        rule: What to keep, one that the kernel knows.
        paper: The paper's code, or None.
        bytes_a_second: Bandwidth that shares of the byte floor are of.
        repeats: Rounds that count.
    """
    cut, out, counters = rule.fused(rows.shape[1]), torch.empty_like(rows), _counters(rows)

    def ours() -> Tensor:
        return fused.launch(rows, cut, out=out)

    def counted() -> Tensor:
        return fused.launch(rows, cut, out=out, counters=counters)

    contestants = [
        Contestant(COPY, lambda: out.copy_(rows)),
        Contestant(RULE, ours, over=COPY),
        Contestant(FULL, counted, over=COPY),
    ]
    if paper is not None:
        contestants.append(Contestant(PAPER, lambda: paper.sparsify(rows[None]), over=RULE))
    timings = race(contestants, repeats, _WARMUP, Watch(rows.device, _FLUSHES))
    element = 2 * rows.element_size()
    packed = 3 / 8  # a bit of the step before, read and written, and one of the first step, read
    for timed, each in zip(timings, (element, element, element + packed), strict=False):
        floor = each * rows.numel() / bytes_a_second
        timed |= {"bytes_an_element": each, "floor_seconds": floor, "floor_share": floor / timed["median_seconds"]}
    masks = None if paper is None else compare_masks(rows, ours() != 0, paper.sparsify(rows[None])[0] != 0)
    return {"rows": len(rows), "width": rows.shape[1], "timings": timings, "masks": masks}


def _counters(rows: Tensor) -> fused.Counters:
    """Return what the ledger gives the kernel at a step that compares; 512 rows of a sequence share a line."""
    count, device = len(rows), rows.device
    words = fused.words(rows.shape[1])
    generator = torch.Generator(device).manual_seed(_SEED)
    before, first = (
        torch.randint(-(2**31), 2**31, (count, words), generator=generator, dtype=torch.int32, device=device)
        for _ in range(2)
    )
    return fused.Counters(
        torch.zeros(math.ceil(count / _SEQUENCE), _COLUMNS, dtype=torch.long, device=device),
        torch.arange(count, device=device) // _SEQUENCE,
        torch.full((count,), int(TokenState.MASKED), dtype=torch.long, device=device),
        torch.full((), 2, dtype=torch.int32, device=device),
        before,
        first,
    )


def compare_masks(rows: Tensor, ours: Tensor, theirs: Tensor) -> dict[str, int]:
    """Count the rows whose kept sets differ, and those among them whose float64 sum has no rounding in any order.

    Args:
        rows: `[rows, width]`.
        ours: Entries that are not zero after our rule.
        theirs: The same after the paper's.
    """
    differ, exact = (ours != theirs).any(-1), exact_rows(rows)
    found = {"rows": len(rows), "exact": exact, "differ": differ, "differ_exact": differ & exact}
    return {name: int(value if isinstance(value, int) else value.sum()) for name, value in found.items()}


def exact_rows(rows: Tensor) -> Tensor:
    """Return True for rows whose magnitudes add up in float64 without rounding, whatever the order.

    All partial sums are then whole multiples of the finest step between numbers near the smallest entry, and fewer
    than 2**53 of them.

    Args:
        rows: `[rows, width]`.
    """
    magnitudes = rows.abs().double()
    exponents = torch.frexp(magnitudes).exponent.masked_fill(magnitudes == 0, 1024)
    step = exponents.amin(-1) - 1 + round(math.log2(torch.finfo(rows.dtype).eps))
    return torch.frexp(magnitudes.sum(-1)).exponent <= 53 + step
