"""Simulated studies on the paper's grid: how wide their intervals are, and how often they hold the truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dllm_sparsity.analysis.critical import PAPER_GRID, readings
from dllm_sparsity.analysis.statistics import resampled_sums
from dllm_sparsity.analysis.worlds import Blend, BlendedSample, Sample, World

DRAWS = 400
_TINY, _STEPS = 1e-9, np.arange(len(PAPER_GRID))


@dataclass(frozen=True)
class Grid:
    """What many simulated grids came to.

    Args:
        count: How many.
        items: Items of each; of an average all that its tasks have, where a search may leave some out.
        covered: Share whose bootstrap interval holds the truth.
        width: Mean width of those.
        stretch: By how much they have to be drawn out about the reading so that 95 % hold the truth; at least 1.
    """

    count: int
    items: int
    covered: float
    width: float
    stretch: float


def grid_study(sample: Sample | BlendedSample, moved: float = 0.0) -> tuple[float, float, float]:
    """Return the interpolated reading on the paper's 26 values between the ends of its paired bootstrap interval.

    Args:
        sample: The items.
        moved: By how many steps each value between the first and the last is moved, at most half a one.
    """
    values = np.interp(_STEPS + moved, _STEPS, PAPER_GRID)
    values[[0, -1]] = PAPER_GRID[0], PAPER_GRID[-1]
    world = sample.world
    samples = sample.samples if isinstance(sample, BlendedSample) else [sample]
    height, sparsity = np.mean([_drawn(own, values, seed) for seed, own in enumerate(samples)], axis=0)
    read = readings(sparsity, height, world.retention, world.kind == "nll")[0]["interpolated"]
    low, high = np.quantile(read[1:], [0.025, 0.975])
    return float(low), float(read[0]), float(high)


def _drawn(sample: Sample, values: np.ndarray, seed: int) -> np.ndarray:
    """Return quality and sparsity on all items, then in each bootstrap draw: (2, 1 + draws, values)."""
    columns = [sample.column(float(1 - p), 0, sample.world.items) for p in values]
    flat = np.stack([part for own in columns for part in (own.height, own.weight, own.kept, own.total)], axis=1)
    groups = None if sample.group is None else np.unique(sample.group, return_inverse=True)[1]
    sums = np.concatenate([flat.sum(0)[None], resampled_sums(flat, DRAWS, seed, groups)])
    sums = sums.reshape(DRAWS + 1, len(PAPER_GRID), 4)
    return np.stack([sums[..., 0] / sums[..., 1], 1 - sums[..., 2] / sums[..., 3]])


def grids(world: World | Blend, count: int) -> Grid:
    """Simulate grids of the paper's 26 values, each moved by another part of a step: no curve knows where they lie.

    Args:
        world: The world.
        count: How many.
    """
    truth, beyond = world.truth()
    moved = np.random.default_rng(0).uniform(-0.5, 0.5, count)
    found = [grid_study(world.draw(10**6 + seed), own) for seed, own in enumerate(moved)]
    low, read, high = np.array(found).T
    above = np.zeros(count) if beyond else (truth - read) / np.maximum(high - read, _TINY)
    needed = np.where(truth > read, above, (read - truth) / np.maximum(read - low, _TINY))
    return Grid(
        count,
        sum(own.items for own in (world.worlds if isinstance(world, Blend) else (world,))),
        covered=float(((low <= truth + _TINY) & (beyond | (truth <= high))).mean()),
        width=float((high - low).mean()),
        stretch=max(1.0, float(np.quantile(needed, 0.95))),
    )
