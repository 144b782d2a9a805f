"""Items of several tasks in one order, and what a search on their average reads off them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_sparsity.analysis.averaged import mixed
from dllm_sparsity.analysis.catalogue import WORLDS
from dllm_sparsity.analysis.column import Column, Threshold
from dllm_sparsity.analysis.margins import level_of, margins
from dllm_sparsity.analysis.mixture import Mixture
from dllm_sparsity.analysis.profile import profile
from dllm_sparsity.analysis.search import Limits, boundaries
from dllm_sparsity.analysis.simulate import search_study, tally
from dllm_sparsity.analysis.simulated_grids import grid_study

BLENDS = {world.name: world for world in WORLDS if world.name.startswith("average")}


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=2, max_size=8))
def test_every_block_holds_every_task(sizes):
    mixture = Mixture(sizes)
    edges = [0, *boundaries(mixture.items, mixture.least)]
    parts = [mixture.parts(*edge) for edge in pairwise(edges)]
    for task, size in enumerate(sizes):
        own = [part[task] for part in parts]
        assert own[0][0] == 0
        assert [start for start, _ in own[1:]] == [stop for _, stop in own[:-1]]
        assert own[-1][1] == min(size, 8 * min(sizes))
        fewest = min(stop - start for start, stop in own)
        assert fewest >= min(5, min(sizes))


def columns(rng, sizes, loss, groups=None):
    """Dense and sparse columns of tasks with other token counts, levels and losses."""
    found = []
    for task, size in enumerate(sizes):
        tokens = rng.integers(5, 40, size).astype(float)
        level = rng.normal(2 + task, 0.5, size)
        lost = rng.normal(loss[task], 0.05, size)
        kept = tokens * rng.uniform(0.3, 0.7, size)
        group = None if groups is None or groups[task] == 1 else np.arange(size) // groups[task]
        lost = lost if group is None else lost + rng.normal(0, 0.1, size)[group]
        found.append(
            [
                Column(-tokens * level, tokens, tokens, tokens, group),
                Column(-tokens * (level + lost), tokens, kept, tokens, group),
            ]
        )
    return found


def blended(tasks):
    parts = [(0, len(own[0])) for own in tasks]
    return [mixed([own[at] for own in tasks], parts) for at in (0, 1)]


def test_an_average_is_the_mean_of_the_tasks_own_ratios_and_errors():
    sizes, loss = (300, 50, 120), (0.01, 0.02, 0.0)
    tasks = columns(np.random.default_rng(0), sizes, loss)
    dense, sparse = blended(tasks)
    threshold = Threshold(0.99, logarithmic=True, bounded=False)
    found = margins(dense, [sparse], threshold)
    alone = [margins(*(own[0], [own[1]], threshold)) for own in tasks]
    np.testing.assert_allclose(found.margin, np.mean([own.margin for own in alone], 0), rtol=1e-12)
    np.testing.assert_allclose(found.place, np.mean([own.place for own in alone], 0), rtol=1e-12)
    error = np.sqrt(sum(own.covariance for own in alone)) / len(sizes)
    np.testing.assert_allclose(np.sqrt(found.covariance)[1, 1], error[1, 1], rtol=1e-12)
    assert dense.sparsity == 0
    assert sparse.sparsity == pytest.approx(np.mean([own[1].sparsity for own in tasks]))
    value, low, high = level_of(dense)
    assert value == pytest.approx(np.mean([own[0].height.sum() / own[0].weight.sum() for own in tasks]))
    drawn = np.random.default_rng(5)
    means = np.zeros(4000)
    for own, _ in tasks:
        picks = drawn.integers(0, len(own), (4000, len(own)))
        means += own.height[picks].sum(1) / own.weight[picks].sum(1) / len(tasks)
    assert (high - low) / 2 == pytest.approx(1.96 * means.std(), rel=0.05)


def test_groups_of_one_task_are_not_those_of_another():
    tasks = columns(np.random.default_rng(1), (90, 60, 40), (0.01, 0.02, 0.0), groups=(3, 1, 4))
    dense, sparse = blended(tasks)
    threshold = Threshold(0.99, logarithmic=True, bounded=False)
    found = margins(dense, [sparse], threshold).covariance[1, 1]
    alone = sum(margins(own[0], [own[1]], threshold).covariance[1, 1] for own in tasks) / 9
    assert found == pytest.approx(alone)
    assert len(np.unique(dense.group)) == 30 + 60 + 10


def test_an_item_of_a_small_task_tells_more_when_it_changes():
    ones = np.ones(450)
    tasks = [[Column(ones[:size], ones[:size], ones[:size], ones[:size])] * 2 for size in (50, 400)]
    dense, sparse = blended(
        [[own[0], Column(own[1].height, own[1].weight, own[1].kept / 2, own[1].total)] for own in tasks]
    )
    even = Column(ones, ones, ones, ones)
    threshold = Threshold(0.99, logarithmic=False, bounded=True)
    blend = margins(dense, [sparse], threshold).covariance[1, 1]
    one = margins(even, [Column(ones, ones, ones / 2, ones)], threshold).covariance[1, 1]
    assert blend / one == pytest.approx((450 / 50 + 450 / 400) / 4)


@pytest.mark.parametrize("name", BLENDS)
def test_intervals_of_averages_cover(name):
    found = tally(BLENDS[name], studies=60, count=20)
    assert found.covered >= 0.86  # seeds are fixed; of 60 studies at 95 %, 1 in 400 would lie below
    assert found.spent < 26 / 5


def test_a_grid_of_an_average_takes_the_items_that_a_search_leaves_out():
    world = BLENDS["average of 4 tasks of 200 to 4000 items, accuracy"]
    found = tally(world, studies=1, count=2)
    assert (found.grid.items, world.items) == (5800, 3400)
    assert found.cheaper == pytest.approx(26 * 5800 / (found.spent * 3400))


def test_the_search_and_the_grid_of_an_average_agree():
    world = BLENDS["average of 3 tasks, NLL"]
    goal, _ = search_study(world.draw(3), Limits(0.02, world.items, least=world.least))
    low, read, high = grid_study(world.draw(3))
    assert low - 0.01 < goal.profile.estimate < high + 0.01
    assert abs(goal.profile.estimate - read) < 0.02


def test_a_profile_of_an_average_needs_every_task():
    tasks = columns(np.random.default_rng(2), (64, 64), (0.0, 0.03))
    dense, sparse = blended(tasks)
    found = profile(dense, [sparse], Threshold(0.99, logarithmic=True, bounded=False))
    assert found.margins[1] == pytest.approx(-np.log(0.99) - 0.015, abs=0.01)
