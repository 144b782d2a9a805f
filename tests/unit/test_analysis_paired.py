"""Paired tests, the noise floor and verdicts: closed forms, power, groups, words."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats
from test_analysis_run import seal, write_study

from dllm_sparsity.analysis import curves_of, load, summary
from dllm_sparsity.analysis.amounts import amount, amounts
from dllm_sparsity.analysis.noise import NoiseFloor, noise_floor
from dllm_sparsity.analysis.paired import paired_tests
from dllm_sparsity.analysis.pairing import item_groups
from dllm_sparsity.analysis.statistics import holm, smallest_detectable_by_mcnemar
from dllm_sparsity.analysis.verdicts import _verdict, judge
from dllm_sparsity.errors import UserError

ACC = {"name": "acc", "kind": "accuracy", "chance": 0.25}
NLL = {"name": "nll", "kind": "nll", "chance": None}


@pytest.fixture
def run_dir(tmp_path):
    return write_study(tmp_path / "study", items=80, layers=1, steps=2, sites=("input", "all"), strengths=(0.9, 0.5))


def right(values):
    return np.asarray(values, dtype=float), np.ones(len(values))


def edit(path, **columns):
    table = pq.read_table(path)
    for name, values in columns.items():
        if name in table.column_names:
            at = table.column_names.index(name)
            table = table.set_column(at, name, pa.array(values, table.schema.field(name).type))
        else:
            table = table.append_column(name, pa.array(values, pa.string()))
    pq.write_table(table, path)
    if (path.parent / "DONE").exists():
        seal(path.parent)


def test_right_or_wrong_items_get_the_exact_mcnemar_test():
    dense, sparse = right([1] * 40 + [0] * 20), right([0] * 9 + [1] * 31 + [1] * 2 + [0] * 18)
    test = paired_tests(dense, [sparse])[0]
    assert test.test == "exact McNemar"
    assert test.p == pytest.approx(stats.binomtest(2, 11).pvalue)
    assert test.difference == pytest.approx(-7 / 60)
    assert (test.changed, test.items, test.groups) == (11, 60, None)


def test_likelihoods_get_a_paired_t_test():
    rng = np.random.default_rng(0)
    dense, sparse = rng.normal(2, 1, 50), rng.normal(2.2, 1, 50)
    test = paired_tests(right(dense), [right(sparse)])[0]
    assert test.test == "paired t"
    assert test.p == pytest.approx(stats.ttest_rel(sparse, dense).pvalue)


def test_groups_make_the_test_clustered_and_more_careful():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(30), 5)
    dense = right(np.ones(150))
    sparse = right(np.repeat(rng.random(30) > 0.15, 5))  # a whole passage is lost at once
    alone, together = (paired_tests(dense, [sparse], own)[0] for own in (None, groups))
    assert (alone.test, together.test, together.groups) == ("exact McNemar", "paired t, clustered", 30)
    assert together.p > 100 * alone.p
    assert together.smallest_detectable() > 1.8 * alone.smallest_detectable()
    assert together.interval[0] < alone.interval[0]


def test_no_change_is_no_spread_to_go_by():
    for values in ([1, 0, 1], [0.5, 0.2, 1] * 20):
        test = paired_tests(right(values), [right(values)])[0]
        assert (test.difference, test.p, test.smallest_detectable(), test.changed) == (0.0, 1.0, None, 0)
    assert np.isnan(paired_tests((np.ones(1), np.full(1, 3.0)), [(np.full(1, 2.0), np.full(1, 3.0))])[0].p)


def test_a_handful_of_changed_items_promises_no_more_than_the_exact_test_can_hold():
    """One item of 24 changed: its spread alone would promise 11.7 points; losing so many (three) has a p-value of 0.25."""
    dense = right([1] * 24)
    for sparse in (right([1] * 24), right([0] + [1] * 23)):
        test = paired_tests(dense, [sparse])[0]
        assert test.smallest_detectable() == smallest_detectable_by_mcnemar(24) == pytest.approx(0.3098, abs=0.001)


@pytest.mark.parametrize("comparisons", [1, 50])
def test_power_at_the_smallest_detectable_difference_is_80_percent(comparisons):
    """Of 800 worlds whose true loss is what a pilot said to be detectable, the t-test finds about 80 %.

    Among 50 comparisons Holm's first step asks for 0.1 %, where a t-test on 200 items has 78.5 %.
    """
    rng = np.random.default_rng(2)
    items, trials, spread = 200, 800, 0.5
    pilot = rng.normal(2.0, 1.0, 4000)
    shift = rng.normal(0.0, spread, 4000)
    whole = paired_tests(right(pilot), [right(pilot + shift)], draws=1000)[0].smallest_detectable(comparisons)
    truth = whole * np.sqrt(4000 / items)
    found = 0
    for seed in range(trials):
        dense = rng.normal(2.0, 1.0, items)
        sparse = dense + rng.normal(truth, spread, items)
        found += paired_tests(right(dense), [right(sparse)], draws=2, seed=seed)[0].p < 0.05 / comparisons
    assert abs(found / trials - 0.8) < 3 * np.sqrt(0.8 * 0.2 / trials) + 0.01


@pytest.mark.parametrize(("comparisons", "power"), [(1, 0.776), (50, 0.808)])
def test_power_for_right_or_wrong_items(comparisons, power):
    """The exact test is careful: its power there is known by summing the binomial, and it cries wolf in 5 % at most."""
    rng = np.random.default_rng(3)
    items, trials, flips = 800, 600, 0.10
    pilot = np.repeat([-1.0, 0.0, 1.0], [40, 720, 40])
    dense = right(pilot < 0)
    least = paired_tests(dense, [right(pilot > 0)], draws=1000)[0].smallest_detectable(comparisons)
    shares = {}
    for name, loss in (("truth", least), ("nothing", 0.0)):
        chances = [(flips + loss) / 2, 1 - flips, (flips - loss) / 2]
        worlds = (rng.choice([-1.0, 0.0, 1.0], size=items, p=chances) for _ in range(trials))
        tests = (paired_tests(right(own < 0), [right(own > 0)], draws=2)[0] for own in worlds)
        shares[name] = np.mean([test.p < 0.05 / comparisons and test.test == "exact McNemar" for test in tests])
    assert abs(shares["truth"] - power) < 3 * np.sqrt(power * (1 - power) / trials)
    assert shares["nothing"] < 0.05 / comparisons + 3 * np.sqrt(0.05 * 0.95 / trials)


def test_without_groups_the_numbers_are_those_of_the_curves(run_dir):
    run = load(run_dir)
    curves, _ = curves_of(run.cells, draws=300)
    judged, notes = judge(curves, run.cells, draws=300)
    assert notes == []
    for curve, own in zip(curves, judged, strict=True):
        assert own.verdicts[0] is None
        for point, verdict in zip(curve.points[1:], own.verdicts[1:], strict=True):
            assert verdict.test.difference == pytest.approx(point.difference, abs=1e-12)
            assert verdict.test.interval == pytest.approx(point.difference_interval, abs=1e-12)
            if verdict.test.changed and verdict.comparisons:
                level = 1 - 0.05 / verdict.comparisons
                exact = verdict.test.test == "exact McNemar"
                least = smallest_detectable_by_mcnemar(80, level=level) if exact else 0.0
                z = stats.norm.ppf(1 - 0.025 / verdict.comparisons) + stats.norm.ppf(0.8)
                assert verdict.smallest_detectable == pytest.approx(max(least, z * verdict.test.spread))


def test_holm_runs_over_the_cells_of_one_task_and_measure(run_dir):
    found = summary(load(run_dir), draws=100)
    for task, quality in {(curve["task"], curve["quality"]) for curve in found["curves"]}:
        own = [curve for curve in found["curves"] if (curve["task"], curve["quality"]) == (task, quality)]
        points = [point for curve in own for point in curve["points"] if point["p_holm"] is not None]
        assert {name for point in points for name in point if name.endswith("holm")} <= {"p_holm"}  # no second rule
        if own[0]["kind"] == "agreement":
            assert points == []
            continue
        assert {point["comparisons"] for point in points} == {len(points)} == {8}
        assert [point["p_holm"] for point in points] == pytest.approx(holm([point["p"] for point in points]))


def test_words_follow_the_numbers(run_dir):
    found = summary(load(run_dir), draws=200)
    told = {point["outcome"] for curve in found["curves"] for point in curve["points"]}
    assert told >= {None, "same", "worse", "share"}
    for curve in found["curves"]:
        for point in curve["points"]:
            if point["outcome"] == "worse" and curve["kind"] == "accuracy":
                low, high = point["difference_interval"]
                size, least, most = (f"{-100 * value:.1f}" for value in (point["difference"], high, low))
                assert point["words"] == f"worse by {size} points [{least}, {most}]"
                assert point["p_holm"] <= 0.05
            if point["outcome"] == "none":
                assert point["words"].startswith("no difference detectable; smallest detectable among 8 ")
            if point["outcome"] == "worse" and curve["kind"] == "nll":
                assert point["difference"] > 0
                assert "nats per token" in point["words"]


def test_a_gain_a_correction_and_a_share_in_words(run_dir):
    folder = run_dir / "cells" / "autoarc_easyinput0p9"
    dense = pq.read_table(run_dir / "cells" / "autoarc_easydense1" / "samples.parquet")
    before = [json.loads(text)["acc"] for text in dense["metrics"].to_pylist()]
    wrong = [item for item, value in enumerate(before) if not value]
    alone = r"better by 7\.5 points \[\d\.\d, \d+\.\d\] if it stood alone, not among 8 comparisons; smallest detectable among these .* points"
    for gained, outcome, words in ((6, "alone", alone), (15, "better", r"better by 18\.8 points \[\d+\.\d, \d+\.\d\]")):
        after = [1.0 if item in wrong[:gained] else value for item, value in enumerate(before)]
        edit(folder / "samples.parquet", metrics=[json.dumps({"acc": value}) for value in after], correct=after)
        curves = summary(load(run_dir))["curves"]
        curve = next(own for own in curves if (own["quality"], own["site"]) == ("acc", "input"))
        point = next(own for own in curve["points"] if own["fingerprint"] == folder.name)
        assert point["outcome"] == outcome
        assert re.fullmatch(words, point["words"])


def test_amounts_have_digits_enough():
    assert amounts([0.027, 0.0121, 0.043], "accuracy") == ["2.7", "1.2", "4.3"]
    assert amounts([0.0004, -0.00001], "nll") == ["0.0004", "0.0000"]
    assert amount(0.019, "accuracy") == "1.9 points"
    assert amounts([0.0, 0.0], "accuracy") == ["0.0", "0.0"]
    assert amount(float("nan"), "score") == "nan"


def test_groups_from_the_column():
    assert item_groups(pa.table({"doc_id": [1, 2]})) is None
    assert item_groups(pa.table({"group": ["a", None, "b"]})) is None
    assert item_groups(pa.table({"group": ["a", "a"]})) is None  # nothing to resample
    assert item_groups(pa.table({"group": ["a", None, "a", None]})).tolist() == [0, 1, 0, 2]


def test_groups_in_the_samples_cluster_the_cells(run_dir):
    plain = summary(load(run_dir), draws=300)
    for path in (run_dir / "cells").glob("autoarc*/samples.parquet"):
        edit(path, group=[f"passage {item // 8}" for item in range(80)])
    clustered = summary(load(run_dir), draws=300)
    assert any("10 groups in arc_easy are few" in note for note in clustered["notes"])
    changed = 0
    for before, after in zip(plain["curves"], clustered["curves"], strict=True):
        for one, two in zip(before["points"], after["points"], strict=True):
            grouped = after["task"] == "arc_easy" and after["paradigm"] == "autoregressive" and not two["dense"]
            assert two["groups"] == (10 if grouped else None)
            assert one["difference"] == two["difference"]
            changed += one["difference_interval"] != two["difference_interval"]
            if grouped:
                assert two["test"] == "paired t, clustered"
    assert changed >= 4


def test_the_noise_floor_of_two_tables(run_dir):
    first = pq.read_table(run_dir / "cells" / "autoarc_easydense1" / "samples.parquet")
    turned = first.take(pa.array(range(79, -1, -1)))
    same = noise_floor(first, turned, ACC)
    assert (same.difference, same.floor, same.changed, same.items) == (0.0, 0.0, 0, 80)
    values = [json.loads(text)["acc"] for text in first["metrics"].to_pylist()]
    flipped = [1 - value if item in (3, 50) else value for item, value in enumerate(values)]
    at = first.column_names.index("metrics")
    second = first.set_column(at, "metrics", pa.array([json.dumps({"acc": value}) for value in flipped]))
    noise = noise_floor(first, second, ACC)
    assert noise.changed == 2
    assert noise.difference == pytest.approx((sum(flipped) - sum(values)) / 80)
    assert noise.floor == max(map(abs, noise.interval)) > 0
    assert noise_floor(second, first, ACC).difference == -noise.difference
    with pytest.raises(UserError, match="share no item"):
        noise_floor(first, second.slice(0, 0), ACC)
    empty = pa.nulls(80, pa.list_(pa.float64()))
    unscored = first.set_column(first.column_names.index("loglikelihoods"), "loglikelihoods", empty)
    with pytest.raises(UserError, match="no item has a value of nll"):
        noise_floor(first, unscored, NLL)


def test_a_dense_cell_run_again_gives_the_floor(run_dir):
    cells = run_dir / "cells"
    dense, again = cells / "autoarc_easydense1", cells / "autoarc_easyagain"
    again.mkdir()
    for name in ("samples.parquet", "steps.parquet", "DONE"):
        (again / name).write_bytes((dense / name).read_bytes())
    record = json.loads((dense / "cell.json").read_text()) | {"fingerprint": again.name, "replicate": 1}
    (again / "cell.json").write_text(json.dumps(record | {"parts": {"replicate": 1}}))
    values = [json.loads(text)["acc"] for text in pq.read_table(dense / "samples.parquet")["metrics"].to_pylist()]
    flipped = [1 - value if item < 40 and item % 2 else value for item, value in enumerate(values)]
    edit(again / "samples.parquet", metrics=[json.dumps({"acc": value}) for value in flipped])
    found = summary(load(run_dir), draws=300)
    own = [curve for curve in found["curves"] if curve["noise"]]
    assert {(curve["paradigm"], curve["task"]) for curve in own} == {("autoregressive", "arc_easy")}
    curve = next(curve for curve in own if (curve["quality"], curve["site"]) == ("acc", "input"))
    assert curve["noise"]["changed"] == 20
    assert {point["noise_floor"] for point in curve["points"][1:]} == {curve["noise"]["floor"]}
    assert curve["noise"]["floor"] == pytest.approx(max(map(abs, curve["noise"]["interval"])))
    assert any("20 of 80 items change" in note for note in found["notes"])
    assert not any("several dense cells" in note for note in found["notes"])
    inside = [
        point
        for curve in own
        for point in curve["points"]
        if not point["dense"] and point["changed"] and abs(point["difference"]) <= (point["noise_floor"] or 0)
    ]
    assert all(point["outcome"] in ("noise", "none") for point in inside)
    (again / "cell.json").write_text(json.dumps(record | {"parts": {"replicate": 1, "seed": 7}}))
    seal(again)
    found = summary(load(run_dir), draws=50)
    assert not any(curve["noise"] for curve in found["curves"])
    assert any("gives no noise floor: seed differs" in note for note in found["notes"])


def test_a_loss_inside_the_floor_is_noise(run_dir):
    run = load(run_dir)
    curves, _ = curves_of(run.cells, draws=200)
    judged, _ = judge(curves, run.cells, draws=200)
    curve, verdict = next(
        (curve, verdict)
        for curve, own in zip(curves, judged, strict=True)
        for verdict in own.verdicts
        if verdict and verdict.outcome == "worse" and curve.quality["kind"] == "accuracy"
    )
    floor = abs(verdict.test.difference) + 0.01
    noise = NoiseFloor(0.0, (-floor, floor), floor, 9, 80)
    told = _verdict(curve, verdict.test, verdict.p_holm, verdict.comparisons, noise)
    assert told.outcome == "noise"
    assert told.words.startswith("within noise: worse by ")
    assert told.words.endswith(f"dense run again moves by up to {100 * floor:.1f} points")
