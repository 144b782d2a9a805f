"""An allocation in a world of layers whose best allocation is known: it is found, beats one strength, and is compared."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from dllm_sparsity import layerwise
from dllm_sparsity.analysis.allocated import (
    Searched,
    compared,
    nearest_strength,
    overlap_words,
    sensitivity,
    strength_at,
)
from dllm_sparsity.analysis.allocation import allocate, path_of, strengths_at, targets
from dllm_sparsity.analysis.column import Column, Threshold
from dllm_sparsity.analysis.findings import allocation_findings
from dllm_sparsity.analysis.grouping import groups_of
from dllm_sparsity.analysis.loading import Cell
from dllm_sparsity.analysis.profile import profile
from dllm_sparsity.analysis.search import LADDER, Limits, Search
from dllm_sparsity.analysis.slopes import slopes_of
from dllm_sparsity.sparsity.rules.layerwise import Layerwise

ITEMS, POWER, RETENTION = 1500, 6, 0.95
ASKED = Threshold(RETENTION, logarithmic=True, bounded=False)
SHARE = 1.0  # activations of a layer, per token


class World:
    """Layers that lose scale * sparsity**6 nats a token, each on its own; max-p-like strengths equal the sparsity."""

    def __init__(self, scales, seed=0, noise=0.05):
        rng = np.random.default_rng(seed)
        self.scales = np.array(scales)
        self.tokens = rng.integers(10, 60, ITEMS).astype(float)
        self.level, self.factor = rng.normal(3, 1, ITEMS), rng.lognormal(-0.125, 0.5, ITEMS)
        self.wobble, self.noise = rng.normal(size=(len(scales), ITEMS)), noise

    def column(self, places, start, stop, layers=None):
        """Return what sparsities by layer give; kept and total are those of some layers."""
        own, places = slice(start, stop), np.asarray(places, dtype=float)
        chosen = range(len(places)) if layers is None else layers
        loss = (self.scales * places**POWER).sum() * self.factor[own]
        loss += self.noise * (places[:, None] * self.wobble[:, own]).sum(0) * np.sqrt(self.scales.mean())
        tokens, count = self.tokens[own], len(list(chosen))
        kept = tokens * sum(SHARE * (1 - places[layer]) for layer in chosen)
        return Column(-tokens * (self.level[own] + loss), tokens, kept, tokens * SHARE * count)

    def best(self):
        """Return the critical sparsity of one strength, and of the best allocation: equal prices, by bisection."""
        lost = -np.log(RETENTION) / np.average(self.factor, weights=self.tokens)

        def spent(price):
            return np.minimum((price / (POWER * self.scales)) ** (1 / (POWER - 1)), 1.0)

        low, high = 1e-9, 1e6
        for _ in range(200):
            price = np.sqrt(low * high)
            low, high = (price, high) if (self.scales * spent(price) ** POWER).sum() < lost else (low, price)
        return (lost / self.scales.sum()) ** (1 / POWER), float(spent(low).mean())


class Cliff(World):
    """A world that loses everything where hardly anything is kept."""

    def column(self, places, start, stop, layers=None):
        own = super().column(places, start, stop, layers)
        fallen = 3.5 * max(float(np.mean(places)) - 0.94, 0.0) / 0.06
        return replace(own, height=own.height - own.weight * fallen)


def search(world, places_at, width=0.01, ladder=LADDER, items=ITEMS):
    made = Search(ladder, [ASKED], Limits(width, items))
    asks = made.run()
    try:
        ask = next(asks)
        while True:
            ask = asks.send(world.column(places_at(ask.strength or 0.0), ask.start, ask.stop))
    except StopIteration as end:
        (goal,) = end.value
    found = goal.profile
    answer = {"value": found.estimate, "interval": list(found.interval), "censored": not found.crosses}
    return Searched(cast("Any", None), made, [answer])


def allocated(world, uniform, items=400):
    """Do what the loop does, without cells."""
    count, block = len(world.scales), (ITEMS - items, ITEMS)
    known = [(0.0, 0.0), *((own.sparsity, at) for at, own in uniform.search.columns.items()), (1.0, 1.0)]
    strengths = strengths_at(targets(uniform.crossings), known)
    dense, found = world.column(np.zeros(count), *block), []
    counts: dict[float | None, dict[int, tuple[int, int]]] = {None: {layer: (1, 1) for layer in range(count)}}
    for layer in range(count):
        columns = {at: world.column(np.eye(count)[layer] * at, *block, layers=[layer]) for at in strengths}
        found.append(sensitivity((layer,), dense, columns, counts))
    path = path_of(allocate(slopes_of(found, 0.0)), sum(own.total for own in found), 1.0)
    return Layerwise(0.5, base="max_p", path=tuple(map(tuple, path)))


def along(rule, count):
    def places(t):
        return [Layerwise(t, rule.base, rule.path).at(layer).strength for layer in range(count)]

    return places


def test_layers_that_differ_are_told_apart_and_the_best_is_nearly_reached():
    world = World([0.001, 0.001, 5.0, 5.0])
    one, best = world.best()
    uniform = search(world, lambda strength: [strength] * 4)
    rule = allocated(world, uniform)
    found = search(world, along(rule, 4))
    assert uniform.answers[0]["value"] == pytest.approx(one, abs=0.03)
    assert best > one + 0.1
    assert found.answers[0]["value"] > best - 0.05
    told = compared(uniform, found, 0)
    assert told["paired"]
    assert told["interval"][0] > 0.05
    assert told["interval"][0] < best - one < told["interval"][1] + 0.05
    assert told["words"].startswith("better than uniform (+")
    at = nearest_strength(found.search, found.search.goals[0])
    by_layer = along(rule, 4)(at)
    assert min(by_layer[:2]) > max(by_layer[2:]) + 0.2


def test_layers_that_are_alike_stay_alike():
    world = World([1.0, 1.0, 1.0, 1.0], noise=0.3)
    uniform = search(world, lambda strength: [strength] * 4)
    found = search(world, along(allocated(world, uniform), 4))
    told = compared(uniform, found, 0)
    assert abs(found.answers[0]["value"] - uniform.answers[0]["value"]) < 0.02
    assert told["words"].startswith("not told from uniform (")


def test_the_paired_difference_is_that_of_the_shared_items():
    world = World([1.0, 1.0])
    first, second = search(world, lambda s: [s, s], width=0.05), search(world, lambda s: [s, s], width=0.01)
    told = compared(first, second, 0)
    assert told["items"] == min(own.search.goals[0].items for own in (first, second))
    both = re.search(r"where they reach (\d+\.\d) and (\d+\.\d) %\)", told["words"])
    assert float(both[1]) - float(both[2]) == pytest.approx(100 * told["value"], abs=0.11)
    assert abs(told["value"]) < 0.02


def test_a_curve_that_never_fails_has_no_difference():
    uniform = search(World([1.0, 1.0]), lambda s: [s, s])
    free = search(World([1e-9, 1e-9], noise=0.0), lambda s: [s, s])
    assert compared(uniform, free, 0)["value"] is None
    assert "never fell" in compared(uniform, free, 0)["words"]


def test_two_searches_without_shared_points_are_not_paired():
    world = World([1.0, 1.0])
    uniform, other = (search(world, lambda s: [s, s], width=0.02) for _ in range(2))
    least = min(other.search.columns, key=lambda at: other.search.columns[at].sparsity)
    items = other.search.goals[0].items
    other.search.columns = {at: own for at, own in other.search.columns.items() if at <= max(least, 0.3)}
    other.search.columns[0.3] = world.column([0.3, 0.3], 0, items)  # all points pass: no draw has a crossing
    told = compared(uniform, other, 0)
    assert not told["paired"]
    assert told["value"] == pytest.approx(0, abs=1e-9)
    assert told["interval"][0] < 0 < told["interval"][1]
    assert "unpaired" in told["words"]


def test_a_crossing_near_the_end_of_the_path_is_not_guessed_over_a_gap():
    held = 0
    for seed in range(8):
        world = Cliff([0.05, 0.05], seed=seed, noise=0.1)
        true, _ = world.best()
        found = search(world, lambda t: [t, t], width=0.15, ladder=layerwise.LADDER, items=64)
        low, high = found.answers[0]["interval"]
        assert true == pytest.approx(0.9, abs=0.02)
        held += low < true < high
    assert held >= 7


def test_what_a_curve_does_between_far_points_is_part_of_the_difference():
    world = World([1.0, 1.0], noise=0.0)  # hardly an item differs from the others: samples of them move nothing
    uniform, other = (search(world, lambda s: [s, s], width=0.02) for _ in range(2))
    goal = other.search.goals[0]
    other.search.columns = {at: world.column([at, at], 0, goal.items) for at in (0.1, 0.2, 0.3, 1.0)}
    dense, sparse = other.search.measured(goal.items)
    goal.profile = profile(dense, sparse, ASKED, ended=True)
    low, high = goal.profile.interval
    other.answers[0] |= {"value": goal.profile.estimate, "interval": [low, high]}
    told = compared(uniform, other, 0)
    assert told["paired"]
    assert told["value"] == pytest.approx(goal.profile.estimate - uniform.answers[0]["value"], abs=0.01)
    least = 0.9 * (high - low - 2 * np.diff(uniform.answers[0]["interval"])[0])
    assert np.diff(told["interval"])[0] > least > 0.05


def test_pairing_takes_away_what_the_items_share():
    world = World([0.5, 1.5], noise=0.0)
    first, second = search(world, lambda s: [s, s]), search(world, lambda s: [min(1.0, 1.2 * s), 0.95 * s])
    told = compared(first, second, 0)
    alone = np.hypot(*(np.diff(own.answers[0]["interval"])[0] for own in (first, second)))
    assert told["paired"]
    assert np.diff(told["interval"])[0] < 0.8 * alone


def test_the_strength_of_an_answer_lies_between_those_measured():
    found = search(World([1.0, 1.0]), lambda s: [s, s])  # here a strength is its sparsity
    assert strength_at(found.search, found.answers[0]["value"]) == pytest.approx(found.answers[0]["value"], abs=1e-5)
    assert strength_at(found.search, None) is None


def test_items_that_chose_and_judged_are_counted():
    assert overlap_words(128, 1000, 872, gained=True)[0] == 0
    assert overlap_words(128, 1000, 900, gained=True)[0] == 28
    shared, words = overlap_words(128, 300, 300, gained=True)
    assert shared == 128
    assert "may look larger" in words
    assert overlap_words(128, 300, 300, gained=False) == (128, words.partition(":")[0])  # nothing to look larger


def test_strengths_are_looked_up_and_never_dense():
    known = [(0.0, 1.0), (0.5, 0.9), (0.8, 0.6), (1.0, 0.0)]
    assert strengths_at([0.0005, 0.5, 0.65, 0.9], known) == [0.9, 0.75, 0.3]
    assert targets([0.6]) == pytest.approx([0.6, 0.72, 0.84, 0.98])


def test_a_search_without_an_allocation_says_why():
    answer = {
        **{"task": "t", "rule": "top_p", "site": "input", "paradigm": "diffusion", "model": "m"},
        **{"retention": 0.99, "kind": "nll", "quality": "nll", "value": 0.5, "interval": [0.4, 0.6], "censored": False},
        "allocation": {"value": None, "interval": None, "reason": "there is one layer only"},
    }
    assert allocation_findings(None) == []
    assert allocation_findings({"curves": [answer]}) == [
        "t, top_p at input, diffusion (m), keeping 99 % of the dense likelihood per token:"
        " no strengths by layer (there is one layer only)."
    ]


def answered(retention, low, high):
    return {
        **{"task": "t", "rule": "top_p", "site": "input", "paradigm": "diffusion", "model": "m", "kind": "nll"},
        **{"retention": retention, "quality": "nll", "value": 0.5, "interval": [0.4, 0.6], "censored": False},
        "allocation": {
            **{"value": 0.6, "interval": [0.5, 0.7], "censored": False, "strength": 0.61234, "sharing": "s"},
            "difference": {"interval": [low, high], "words": "d"},
        },
    }


def test_other_retentions_are_told_where_they_differ():
    answers = [answered(0.9, -0.1, 0.1), answered(0.95, 0.01, 0.1), answered(0.98, -0.2, -0.1)]
    default, unknown = answered(0.99, -0.1, 0.1), answered(0.8, 0.0, 0.0)
    unknown["allocation"]["difference"]["interval"] = None
    told = allocation_findings({"curves": [*answers, unknown, default]})
    assert [words.partition("keeping ")[2][:4] for words in told] == ["99 %", "95 %", "98 %"]
    assert "reach 60.0 % [50.0, 70.0] sparsity at t = 0.6123, one strength 50.0 %" in told[0]
    assert len(allocation_findings({"curves": answers})) == 3  # none is the default one


def cell(paradigm, **more):
    record = {"paradigm": paradigm, "model": "m", "task": "t", "dense": not more, "rule": None, "layers": None}
    return Cell(Path(), cast("Any", {**record, "strength": 0.5, "site": "input", "rule_parameters": {}, **more}))


def test_tables_stay_out_of_labels():
    def layerwise(paradigm, base, path):
        return cell(paradigm, rule="layerwise", rule_parameters={"base": base, "path": path})

    pair = [cell("autoregressive"), cell("diffusion")]
    own = [layerwise("autoregressive", "top_p", [[1.0], [0.5]]), layerwise("diffusion", "top_p", [[1.0], [0.4]])]
    assert [group.rule for group in groups_of([*pair, *own])[0]] == ["layerwise", "layerwise"]
    other = layerwise("diffusion", "max_p", [[0.0], [0.4]])
    labels = {group.rule for group in groups_of([*pair, *own, other])[0]}
    assert labels == {"layerwise (base=top_p)", "layerwise (base=max_p)"}
    again = layerwise("diffusion", "top_p", [[1.0], [0.3]])
    labels = [group.rule for group in groups_of([*pair, *own, again])[0]]
    assert labels == ["layerwise", "layerwise", "layerwise, no. 2"]
