"""Curves whose items fall into groups: their intervals draw whole groups, and cover what they say they cover."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dllm_sparsity.analysis.comparison import comparisons
from dllm_sparsity.analysis.curves import curves_of
from dllm_sparsity.analysis.loading import Cell
from dllm_sparsity.analysis.verdicts import judge
from dllm_sparsity.study.records import PRIMITIVE_SITES

NLL = {"name": "nll", "kind": "nll", "chance": None}
ACC = {"name": "acc", "kind": "accuracy", "chance": 0.25}
RETENTION = 0.95
SPARSITIES = (0.0, 0.25, 0.5, 0.75)


def make_cell(level, values, groups, quality=NLL, sparsity=0.0, paradigm="autoregressive", searches=()):
    """A cell of items with a value each, of one token, at a given sparsity."""
    items, dense = len(values), level == 0
    kept = [round(1000 * (1 - sparsity))] * items
    table = pa.table(
        {
            "task": ["t"] * items,
            "doc_id": list(range(items)),
            "doc_hash": ["d"] * items,
            "prompt_hash": ["p"] * items,
            "filter": ["none"] * items,
            "correct": pa.array(values, pa.float64()),
            "metrics": ["{}"] * items,
            "target": pa.nulls(items, pa.int32()),
            "loglikelihoods": [[-value] for value in values],
            "target_tokens": [[1]] * items,
            **{f"kept_{site}": kept for site in PRIMITIVE_SITES},
            **{f"total_{site}": [1000] * items for site in PRIMITIVE_SITES},
            **({} if groups is None else {"group": [f"g{number}" for number in groups]}),
        }
    )
    record = {
        "fingerprint": f"{paradigm}{level}",
        "paradigm": paradigm,
        "model": paradigm,
        "task": "t",
        "dense": dense,
        "rule": None if dense else "top_p",
        "rule_parameters": {},
        "strength": None if dense else 1 - sparsity,
        "site": None if dense else "input",
        "layers": None,
        "qualities": [quality],
        "ffn": {"gated": True, "uniform": True},
        "totals": {},
        "parts": {},
        "notes": [],
    }
    cell = Cell(Path(f"{paradigm}{level}"), record, searches)  # pyright: ignore[reportArgumentType]
    cell.__dict__["samples"] = table
    return cell


def make_curve(columns, groups, draws=2000, **fields):
    cells = [
        make_cell(level, values, groups, sparsity=SPARSITIES[level], **fields) for level, values in enumerate(columns)
    ]
    (curve,), _ = curves_of(cells, draws)
    return curve


def width(interval):
    return interval[1] - interval[0]


def test_twins_of_items_widen_every_interval_by_the_root_of_two():
    rng = np.random.default_rng(3)
    pairs = 400
    dense = np.repeat(rng.normal(3.0, 0.6, pairs), 2)
    loss = np.repeat(rng.normal(0.2, 0.1, pairs), 2)
    groups = np.repeat(np.arange(pairs), 2)
    alone, whole = (make_curve([dense, dense + loss], own, draws=8000) for own in (None, groups))
    assert alone.clusters is None
    assert whole.clusters is not None
    normal = 2 * 1.959964
    critical = 0.25 * -math.log(RETENTION) / loss.mean()
    for curve, count in ((alone, 2 * pairs), (whole, pairs)):
        point, reading = curve.points[1], curve.reading(retention=RETENTION)
        assert reading.value == pytest.approx(critical, rel=1e-9)
        expected = {
            "quality": normal * (dense + loss).std() / math.sqrt(count),
            "difference": normal * loss.std() / math.sqrt(count),
            "critical": normal * critical * loss.std() / loss.mean() / math.sqrt(count),  # the delta method
        }
        assert width(point.quality_interval) == pytest.approx(expected["quality"], rel=0.05)
        assert width(point.difference_interval) == pytest.approx(expected["difference"], rel=0.05)
        assert width(reading.interval) == pytest.approx(expected["critical"], rel=0.05)
    for name in ("quality_interval", "difference_interval", "retention_interval"):
        ratio = width(getattr(whole.points[1], name)) / width(getattr(alone.points[1], name))
        assert ratio == pytest.approx(math.sqrt(2), rel=0.05)


def test_groups_of_one_change_nothing():
    rng = np.random.default_rng(0)
    dense = rng.normal(3.0, 0.6, 50)
    columns = [dense, dense + rng.normal(0.2, 0.1, 50)]
    assert make_curve(columns, None, 200).points[1].quality_interval == (
        make_curve(columns, range(50), 200).points[1].quality_interval
    )


def world(rng, clusters):
    """Draw items in groups of one to six that share most of what moves them; the loss is 0.3 nats times sparsity."""
    sizes = rng.integers(1, 7, clusters)
    groups = np.repeat(np.arange(clusters), sizes)
    level = rng.normal(3.0, 0.5, clusters)[groups] + rng.normal(0.0, 0.2, len(groups))
    share = 1 + rng.normal(0.0, 0.5, clusters)[groups] + rng.normal(0.0, 0.2, len(groups))
    return [level + 0.3 * sparsity * share for sparsity in SPARSITIES], groups


@pytest.mark.slow
def test_intervals_of_grouped_items_cover_the_truth():
    rng = np.random.default_rng(11)
    truth, critical, worlds = 3.0 + 0.3 * 0.5, -math.log(RETENTION) / 0.3, 400
    covered = {"quality": 0, "critical": 0, "quality, items alone": 0, "critical, items alone": 0}
    for _ in range(worlds):
        columns, groups = world(rng, 60)
        for own, name in ((groups, ""), (None, ", items alone")):
            curve = make_curve(columns, own, draws=400)
            low, high = curve.points[2].quality_interval
            covered[f"quality{name}"] += low <= truth <= high
            low, high = curve.reading(retention=RETENTION).interval
            covered[f"critical{name}"] += low <= critical <= high
    shares = {name: count / worlds for name, count in covered.items()}
    assert 0.91 <= shares["quality"] <= 0.98, shares
    assert 0.91 <= shares["critical"] <= 0.98, shares
    assert shares["quality, items alone"] < 0.85, shares
    assert shares["critical, items alone"] < 0.85, shares


def test_right_or_wrong_in_groups_is_not_taken_for_more_than_it_is():
    """Four of eight passages of ten items each are right throughout: half of 80 items, but only four of eight."""
    groups = np.repeat(np.arange(8), 10)
    right = np.repeat([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0], 10)
    alone, whole = (make_curve([right, right], own, 200, quality=ACC) for own in (None, groups))
    assert alone.readings[0].reason is None
    all_right = make_curve([right * 0 + 1] * 2, groups // 3, 200, quality=ACC)  # three passages of 80 items
    assert "n=80 in 3 groups" in all_right.readings[0].reason
    assert whole.readings[0].reason == (
        "dense accuracy 50.0% is not two standard errors above chance (25.0%, n=80 in 8 groups)"
    )


def test_paradigms_are_paired_only_where_their_groups_are_the_same():
    rng = np.random.default_rng(5)
    columns, groups = world(rng, 40)
    others = {"same": groups, "other": np.arange(len(groups)) // 2, "none": None}
    for name, own in others.items():
        first = make_curve(columns, groups, 200)
        second = make_curve(columns, own, 200, paradigm="diffusion")
        found = comparisons([first, second], (RETENTION,))
        assert [pair.paired for pair in found] == [name == "same"]
        assert (width(found[0].interval) < 1e-12) == (name == "same")


def test_what_the_notes_say_of_items_that_are_left_out():
    values = np.arange(40.0) + 1
    cells = [make_cell(0, values, None)]
    for number, site in enumerate(("input", "up"), start=1):
        cells.append(make_cell(number, values[: -5 * number], None, sparsity=0.5))
        cells[-1].record["site"] = site
    assert curves_of(cells, 10)[1] == [
        "5 items of t on autoregressive, top_p at input, are not in every cell and are left out",
        "10 items of t on autoregressive, top_p at up, are not in every cell and are left out",
    ]
    for cell in cells:  # of a search, whose answer uses them all
        cell.record["parts"] = {"block": [0, len(cell.samples)]}
    assert curves_of(cells, 10)[1] == []


def test_what_the_notes_say_of_groups():
    rng = np.random.default_rng(5)
    columns, groups = world(rng, 40)
    cells = [make_cell(n, own, groups, sparsity=SPARSITIES[n]) for n, own in enumerate(columns[:2])]
    notes = judge(curves_of(cells, 100)[0], cells, 100)[1]
    assert notes == ["the items of t fall into 40 groups: intervals draw whole groups, and tests are clustered"]
