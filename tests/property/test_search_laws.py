"""Laws of the search: it ends, within its budget, on blocks of the plan, and its interval holds its own estimate."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_sparsity.analysis.column import Column, Threshold
from dllm_sparsity.analysis.profile import profile
from dllm_sparsity.analysis.search import LADDER, Limits, Search, boundaries


@st.composite
def curves(draw):
    knots = draw(st.lists(st.floats(0, 1), min_size=7, max_size=7))
    seed, noise = draw(st.integers(0, 2**32 - 1)), draw(st.floats(0, 0.5))
    return knots, seed, noise


def measured(curve, bounded, items):
    knots, seed, noise = curve
    rng = np.random.default_rng(seed)
    level, wobble, tokens = rng.uniform(size=items), rng.normal(size=items), rng.integers(1, 9, items)

    def column(strength, start, stop):
        loss = float(np.interp(strength, LADDER, knots)) if strength else 0.0
        own = slice(start, stop)
        if bounded:
            height, weight = (level[own] > loss + noise * strength * wobble[own]).astype(float), np.ones(stop - start)
        else:
            weight = tokens[own].astype(float)
            height = -weight * (2 + loss * level[own] + noise * strength * wobble[own])
        total = tokens[own] * 100.0
        return Column(height, weight, total * (1 - 0.9 * strength), total)

    return column


@settings(max_examples=60, deadline=None)
@given(curves(), st.booleans(), st.integers(1, 700), st.one_of(st.none(), st.integers(1, 4000)), st.floats(0.005, 0.5))
def test_a_search_ends(curve, bounded, items, budget, width):
    column = measured(curve, bounded, items)
    thresholds = [Threshold(own, not bounded, bounded) for own in (0.9, 0.99)]
    search = Search(LADDER, thresholds, Limits(width, items, budget))
    asks, asked, dense, spent = search.run(), set(), 0, 0
    edges = [0, *boundaries(items)]
    try:
        ask = next(asks)
        while True:
            assert ask.stop == edges[edges.index(ask.start) + 1]
            assert ask not in asked
            if ask.strength is None:
                assert ask.start == dense
                dense = ask.stop
            assert ask.stop <= dense
            asked.add(ask)
            spent += ask.stop - ask.start
            ask = asks.send(column(ask.strength or 0.0, ask.start, ask.stop))
    except StopIteration as end:
        goals = end.value
    assert spent == search.spent
    assert budget is None or spent <= budget
    for goal in goals:
        assert goal.stopped in ("width", "items", "budget")
        if goal.profile is None:
            assert goal.stopped == "budget"
            continue
        low, high = goal.profile.interval
        assert 0 <= low <= goal.profile.estimate + 1e-9
        assert goal.profile.estimate <= high + 1e-9 or goal.profile.estimate > 1
        assert goal.stopped != "width" or high - low <= width
        assert goal.stopped != "items" or goal.items == items


@settings(max_examples=60, deadline=None)
@given(curves(), st.booleans(), st.permutations(range(3)))
def test_the_order_of_strengths_is_free(curve, bounded, order):
    column = measured(curve, bounded, 128)
    columns = [column(strength, 0, 128) for strength in (0.1, 0.4, 0.9)]
    threshold = Threshold(0.95, not bounded, bounded)
    first = profile(column(0.0, 0, 128), columns, threshold)
    second = profile(column(0.0, 0, 128), [columns[index] for index in order], threshold)
    np.testing.assert_allclose(first.interval, second.interval, atol=1e-9)


@given(st.integers(1, 20_000))
def test_blocks_end_with_the_last_item(items):
    ends = boundaries(items)
    assert ends[-1] == items
    assert ends == sorted(set(ends))
