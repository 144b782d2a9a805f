"""The average over tasks as one curve: known crossings, an independent recount, and what is left out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from test_analysis_clusters import ACC, NLL, make_cell, width

from dllm_sparsity.analysis.averages import average_comparisons, averages
from dllm_sparsity.analysis.critical import READINGS, RETENTIONS
from dllm_sparsity.analysis.curves import curves_of

STRENGTHS = (None, 0.9, 0.8, 0.5)
SCORE = {"name": "bleu", "kind": "score", "chance": None}
CHANCE = {"name": "exact_match", "kind": "accuracy", "chance": 0.0}


def cells_of(task, columns, sparsities, quality=NLL, paradigm="autoregressive", groups=None, strengths=STRENGTHS):
    """Cells of a task: a column of values an item for dense and for each strength."""
    cells = []
    for level, (values, sparsity) in enumerate(zip(columns, sparsities, strict=True)):
        cell = make_cell(level, np.asarray(values, float), groups, quality, sparsity, paradigm)
        cell.record.update(task=task, fingerprint=f"{paradigm}{task}{level}", strength=strengths[level])
        cells.append(cell)
    return cells


def average(*cells, search=None, draws=2000):
    found, notes = averages(curves_of([cell for own in cells for cell in own], draws)[0], search)
    return [own.told for own in found], notes


def read(entry, reading="interpolated", retention=0.99):
    (own,) = (own for own in entry["critical"] if (own["reading"], own["retention"]) == (reading, retention))
    return own


def right(share, items):
    return np.arange(items) < round(share * items)


def test_a_known_crossing_of_accuracies_where_every_task_counts_the_same():
    first = cells_of("a", [right(share, 10) for share in (1.0, 1.0, 0.6)], (0.0, 0.2, 0.6), ACC)
    second = cells_of("b", [right(share, 20) for share in (0.8, 0.8, 0.5)], (0.0, 0.4, 0.8), CHANCE)
    (entry,), notes = average(second, first)
    assert notes == []
    identity = {name: entry[name] for name in ("paradigm", "model", "task", "rule", "site", "quality", "kind")}
    assert identity == {
        **{"paradigm": "autoregressive", "model": "autoregressive", "task": "average of 2 tasks"},
        **{"rule": "top_p", "site": "input", "quality": "accuracy", "kind": "accuracy"},
    }
    assert (entry["tasks"], entry["items"], entry["higher_is_better"]) == (("a", "b"), 30, True)
    assert [point["strength"] for point in entry["points"]] == [None, 0.9, 0.8]
    assert [point["dense"] for point in entry["points"]] == [True, False, False]
    assert [point["sparsity"] for point in entry["points"]] == pytest.approx([0.0, 0.3, 0.7])
    assert [point["quality"] for point in entry["points"]] == pytest.approx([0.9, 0.9, 0.55])
    assert [point["retention"] for point in entry["points"]] == pytest.approx([1.0, 1.0, 0.55 / 0.9])
    assert entry["dense"]["value"] == pytest.approx(0.9)
    assert {(own["retention"], own["reading"]) for own in entry["critical"]} == {
        (retention, name) for retention in RETENTIONS for name in READINGS
    }
    assert read(entry)["value"] == pytest.approx(0.3 + 0.4 * 0.009 / 0.35)
    assert read(entry, "grid_max")["value"] == pytest.approx(0.3)
    assert not read(entry)["censored"]


def test_a_known_crossing_of_likelihoods_is_in_nats():
    first = cells_of("a", [[3.0] * 5, [3.002] * 5, [3.1] * 5], (0.0, 0.2, 0.4))
    second = cells_of("b", [[2.0] * 9, [2.004] * 9, [2.3] * 9], (0.0, 0.4, 0.8))
    (entry,), _ = average(first, second)
    assert (entry["quality"], entry["higher_is_better"]) == ("nll", False)
    expected = 0.3 + 0.3 * (-math.log(0.99) - 0.003) / (0.2 - 0.003)
    assert read(entry)["value"] == pytest.approx(expected)


def crossing(sparsities, qualities, retention):
    """Read a falling curve by hand."""
    for at in range(1, len(qualities)):
        if qualities[at] < retention * qualities[0]:
            above, below = qualities[at - 1], qualities[at]
            share = (above - retention * qualities[0]) / (above - below)
            return sparsities[at - 1] + share * (sparsities[at] - sparsities[at - 1])
    return sparsities[-1]


def test_value_and_interval_equal_a_recount_that_draws_each_task_by_itself():
    rng = np.random.default_rng(4)
    tasks, sparsities = [], [(0.0, 0.2, 0.4, 0.7), (0.0, 0.3, 0.5, 0.8), (0.0, 0.1, 0.4, 0.6)]
    for items in (300, 200, 200):
        ability, frailty = rng.random(items), rng.random(items)
        tasks.append([(ability < 0.8) & (frailty >= lost) for lost in (0.0, 0.01, 0.04, 0.4)])
    cells = [cells_of(name, *own, CHANCE) for name, *own in zip("abc", tasks, sparsities, strict=True)]
    (entry,), _ = average(*cells)
    mean_sparsity = [sum(own[at] for own in sparsities) / 3 for at in range(4)]
    found = []
    for draw in range(2001):
        qualities = [0.0] * 4
        for columns in tasks:
            items = len(columns[0])
            picks = rng.integers(0, items, items) if draw else np.arange(items)
            for at, column in enumerate(columns):
                qualities[at] += column[picks].mean() / 3
        found.append(crossing(mean_sparsity, qualities, 0.95))
    own = read(entry, retention=0.95)
    assert own["value"] == pytest.approx(found[0], abs=1e-12)
    assert own["interval"] == pytest.approx(np.quantile(found[1:], [0.025, 0.975]), abs=0.01)


def test_tasks_of_equally_many_items_are_drawn_apart():
    values = np.random.default_rng(1).normal(3.0, 0.5, 200)
    columns, sparsities = [values, values + 0.1 * values, values + 0.3 * values], (0.0, 0.3, 0.6)
    alone = curves_of(cells_of("a", columns, sparsities))[0][0].points
    (entry,), _ = average(*(cells_of(task, columns, sparsities) for task in "abcd"))
    for one, mean in zip(alone, entry["points"], strict=True):
        assert width(mean["quality_interval"]) == pytest.approx(width(one.quality_interval) / 2, rel=0.08)
    assert width(entry["dense"]["interval"]) == pytest.approx(width(alone[0].quality_interval) / 2, rel=0.08)


def both_paradigms(tasks, loss):
    rng = np.random.default_rng(9)
    dense = {task: rng.normal(3.0, 0.5, 80) for task in tasks}
    return [
        cells_of(task, [values, values + lost, values + 4 * lost], (0.0, 0.3, 0.6), paradigm=paradigm)
        for paradigm, lost in (("autoregressive", 0.1), ("diffusion", loss))
        for task, values in dense.items()
        for lost in [lost * (values - 2) ** 2]
    ]


def test_paradigms_of_the_same_tasks_are_compared_by_pairs():
    cells = [cell for own in both_paradigms("ab", 0.1) for cell in own]
    found, _ = averages(curves_of(cells)[0], None)
    (pair,) = average_comparisons(found, (0.95,))
    assert pair.paired
    assert pair.difference == pytest.approx(0.0, abs=1e-12)
    assert width(pair.interval) < 1e-12  # the same losses: only draws of the same items leave nothing
    assert width(read(found[0].told, retention=0.95)["interval"]) > 0.005


def test_averages_of_other_tasks_are_not_compared():
    ours, others = both_paradigms("ab", 0.1), both_paradigms("ac", 0.2)
    cells = [cell for own in (*ours[:2], *others[2:]) for cell in own]
    found, _ = averages(curves_of(cells, 100)[0], None)
    assert [own.tasks for own in found] == [("a", "b"), ("a", "c")]
    assert average_comparisons(found, (0.95,)) == []


def test_one_task_has_no_average():
    assert average(cells_of("a", [[3.0] * 4, [3.1] * 4, [3.2] * 4], (0.0, 0.2, 0.4))) == ([], [])


def test_scores_are_not_averaged():
    columns = [[3.0] * 4, [2.9] * 4, [2.0] * 4]
    cells = [cells_of(task, columns, (0.0, 0.2, 0.4), SCORE) for task in "ab"]
    assert len(curves_of([cell for own in cells for cell in own], 10)[0]) == 2
    assert average(*cells) == ([], [])


def test_kinds_are_averaged_apart_and_told_apart():
    likelihoods = [cells_of(task, [[3.0] * 4, [3.1] * 4, [3.2] * 4], (0.0, 0.2, 0.4)) for task in "ab"]
    accuracies = [cells_of(task, [right(1.0, 4)] * 3, (0.0, 0.2, 0.4), ACC) for task in "cd"]
    found, _ = average(*likelihoods, *accuracies)
    assert [own["task"] for own in found] == ["average of 2 tasks, accuracy", "average of 2 tasks, nll"]
    assert [own["tasks"] for own in found] == [("c", "d"), ("a", "b")]


def test_all_right_on_a_handful_of_items_is_no_more_than_luck():
    chance = {**ACC, "chance": 0.5}
    for items, is_told in ((2, False), (8, True)):  # two standard errors of guessing are 0.5 and 0.25
        cells = [cells_of(task, [right(1.0, items)] * 3, (0.0, 0.2, 0.4), chance) for task in "ab"]
        (entry,), _ = average(*cells)
        assert (read(entry, retention=0.95)["reason"] is None) is is_told


def test_only_strengths_that_all_tasks_have_count():
    columns, sparsities = [[3.0] * 4, [3.1] * 4, [3.2] * 4, [3.3] * 4], (0.0, 0.2, 0.4, 0.6)
    first = cells_of("a", columns, sparsities)
    (entry,), notes = average(first, cells_of("b", columns[:3], sparsities[:3]))
    assert ([point["strength"] for point in entry["points"]], notes) == ([None, 0.9, 0.8], [])
    found, notes = average(first, cells_of("b", columns[:3], sparsities[:3], strengths=(None, 0.9, 0.7)))
    assert found == []
    assert notes == ["no average over a, b on autoregressive, top_p at input: they share 1 strength, and it takes 2"]


def test_an_average_at_chance_has_no_critical_sparsity():
    columns = [right(0.3, 20), right(0.3, 20), right(0.1, 20)]
    (entry,), _ = average(*(cells_of(task, columns, (0.0, 0.2, 0.4), ACC) for task in "ab"))
    assert {own["value"] for own in entry["critical"]} == {None}
    reason = "dense accuracy 30.0% is not two standard errors above chance (25.0%, n=40)"
    assert {own["reason"] for own in entry["critical"]} == {reason}
    more = [right(0.45, 20), right(0.45, 20), right(0.1, 20)]  # one task alone would still be at chance
    assert curves_of(cells_of("a", more, (0.0, 0.2, 0.4), ACC))[0][0].reading().reason is not None
    (entry,), _ = average(*(cells_of(task, more, (0.0, 0.2, 0.4), ACC) for task in "ab"))
    assert read(entry)["reason"] is None


def searched_cells(task):
    cells = cells_of(task, [np.full(30, 3.0), np.full(30, 3.02)], (0.0, 0.4))
    cells[1].record["parts"] = {"block": [0, 30]}
    return cells


def search_of(**changed):
    answer = {
        **{"paradigm": "autoregressive", "model": "autoregressive", "rule": "top_p", "rule_parameters": {}},
        **{"layers": None, "site": "input", "quality": "nll", "kind": "nll", "tasks": ["b", "a"], "retention": 0.9},
        **{"value": 0.4, "interval": [0.37, 0.44], "censored": False, "reason": None, "stopped": "width"},
        **{"width": 0.1, "items": 60, "items_available": 60, "evaluations": 200, "path": []},
        **{"dense": {"value": 3.0, "interval": [2.9, 3.1]}},
    }
    return {"curves": [], "averages": [answer | changed]}


def test_the_answer_of_a_search_stands_for_the_interpolated_reading():
    (entry,), notes = average(searched_cells("a"), searched_cells("b"), search=search_of())
    assert notes == []
    assert (entry["points"], entry["dense"]) == ([], {"value": 3.0, "interval": [2.9, 3.1]})
    own = read(entry, retention=0.9)
    assert (own["value"], own["interval"], own["censored"], own["reason"]) == (0.4, (0.37, 0.44), False, None)
    others = [each for each in entry["critical"] if each is not own]
    assert len(others) == 4 * len({*RETENTIONS, 0.9}) - 1
    assert {each["value"] for each in others} == {None}
    assert read(entry)["reason"] == "the search was not for this retention"
    assert read(entry, "grid_max", 0.9)["reason"] == "a search measures too few points for this reading"


def test_a_search_without_an_answer_tells_why():
    search = search_of(value=None, interval=None, reason="the budget was spent")
    (entry,), _ = average(searched_cells("a"), searched_cells("b"), search=search)
    own = read(entry, retention=0.9)
    assert (own["value"], own["interval"], own["reason"]) == (None, None, "the budget was spent")


@pytest.mark.parametrize(
    "changed",
    [{"tasks": ["a", "b", "c"]}, {"kind": "accuracy"}, {"layers": [1]}, {"rule_parameters": {"ties": "all"}}],
    ids=str,
)
def test_answers_on_other_averages_are_not_taken(changed):
    assert average(searched_cells("a"), searched_cells("b"), search=search_of(**changed)) == ([], [])


def test_beside_a_grid_only_the_searched_reading_is_replaced():
    columns, sparsities = [[3.0] * 30, [3.01] * 30, [3.2] * 30], (0.0, 0.2, 0.4)
    cells = [cells_of(task, columns, sparsities) for task in "ab"]
    (plain,), _ = average(*cells)
    (entry,), _ = average(*cells, search=search_of(retention=0.95))
    assert (entry["points"], entry["dense"]) == (plain["points"], plain["dense"])
    assert read(entry, retention=0.95)["value"] == 0.4
    assert read(plain, retention=0.95)["value"] != 0.4
    assert [own for own in entry["critical"] if own not in plain["critical"]] == [read(entry, retention=0.95)]


ACC_NORM = {"name": "acc_norm", "kind": "accuracy", "chance": 0.25}


def with_likelihoods(task, items=30):
    """Cells whose first quality is an accuracy, beside two others."""
    cells = cells_of(task, [right(share, items) for share in (0.9, 0.9, 0.5)], (0.0, 0.2, 0.4), ACC)
    for cell in cells:
        cell.record["qualities"] = [ACC, ACC_NORM, NLL]
    return cells


@pytest.mark.parametrize(("quality", "kind"), [("nll", "nll"), ("acc_norm", "accuracy")])
def test_beside_a_grid_a_search_on_another_quality_has_an_average_of_its_own(quality, kind):
    cells = [with_likelihoods(task) for task in "ab"]
    curves = curves_of([cell for own in cells for cell in own], 50)[0]
    assert {curve.quality["name"] for curve in curves} >= {"acc", quality}
    (plain,), _ = average(*cells)
    found, notes = average(*cells, search=search_of(quality=quality, kind=kind))
    assert notes == []
    assert [own["quality"] for own in found] == ["acc", quality]
    assert len({own["task"] for own in found}) == 2
    assert read(found[0], retention=0.99) == read(plain, retention=0.99)
    assert read(found[1], retention=0.9)["value"] == 0.4


def test_averages_of_other_tasks_have_other_names():
    ours, others = both_paradigms("ab", 0.1), both_paradigms("ac", 0.2)
    found, _ = averages(curves_of([cell for own in (*ours[:2], *others[2:]) for cell in own], 100)[0], None)
    assert [own.told["task"] for own in found] == ["average of 2 tasks (a, b)", "average of 2 tasks (a, c)"]
