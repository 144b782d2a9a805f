"""Calls the fused kernel: which tensors it can take, how a row is cut into tiles, and the arguments."""

from __future__ import annotations

import importlib.util
import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from dllm_sparsity.sparsity.rule import Cut

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

WIDEST = 65_536
_INSTALLED = importlib.util.find_spec("triton") is not None and torch.version.hip is None
_TILE = 16_384  # entries of a row that stay in registers
_STEPS = {torch.bfloat16: 1 << 16, torch.float16: 1 << 13, torch.float32: 1}  # float32 bits between neighbours
_FEW_ROWS = 264  # two for each multiprocessor: then no row waits for another
_REGISTERS = {16_384: 80, 4096: 64}  # tile -> a thread's registers, where fewer let more rows be in flight
_KINDS = {"top_p": 1, "top_k": 2, "max_p": 3, "threshold": 4}
PRODUCERS = {"silu_mul": 1, "gelu_tanh_mul": 2, "rms_norm": 3, "gelu_mul": 4}


@dataclass(frozen=True)
class Counters:
    """Where one FFN call is counted; all on the device of the rows.

    Args:
        table: The ledger's lines, `[lines, 4]` or, with overlap, `[lines, 14]`, int64.
        index: Line of each row.
        states: `TokenState` of each row.
        compare: 0 no overlap, 1 remember as the first step, 2 compare; int32, one entry.
        previous: Packed kept sets of the step before, or None without overlap; written.
        first: Packed kept sets of the first step, or None; written at the first step.
    """

    table: Int[Tensor, "lines columns"]
    index: Int[Tensor, "rows"]
    states: Int[Tensor, "rows"]
    compare: Int[Tensor, ""] | None = None
    previous: Int[Tensor, "rows words"] | None = None
    first: Int[Tensor, "rows words"] | None = None


@dataclass(frozen=True)
class Producer:
    """What makes the rows, so that they need not be written and read again.

    Args:
        kind: `silu_mul`, `gelu_mul`, `gelu_tanh_mul` (rows are the gate before its activation, other the up projection)
            or `rms_norm` (other is the mean square of each row, float32).
        other: `[rows, width]` or `[rows]`.
        weight: The norm's weight.
        eps: Of the norm.
    """

    kind: str
    other: Tensor
    weight: Tensor | None = None
    eps: float = 0.0


@cache
def _kernel() -> tuple[Any, bool]:
    """Return the kernel and whether it is interpreted on the host."""
    import triton

    from dllm_sparsity.sparsity.kernels.triton import sparsify_kernel

    return sparsify_kernel, not isinstance(sparsify_kernel, triton.JITFunction)


def takes(rows: Tensor) -> bool:
    """Return whether the kernel takes these rows: on a GPU, of 16 or 32 bits, no wider than 65,536, no gradient.

    Args:
        rows: Activations, `[rows, width]`.
    """
    if rows.dtype not in _STEPS or not 0 < rows.shape[-1] <= WIDEST or (rows.requires_grad and torch.is_grad_enabled()):
        return False
    return rows.is_cuda and _INSTALLED


def makes(rows: Tensor) -> bool:
    """Return whether the kernel can make such rows itself: what `takes` says, and a width up to 16,384.

    Args:
        rows: Rows of the kind, `[rows, width]`.
    """
    return takes(rows) and rows.shape[-1] <= _TILE


def launch(
    rows: Float[Tensor, "rows width"],
    cut: Cut | None = None,
    *,
    mask: Bool[Tensor, "rows width"] | None = None,
    counters: Counters | None = None,
    producer: Producer | None = None,
    out: Float[Tensor, "rows width"] | None = None,
    mass: Float[Tensor, "rows"] | None = None,
) -> Float[Tensor, "rows width"]:
    """Set to zero what the rule does not keep, and count.

    Args:
        rows: Any strides.
        cut: A rule's cutoff; None drops nothing.
        mask: What to keep, in place of `cut`.
        counters: Where to count.
        producer: What makes the rows from `rows`; width up to 16,384.
        out: Where to write, contiguous.
        mass: Where to write the L1 mass of what each row keeps, float32.

    Returns:
        The rows after the rule; `rows` itself where nothing is dropped or made.
    """
    count, width = rows.shape
    writes = cut is not None or mask is not None or producer is not None
    if out is None:
        out = torch.empty(count, width, dtype=rows.dtype, device=rows.device) if writes else rows
    if count == 0:
        return out
    if rows.stride(1) * width >= 2**31:  # places in a row are 32-bit numbers
        rows = rows.contiguous()
    mask = None if mask is None else mask.contiguous()
    other = None if producer is None else producer.other.contiguous()
    weight = None if producer is None or producer.weight is None else producer.weight.contiguous()
    kernel, host = _kernel()
    tile, tiles, warps = tiling(width)
    registers = _REGISTERS.get(tile) if count > _FEW_ROWS else None
    overlap = counters is not None and counters.previous is not None
    number = 5 if mask is not None else 0 if cut is None else _KINDS[cut.kind]
    power = 1.0 if cut is None else cut.power
    here = torch.cuda.device(rows.device) if rows.is_cuda else nullcontext()  # Triton launches on the current device
    with here:
        kernel[(count,)](
            rows,
            other,
            weight,
            out,
            mask,
            counters.index if counters else None,
            counters.states if counters else None,
            counters.table if counters else None,
            counters.compare if counters else None,
            counters.previous if counters else None,
            counters.first if counters else None,
            mass,
            rows.stride(0),
            rows.stride(1),
            other.stride(0) if other is not None else 0,
            mask.stride(0) if mask is not None else 0,
            width,
            0.0 if cut is None else float(cut.value),
            float(power),
            0.0 if cut is None else _first_guess(cut, width),
            producer.eps if producer else 0.0,
            KIND=number,
            POWER=power if power in (1.0, 2.0) else 0.0,
            PRODUCER=PRODUCERS[producer.kind] if producer else 0,
            STEP=_STEPS[rows.dtype],
            COUNT=counters is not None,
            COLUMNS=counters.table.shape[1] if counters else 4,
            OVERLAP=overlap,
            MASS=mass is not None,
            HOST=host,
            THREADS=32 * warps,
            TILE=tile,
            TILES=tiles,
            num_warps=warps,
            **({} if host or registers is None else {"maxnreg": registers}),
        )
    return out


def tiling(width: int) -> tuple[int, int, int]:
    """Return the entries of a tile, the tiles of a row and the warps of a program.

    Args:
        width: Entries of a row.
    """
    tile = min(_TILE, max(1024, 1 << (width - 1).bit_length()))
    return tile, -(-width // tile), max(1, min(8, tile // 1024))


def words(width: int) -> int:
    """Return the 32-bit words of a packed kept set; their order is the kernel's own.

    Args:
        width: Entries of a row.
    """
    tile, tiles, _ = tiling(width)
    return tile * tiles // 32


@cache
def _first_guess(cut: Cut, width: int) -> float:
    """Return cutoff over mean if magnitudes were exponentially distributed; where the search starts, no more."""
    if cut.kind == "top_k":
        return max(0.01, -math.log(min(1.0, cut.value / width)))
    low, high = 0.01, 40.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 + middle) * math.exp(-middle) >= cut.value else (low, middle)
    return low
