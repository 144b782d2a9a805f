"""The fused pass as one operator, for torch.compile; on a CPU plain torch stands in for the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from dllm_sparsity.sparsity.frame import TokenState
from dllm_sparsity.sparsity.kernels import fused, naive
from dllm_sparsity.sparsity.kernels.fused import Counters, Producer, launch, words
from dllm_sparsity.sparsity.rule import Cut

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


def apply(
    rows: Float[Tensor, "rows width"],
    cut: Cut | None,
    mask: Bool[Tensor, "rows width"] | None,
    counters: Counters | None,
    producer: Producer | None = None,
) -> Float[Tensor, "rows width"]:
    """Do what `launch` does, as one operator where torch.compile traces.

    Args:
        rows: As in `launch`.
        cut: As in `launch`.
        mask: As in `launch`.
        counters: As in `launch`.
        producer: As in `launch`.
    """
    if not torch.compiler.is_compiling():
        return launch(rows, cut, mask=mask, counters=counters, producer=producer)
    made = _operator(
        rows,
        mask,
        counters.table if counters else None,
        counters.index if counters else None,
        counters.states if counters else None,
        counters.compare if counters else None,
        counters.previous if counters else None,
        counters.first if counters else None,
        producer.other if producer else None,
        producer.weight if producer else None,
        producer.kind if producer else "",
        producer.eps if producer else 0.0,
        cut.kind if cut else "",
        float(cut.value) if cut else 0.0,
        float(cut.power) if cut else 1.0,
    )
    return made if cut or mask is not None or producer else rows


@torch.library.custom_op("dllm_sparsity::sparsify_rows", mutates_args=("table", "previous", "first"))
def _operator(
    rows: torch.Tensor,
    mask: torch.Tensor | None,
    table: torch.Tensor | None,
    index: torch.Tensor | None,
    states: torch.Tensor | None,
    compare: torch.Tensor | None,
    previous: torch.Tensor | None,
    first: torch.Tensor | None,
    other: torch.Tensor | None,
    weight: torch.Tensor | None,
    producer: str,
    eps: float,
    kind: str,
    value: float,
    power: float,
) -> torch.Tensor:
    counters = None
    if table is not None and index is not None and states is not None:
        counters = Counters(table, index, states, compare, previous, first)
    made = None if other is None else Producer(producer, other, weight, eps)
    cut = Cut(cast("Any", kind), value, power) if kind else None
    if fused.takes(rows):
        result = launch(rows, cut, mask=mask, counters=counters, producer=made)
    else:
        result = _by_hand(rows, mask, counters)
    return rows.new_empty(0) if result is rows else result  # an operator may not return what it was given


@_operator.register_fake
def _(rows: torch.Tensor, mask: torch.Tensor | None, *rest: object) -> torch.Tensor:
    writes = mask is not None or rest[8] or rest[10]
    return rows.new_empty(rows.shape if writes else (0,))


def _by_hand(rows: Tensor, mask: Tensor | None, counters: Counters | None) -> Tensor:
    """Do the same in plain torch, for a mask; this is what a compiled model runs on a CPU."""
    nonfinite = naive.nonfinite_rows(rows)
    kept_rows = rows if mask is None else naive.zero_out(rows, mask | nonfinite)
    if counters is not None:
        kept = kept_rows.bool()
        one = torch.ones(len(rows), dtype=torch.long, device=rows.device)
        size = naive.count_true(kept)
        columns = [nonfinite[:, 0].long(), one, size, one * rows.shape[-1]]
        columns += [0 * one] * (counters.table.shape[1] - len(columns))
        if counters.previous is not None and counters.first is not None and counters.compare is not None:
            packed = naive.pack_bits(torch.nn.functional.pad(kept, (0, 32 * words(rows.shape[-1]) - rows.shape[-1])))
            sets = [counters.previous.view(torch.uint8), counters.first.view(torch.uint8)]
            compared = [column for earlier in sets for column in naive.compare_sets(packed, size, earlier)]
            columns[4:] = [torch.where(counters.compare == 2, column, 0) for column in compared]
            start, idle = counters.compare == 1, (counters.states == TokenState.PAD).unsqueeze(-1)
            sets[1].copy_(torch.where(start, packed, sets[1]))
            sets[0].copy_(torch.where(start | ((counters.compare == 2) & ~idle), packed, sets[0]))
        counters.table.index_add_(0, counters.index, torch.stack(columns, dim=-1))
    return kept_rows
