"""From a run directory to its summary: pairing, known curves, refusals, and plain JSON."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_analysis_run import achieved, seal, write_study

from dllm_sparsity.analysis import curves_of, headline, load, summary
from dllm_sparsity.analysis.headline import without_answer
from dllm_sparsity.errors import UserError


@pytest.fixture
def run_dir(tmp_path):
    return write_study(tmp_path / "study", items=60, layers=2, steps=4, strengths=(0.9, 0.8, 0.6, 0.3))


def rewrite(run_dir, pattern, column, values, file="samples"):
    for folder in (run_dir / "cells").glob(pattern):
        table = pq.read_table(folder / f"{file}.parquet")
        at = table.column_names.index(column)
        changed = pa.array(values(table[column].to_pylist()), table.schema.field(column).type)
        pq.write_table(table.set_column(at, column, changed), folder / f"{file}.parquet")
        seal(folder)


def headline_value(curve):
    return next(
        own["value"] for own in curve["critical"] if own["reading"] == "interpolated" and own["retention"] == 0.99
    )


def test_summary_is_plain_json_and_finds_the_known_order(run_dir):
    found = summary(load(run_dir), draws=1000)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["counts"]["cells"] == 52
    rows = {(row["paradigm"], row["task"], row["site"]): row for row in headline(found)}
    assert len(rows) == 18
    assert [row["task"] for row in headline(found)][-6:] == ["average of 2 tasks"] * 6
    for task in ("arc_easy", "gsm8k"):
        ar, diffusion = (rows[paradigm, task, "intermediate"] for paradigm in ("autoregressive", "diffusion"))
        for row in (ar, diffusion):
            assert row["interval"][0] - 1e-9 <= row["critical"] <= row["interval"][1] + 1e-9
    nll = {curve["paradigm"]: curve for curve in found["curves"] if (curve["kind"], curve["site"]) == ("nll", "all")}
    assert headline_value(nll["autoregressive"]) < headline_value(nll["diffusion"])
    assert rows["diffusion", "arc_easy", "all"]["tokens_per_forward"] is None
    assert rows["autoregressive", "gsm8k", "all"]["tokens_per_forward"] == pytest.approx(1.0)
    assert any("no speed-up was measured" in note for note in found["notes"])
    assert any("is a bound" in note for note in found["notes"])
    assert len(found["findings"]) == 9
    assert [own["task"] for own in found["comparisons"]].count("average of 2 tasks") == 3 * 4


def test_points_carry_asked_and_achieved_sparsity(run_dir):
    curves, notes = curves_of(load(run_dir).cells, draws=100)
    assert notes == []
    curve = next(curve for curve in curves if curve.group.site == "intermediate")
    assert curve.points[0].cell.record["dense"]
    assert (curve.points[0].sparsity, curve.points[0].difference, curve.points[0].retention) == (0.0, 0.0, 1.0)
    for point in curve.points[1:]:
        assert point.sparsity == pytest.approx(achieved("intermediate", point.cell.record["strength"]), abs=0.02)
        assert point.flops_saved == pytest.approx(point.sparsity / 3)


def test_all_is_weighted_by_neurons(run_dir):
    curves, _ = curves_of(load(run_dir).cells, draws=10)
    point = next(curve for curve in curves if curve.group.site == "all").points[1]
    inner = {name: achieved(name, point.cell.record["strength"]) for name in ("input", "intermediate")}
    assert point.sparsity == pytest.approx((64 * inner["input"] + 176 * inner["intermediate"]) / 240, abs=0.02)
    assert point.flops_saved == pytest.approx((2 * inner["input"] + inner["intermediate"]) / 3, abs=0.02)


def test_agreement_of_dense_with_itself_is_one(run_dir):
    curves, _ = curves_of(load(run_dir).cells, draws=10)
    own = [curve for curve in curves if curve.quality["kind"] == "agreement"]
    assert len(own) == 6
    assert all(curve.points[0].quality == 1.0 for curve in own)


def test_what_lacks_an_answer_names_the_site_only_where_another_has_one():
    told = without_answer(
        [
            ("piqa", "AR", "input", "at chance"),
            ("piqa", "AR", "up", "at chance"),
            ("arc", "AR", "input", None),
            ("arc", "AR", "up", "budget spent"),
            ("arc", "AR", "gate", "budget spent"),
        ]
    )
    assert told == ["piqa, AR: at chance", "arc, AR, up and gate: budget spent"]


def test_a_dense_accuracy_at_chance_has_no_critical_sparsity(run_dir):
    for pattern in ("autoarc_easy*",):
        rewrite(
            run_dir, pattern, "metrics", lambda old: [json.dumps({"acc": int(i % 4 == 0)}) for i in range(len(old))]
        )
    curves, _ = curves_of(load(run_dir).cells, draws=10)
    own = [curve for curve in curves if curve.group.dense.record["paradigm"] == "autoregressive"]
    reading = next(curve for curve in own if curve.quality["name"] == "acc").reading()
    assert reading.value is None
    assert "two standard errors above chance" in reading.reason
    assert next(curve for curve in own if curve.quality["name"] == "nll").reading().value is not None


@pytest.mark.parametrize("column", ["doc_hash", "prompt_hash"])
def test_other_documents_are_refused(run_dir, column):
    rewrite(run_dir, "autoarc_easyinput0p6", column, lambda old: ["other", *old[1:]])
    with pytest.raises(UserError, match=f"{column} of document 0"):
        curves_of(load(run_dir).cells, draws=10)


def test_a_document_that_occurs_twice_is_refused(run_dir):
    rewrite(run_dir, "autoarc_easyinput0p6", "doc_id", lambda old: [1, *old[1:]])
    with pytest.raises(UserError, match="occurs twice"):
        curves_of(load(run_dir).cells, draws=10)


def test_items_that_a_cell_lacks_are_left_out_and_told(run_dir):
    path = next((run_dir / "cells").glob("autoarc_easyinput0p6")) / "samples.parquet"
    pq.write_table(pq.read_table(path).slice(5), path)
    seal(path.parent)
    curves, notes = curves_of(load(run_dir).cells, draws=10)
    assert any("5 items of arc_easy" in note for note in notes)
    assert {len(curve.keys) for curve in curves} == {55, 60}


def test_values_that_are_not_finite_are_left_out_and_told(run_dir):
    rewrite(run_dir, "autoarc_easyinput0p6", "loglikelihoods", lambda old: [[-np.inf] * 4, *old[1:]])
    _, notes = curves_of(load(run_dir).cells, draws=10)
    assert any("have no finite nll" in note for note in notes)


def test_a_rule_without_its_dense_cell_is_told(run_dir):
    for folder in (run_dir / "cells").glob("*dense*"):
        (folder / "DONE").unlink()
    found = summary(load(run_dir), draws=10)
    assert found["curves"] == []
    assert any("no finished dense cell" in note for note in found["notes"])
