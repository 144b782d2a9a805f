"""The definition of every kernel of the core, in plain torch; on CPU numpy takes over where torch is slow."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt8
    from torch import Tensor

JACCARD_UNITS = 2.0**24  # a Jaccard value of 1 in the fixed point that it is summed in
_FEW, _MANY = 32_768, 262_144  # entries that a thread sorts and sums at a time: worth a thread, near its core's cache


def sorted_descending(scores: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
    """Sort each row from the largest to the smallest.

    Args:
        scores: Any floating dtype; bfloat16 and float16 become float32, which holds them exactly.
    """
    return _in_chunks(_sort, scores)


def _sort(scores: Tensor) -> Tensor:
    if not _on_host(scores):
        return scores.sort(dim=-1, descending=True).values
    wide = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
    array = wide.neg().numpy()
    array.sort(axis=1)
    return torch.from_numpy(array).neg()


def _on_host(tensor: Tensor) -> bool:
    """Return whether numpy can take over: on CPU, and not while torch.compile traces."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _in_chunks(work: Callable[[Tensor], Tensor], scores: Tensor) -> Tensor:
    """Apply a function of rows, on CPU chunk by chunk in threads; numpy and torch release the GIL."""
    scores = scores.detach()
    if not _on_host(scores):
        return work(scores)
    threads = torch.get_num_threads()
    entries = min(max(scores.numel() // threads, _FEW), _MANY)
    step = max(1, -(-entries // max(1, scores.shape[-1])))
    if len(scores) <= step:
        return work(scores)
    chunks = scores.split(step)
    return torch.cat(list(_pool(threads).map(work, chunks) if threads > 1 else map(work, chunks)))


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """Return threads in each of which torch runs single-threaded; else every one would bring a team of its own."""
    pool, started = ThreadPoolExecutor(workers), Barrier(workers)

    def use_one_thread(_: int) -> None:
        torch.zeros(1).sum()  # a thread's first operation sets its number of threads
        torch.set_num_threads(1)
        started.wait()

    here = torch.get_num_threads()
    list(pool.map(use_one_thread, range(workers)))
    torch.set_num_threads(here)  # the call above also set what threads to come would take
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


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

    def of(chunk: Tensor) -> Tensor:
        ordered = _sort(chunk)
        return ordered.gather(-1, top_p_count(ordered, p) - 1)

    return _in_chunks(of, scores).to(scores.dtype)


def top_k_cutoff(scores: Float[Tensor, "rows width"], count: int) -> Float[Tensor, "rows 1"]:
    """Return the `count`-th largest score of each row.

    Args:
        scores: Any rows.
        count: Entries to keep, at least 1 and at most the width.
    """
    if not _on_host(scores):
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


def zero_out(rows: Float[Tensor, "rows width"], keep: Bool[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
    """Set to zero what is not kept; a row that holds a NaN or an infinity must be kept whole.

    Args:
        rows: Activations.
        keep: From a rule.
    """
    if _on_host(rows) and not rows.requires_grad and rows.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.multiply(rows.numpy(), keep.numpy()))  # a select branches on every entry on CPU
    return torch.where(keep, rows, 0)


def nonfinite_rows(rows: Float[Tensor, "rows width"]) -> Bool[Tensor, "rows 1"]:
    """Return True for each row that holds a NaN or an infinity.

    Args:
        rows: Any rows.
    """
    rows = rows.detach()
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)  # both carry a NaN on
    return ~(low.isfinite() & high.isfinite())


def or_rows(mask: Bool[Tensor, "rows width"], rows: Bool[Tensor, "rows 1"]) -> Bool[Tensor, "rows width"]:
    """Mark all entries of some rows too.

    Args:
        mask: Entries that are marked.
        rows: True for each such row.
    """
    if _on_host(mask) and not rows.any():  # mostly there are none, and a look costs nothing here
        return mask
    return mask | rows


def count_true(mask: Bool[Tensor, "rows width"]) -> Int[Tensor, "rows"]:
    """Count the True entries of each row.

    Args:
        mask: One row a token.
    """
    return count_bits(pack_bits(mask)) if _on_host(mask) else mask.sum(-1)


def pack_bits(mask: Bool[Tensor, "rows width"]) -> UInt8[Tensor, "rows bytes"]:
    """Hold eight entries in a byte, the first in the highest bit; missing ones are zero.

    Args:
        mask: One row a token.
    """
    if _on_host(mask):
        return torch.from_numpy(np.packbits(mask.numpy(), axis=1))
    octets = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    worth = 2 ** torch.arange(7, -1, -1, dtype=torch.uint8, device=mask.device)
    return (octets * worth).sum(-1, dtype=torch.uint8)


def count_bits(packed: UInt8[Tensor, "rows bytes"]) -> Int[Tensor, "rows"]:
    """Count the bits that are set in each row.

    Args:
        packed: From `pack_bits`.
    """
    if _on_host(packed):
        return torch.from_numpy(np.bitwise_count(packed.numpy()).sum(axis=1, dtype=np.int64))
    pairs = packed - (packed >> 1 & 0x55)
    fours = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return (fours + (fours >> 4) & 0x0F).sum(-1)


def compare_sets(
    kept: UInt8[Tensor, "rows bytes"], size: Int[Tensor, "rows"], earlier: UInt8[Tensor, "rows bytes"]
) -> list[Int[Tensor, "rows"]]:
    """Compare packed sets row by row.

    Args:
        kept: The sets now.
        size: Entries of each.
        earlier: The sets before.

    Returns:
        1, the intersection, the union, the size before, and the Jaccard value in fixed point, rounded down; two empty
        sets are equal.
    """
    inter, before = count_bits(kept & earlier), count_bits(earlier)
    union = size + before - inter
    jaccard = torch.where(union > 0, inter.float() / union.clamp(min=1).float(), 1.0)
    return [torch.ones_like(inter), inter, union, before, (jaccard * JACCARD_UNITS).long()]
