"""The search for critical sparsity: brackets, rounds, budget, coverage on items whose answer is known, and its plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dllm_sparsity.analysis import simulate
from dllm_sparsity.analysis.catalogue import WORLDS
from dllm_sparsity.analysis.column import Threshold
from dllm_sparsity.analysis.critical import PAPER_GRID
from dllm_sparsity.analysis.search import LADDER, Ask, Limits, Search, boundaries
from dllm_sparsity.analysis.searched import found_by
from dllm_sparsity.analysis.simulate import search_study, table, tally
from dllm_sparsity.analysis.simulated_grids import grid_study, grids
from dllm_sparsity.analysis.worlds import sparsity_at
from dllm_sparsity.cli.compare import _on_paper_grid
from dllm_sparsity.comparison import ladder_of
from dllm_sparsity.errors import UserError
from dllm_sparsity.study.config import RuleConfig, build_config
from dllm_sparsity.study.plan import block_cell, cell_parts, expand, item_order, with_block

BY_NAME = {world.name: world for world in WORLDS}


def drive(search, sample):
    asks, told = search.run(), []
    try:
        ask = next(asks)
        while True:
            told.append(ask)
            ask = asks.send(sample.column(ask.strength or 0.0, ask.start, ask.stop))
    except StopIteration as end:
        return end.value, told


def test_an_early_place_that_may_be_a_miss_is_in_the_interval():
    world = BY_NAME["NLL, to and fro"]
    found = 0
    for seed in range(12, 28):
        search = Search(LADDER, [world.threshold], Limits(0.018, world.items))
        goals, _ = drive(search, world.draw(seed))
        found += goals[0].profile.interval[0] < world.truth()[0]
    assert found >= 13  # 8 without


def test_an_end_of_the_interval_is_measured_before_it_is_believed():
    world = BY_NAME["NLL, break, 98 % kept"]
    held = 0
    for seed in range(12):
        goal, _ = search_study(world.draw(seed), Limits(0.064, world.items))
        low, high = goal.profile.interval
        held += low <= world.truth()[0] <= high
    assert held >= 11  # 9 where the curve is believed


def test_a_budget_that_ends_before_an_end_is_measured_ends_an_answer_that_is_narrow():
    world = BY_NAME["NLL, break, 98 % kept"]
    goal, spent = search_study(world.draw(0), Limits(0.064, world.items, 389))
    assert (goal.stopped, spent <= 389) == ("width", True)
    assert goal.profile.unseen is not None


@pytest.mark.parametrize(
    ("name", "width", "studies", "least"),
    [
        ("NLL, cliff", 0.05, 12, 11),  # 0 without a corner
        ("NLL, cliff", 0.006, 12, 11),
        ("NLL, brink", 0.1, 12, 11),  # 8 with but one size of the corner
        ("accuracy, rises, then a cliff", 0.11, 30, 26),  # 24 where it began at the first place that may be a loss
        ("NLL, ledge, then a fall", 0.1, 12, 11),  # 8 where a corner lay before half the dense margin alone
        ("accuracy, ledge, then a fall", 0.25, 20, 18),  # 16 where it had to be no miss at one place, not at any
    ],
)
def test_a_cliff_behind_a_long_flat_part_is_not_put_where_the_flat_part_ends(name, width, studies, least):
    world = BY_NAME[name]
    truth, held = world.truth()[0], 0
    for seed in range(studies):
        goal, _ = search_study(world.draw(seed), Limits(width, world.items))
        low, high = goal.profile.interval
        held += low <= truth <= high
    assert held >= least


def test_the_shipped_table_has_a_line_for_every_population():
    text = (Path(simulate.__file__).parent / "COVERAGE.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip().removesuffix(" (held out)") for line in text.splitlines() if "|" in line]
    assert rows[2:] == [world.name for world in WORLDS]


def test_no_block_is_asked_for_twice_and_dense_comes_first():
    search = Search(LADDER, [BY_NAME["NLL, monotone"].threshold], Limits(0.02, 1000))
    goals, told = drive(search, BY_NAME["NLL, monotone"].draw(1))
    edges, dense = [0, *boundaries(1000)], 0
    for ask in told:
        assert ask.stop == edges[edges.index(ask.start) + 1]
        if ask.strength is None:
            assert ask.start == dense
            dense = ask.stop
        assert ask.stop <= dense
    assert len(set(told)) == len(told)
    assert told[0] == Ask(None, 0, 64)
    assert search.spent == sum(ask.stop - ask.start for ask in told)
    assert goals[0].stopped == "width"
    assert goals[0].profile.width <= 0.02


@pytest.mark.parametrize(
    ("is_valueless", "found"),
    [(lambda at: True, False), (lambda at: at > 0, False), (lambda at: at not in LADDER, True)],
)
def test_a_strength_of_which_no_item_has_a_value_ends_the_search_with_what_it_has(is_valueless, found):
    world = BY_NAME["accuracy, steep"]
    sample = world.draw(0)

    class Broken:
        def column(self, strength, start, stop):
            column = sample.column(strength, start, stop)
            weight = 0 * column.weight if is_valueless(strength) else column.weight
            return replace(column, height=column.height * weight, weight=weight)

    search = Search(LADDER, [world.threshold], Limits(0.05, world.items))
    (goal,), _ = drive(search, Broken())
    assert goal.stopped == "values"
    assert (goal.profile is not None) is found
    assert found_by(goal, search, 0.05, "accuracy")["reason"] == (
        None if found else "the items that were measured, or those of one task, have no value of this quality"
    )


def test_the_search_is_a_function_of_what_it_was_sent():
    world = BY_NAME["accuracy, few items"]
    first, second = (drive(Search(LADDER, [world.threshold], Limits(0.1, 600)), world.draw(3))[1] for _ in range(2))
    assert first == second


@pytest.mark.parametrize("budget", [10, 64, 500, 2000])
def test_the_budget_is_kept(budget):
    world = BY_NAME["accuracy, monotone"]
    search = Search(LADDER, [world.threshold], Limits(0.01, 4000, budget))
    goals, _ = drive(search, world.draw(0))
    assert search.spent <= budget
    assert goals[0].stopped == "budget"
    assert (goals[0].profile is None) == (budget < 128)


def test_several_retentions_share_their_items():
    world = BY_NAME["NLL, monotone"]
    thresholds = [Threshold(own, logarithmic=True, bounded=False) for own in (0.9, 0.95, 0.99)]
    search = Search(LADDER, thresholds, Limits(0.03, 1000))
    goals, _ = drive(search, world.draw(0))
    alone = 0
    for threshold in thresholds:
        one = Search(LADDER, [threshold], Limits(0.03, 1000))
        drive(one, world.draw(0))
        alone += one.spent
    places = [goal.profile.estimate for goal in goals]
    assert places == sorted(places, reverse=True)
    assert search.spent < alone


def test_the_crossing_of_a_steep_curve_is_found():
    goal, _ = search_study(BY_NAME["NLL, monotone"].draw(5), Limits(0.02, 1000))
    truth, _ = BY_NAME["NLL, monotone"].truth()
    assert abs(goal.profile.estimate - truth) < 0.03


def test_a_curve_that_never_fails_ends_at_the_range():
    goal, _ = search_study(BY_NAME["NLL, never fails"].draw(5), Limits(0.02, 1000))
    assert not goal.profile.crosses
    assert goal.profile.estimate == pytest.approx(float(sparsity_at(1.0)), abs=0.01)


@pytest.mark.parametrize(
    ("name", "dearest"),
    [
        ("accuracy, few items", 26 / 6),
        ("accuracy, groups of 4", 26 / 6),
        ("NLL, monotone", 26 / 6),
        ("NLL, dip and recovery", 26 / 6),
        ("NLL, never fails", 0.6),
    ],
)
def test_intervals_cover(name, dearest):
    found = tally(BY_NAME[name], studies=100, count=20)
    assert found.covered >= 0.89  # seeds are fixed; of 100 studies at 95 %, 1 in 200 would lie below
    assert found.spent < dearest


def test_a_grid_that_misses_the_truth_is_stretched():
    found = grids(BY_NAME["NLL, rises first"], 25)
    assert found.covered < 0.95
    assert found.stretch > 1.02


def test_a_grid_is_moved_between_its_ends():
    class Seen:
        world, group, strengths = BY_NAME["NLL, monotone"], None, []

        def column(self, strength, start, stop):
            self.strengths.append(strength)
            return sample.column(strength, start, stop)

    sample, seen = BY_NAME["NLL, monotone"].draw(0), Seen()
    grid_study(seen, 0.5)
    moved, plain = np.array(seen.strengths), 1 - np.array(PAPER_GRID)
    np.testing.assert_allclose(moved[1:-1], (plain[1:-1] + plain[2:]) / 2, atol=1e-12)
    assert (moved[0], moved[-1]) == (0.0, 1.0)
    assert grid_study(sample, 0.5) != grid_study(sample)


def test_the_table_has_a_line_for_each_world():
    own = tally(BY_NAME["NLL, monotone"], 5, 2)
    lines = table([own]).splitlines()
    assert [line.count("|") for line in lines] == [15, 15, 15]
    assert own.at_width(own.width / 2) == pytest.approx(own.cheaper / 4)
    assert own.at_width(own.width * 2) == own.cheaper
    low, read, high = grid_study(BY_NAME["NLL, monotone"].draw(0))
    assert low < read < high


def test_ladders_run_from_dense_to_the_end():
    assert ladder_of(RuleConfig(name="top_p"))[::6] == [1.0, 0.0]
    assert ladder_of(RuleConfig(name="top_k"))[-1] == pytest.approx(0.01)
    assert ladder_of(RuleConfig(name="max_p"))[::6] == [0.0, 1.0]
    assert ladder_of(RuleConfig(name="threshold", strengths=(0.5, 0.1))) == [0.0, 0.1, 0.5]
    with pytest.raises(UserError, match="no upper end"):
        ladder_of(RuleConfig(name="threshold"))


FIELDS = {
    "models": [{"paradigm": "autoregressive", "model": "embedded:autoregressive"}],
    "tasks": [{"name": "easy_endings"}],
    "rules": [{"name": "top_p"}],
}


def test_a_study_needs_strengths_or_a_search():
    with pytest.raises(UserError, match="strengths"):
        build_config(FIELDS)
    study = build_config({**FIELDS, "search": {"retentions": [0.99, 0.95]}})
    assert study.search.retentions == (0.95, 0.99)
    assert expand(study) == []
    with pytest.raises(UserError, match="retention"):
        build_config({**FIELDS, "search": {"retention": [0.99]}})


def test_a_block_changes_the_fingerprint_and_no_other_cell():
    study = build_config({**FIELDS, "search": {}})
    cell = block_cell(study, study.models[0], study.tasks[0], (study.rules[0], "input"), 0.9)
    parts = [cell_parts(own, 0, {}, {}, {}) for own in (cell, with_block(cell, 0, 64), with_block(cell, 64, 80))]
    assert "block" not in parts[0]
    assert parts[1] == {**parts[0], "block": [0, 64]}
    assert parts[2]["block"] == [64, 80]


def test_items_are_taken_at_random_and_the_same_way_again():
    assert item_order(50, 1) == item_order(50, 1) != item_order(50, 2)
    assert sorted(item_order(50, 1)) == list(range(50))


def test_the_papers_grid():
    (rule,) = _on_paper_grid([{"name": "top_p", "sites": ["up"]}], {})
    assert len(rule["strengths"]) == 25
    with pytest.raises(UserError, match="grid of top_p"):
        _on_paper_grid([{"name": "top_k"}], {})
    with pytest.raises(UserError, match="both say"):
        _on_paper_grid([{"name": "top_p"}], {"strength": (0.5,)})
