"""What searches are expected to take: the constants are the search's own, and the guess is near what one takes."""

from dataclasses import replace
from itertools import pairwise

import pytest

from dllm_sparsity import layerwise
from dllm_sparsity.analysis import search as real
from dllm_sparsity.analysis.catalogue import WORLDS
from dllm_sparsity.analysis.simulate import search_study
from dllm_sparsity.study import expected
from dllm_sparsity.study.config import SearchConfig


@pytest.mark.parametrize(("items", "least"), [(5, 16), (64, 16), (100, 16), (1000, 16), (4000, 40)])
def test_blocks_and_constants_are_those_of_the_search(items, least):
    ends = [0, *real.boundaries(items, least)]
    assert expected.blocks(items, least) == [stop - start for start, stop in pairwise(ends)]
    assert (expected.FIRST_ITEMS, expected.LEAST_BLOCK) == (real.FIRST_ITEMS, real.LEAST_BLOCK)
    assert layerwise.MOST_GROUPS == expected.LAYER_GROUPS


@pytest.mark.parametrize("items", [64, 100])
def test_a_search_takes_about_what_is_expected(items):
    spent = []
    for world in WORLDS[:6]:
        small = replace(world, items=items)
        spent.append(search_study(small.draw(0), real.Limits(0.1, items, least=small.least))[1])
    mean = sum(spent) / len(spent)
    assert mean / 2 < expected.curve_evaluations(SearchConfig(), items) < 2 * mean


def test_a_budget_holds_for_each_curve_and_dense_items_serve_all():
    search = SearchConfig(budget=100)
    assert expected.curve_evaluations(search, 60) == 100
    one, two = (expected.evaluations(SearchConfig(), 60, curves, [60]) for curves in (1, 2))
    assert one == pytest.approx(390)
    assert two == pytest.approx(2 * 390 - 60)
    assert expected.evaluations(SearchConfig(), 60, 1, [60, 60]) > 1.5 * one
    assert expected.layer_cells(SearchConfig(layerwise=True, layerwise_items=32), 60, 1, 5) == [(21, 32)]
    assert expected.layer_cells(SearchConfig(layerwise=True, budget=100), 60, 1, 5) == []
