"""The definition of every kernel of the core, in plain torch; numpy sorts on CPU, where torch's sort is slow."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

_ROWS_PER_TASK = 256  # below this a second thread costs more than it saves


def sorted_descending(scores: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
    """Sort each row from the largest to the smallest.

    Args:
        scores: Any floating dtype; bfloat16 and float16 become float32, which holds them exactly.
    """
    if scores.device.type != "cpu":
        return scores.sort(dim=-1, descending=True).values
    wide = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
    array = wide.detach().contiguous().numpy().copy()
    tasks = min(torch.get_num_threads(), len(array) // _ROWS_PER_TASK)
    if tasks > 1:
        list(_pool(tasks).map(lambda part: part.sort(axis=1), np.array_split(array, tasks)))
    else:
        array.sort(axis=1)
    return torch.from_numpy(array).flip(-1)


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers)  # numpy's sort releases the GIL


def top_p_count(ordered: Float[Tensor, "rows width"], p: float) -> Int[Tensor, "rows 1"]:
    """Return the size of the smallest non-empty set that holds at least the share p of each row's sum.

    Sums are float64 and run from the largest entry down.

    Args:
        ordered: Non-negative rows, sorted in descending order.
        p: Share of the row's sum, in [0, 1].
    """
    mass = ordered.cumsum(-1, dtype=torch.float64)
    before = torch.searchsorted(mass, p * mass[:, -1:])  # how many prefixes fall short of the target
    return (before + 1).clamp(max=ordered.shape[-1])


def top_p_cutoff(scores: Float[Tensor, "rows width"], p: float) -> Float[Tensor, "rows 1"]:
    """Return the smallest score that top-p keeps in each row.

    Args:
        scores: Non-negative rows.
        p: Share of the row's sum to keep, in [0, 1].
    """
    ordered = sorted_descending(scores)
    return ordered.gather(-1, top_p_count(ordered, p) - 1).to(scores.dtype)


def top_k_cutoff(scores: Float[Tensor, "rows width"], count: int) -> Float[Tensor, "rows 1"]:
    """Return the `count`-th largest score of each row.

    Args:
        scores: Any rows.
        count: Entries to keep, at least 1 and at most the width.
    """
    if scores.device.type != "cpu":
        return scores.topk(count, dim=-1).values[:, -1:]
    return sorted_descending(scores)[:, count - 1 : count].to(scores.dtype)


def first_in_order(scores: Float[Tensor, "rows width"], count: Int[Tensor, "rows 1"]) -> Bool[Tensor, "rows width"]:
    """Mark the `count` largest scores of each row; among equal scores the lower index goes first.

    Args:
        scores: Any rows.
        count: Entries to mark in each row.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    )
    return rank < count


def nonfinite_rows(rows: Float[Tensor, "rows width"]) -> Bool[Tensor, "rows 1"]:
    """Return True for each row that holds a NaN or an infinity.

    Args:
        rows: Any rows.
    """
    low, high = torch.aminmax(rows.detach(), dim=-1, keepdim=True)  # both carry a NaN on
    return ~(low.isfinite() & high.isfinite())


def count_true(mask: Bool[Tensor, "rows width"]) -> Int[Tensor, rows]:
    """Count the True entries of each row.

    Args:
        mask: One row a token.
    """
    if mask.device.type == "cpu":
        packed = np.packbits(mask.numpy(), axis=1)
        return torch.from_numpy(np.bitwise_count(packed).sum(axis=1, dtype=np.int64))
    return mask.sum(-1)
