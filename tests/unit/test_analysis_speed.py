"""How fast a study was: sums over cells, cells without a wall clock, and the table in the report."""

from __future__ import annotations

import json
import math

import pytest
from material import make_study
from test_analysis_run import write_study

from dllm_sparsity import compare
from dllm_sparsity.analysis import load, summary
from dllm_sparsity.report import write_report
from dllm_sparsity.study.records import checksums


@pytest.fixture
def run_dir(tmp_path):
    return write_study(tmp_path / "study", items=20, layers=2, steps=4, sites=("all",), strengths=(0.9, 0.3))


def rewrite(run_dir, change):
    for path in run_dir.glob("cells/*/cell.json"):
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))
        (path.parent / "DONE").write_text(json.dumps(checksums(path.parent)))


def row(found, **only):
    return next(own for own in found["speed"] if all(own[name] == value for name, value in only.items()))


def test_items_and_seconds_add_up_over_the_strengths_of_a_rule(run_dir):
    def change(record):
        record["totals"] |= {"seconds": 3.0, "wall_seconds": 4.0 if record["dense"] else 10.0 * record["strength"]}

    rewrite(run_dir, change)
    found = summary(load(run_dir), draws=100)
    dense = row(found, paradigm="diffusion", task="gsm8k", rule=None)
    assert (dense["cells"], dense["items"], dense["items_per_second"], dense["share_in_batches"]) == (1, 20, 5.0, 0.75)
    sparse = row(found, paradigm="diffusion", task="gsm8k", rule="top_p")
    assert (sparse["cells"], sparse["items"], sparse["wall_seconds"]) == (2, 40, 12.0)
    assert sparse["items_per_second"] == pytest.approx(40 / 12)
    assert sparse["share_in_batches"] == pytest.approx(6 / 12)
    assert len(found["speed"]) == 2 * 2 * 2
    assert "Speed of the study" in write_report(run_dir).read_text()


def test_cells_without_a_wall_clock_are_read_and_counted(run_dir):
    old = summary(load(run_dir), draws=100)
    assert all(own["items_per_second"] is None and own["share_in_batches"] is None for own in old["speed"])
    assert row(old, paradigm="diffusion", task="gsm8k", rule="top_p")["cells_without_time"] == 2
    assert write_report(run_dir).exists()

    def change(record):
        if record["strength"] == 0.9:
            record["totals"] |= {"seconds": 2.0, "wall_seconds": 5.0}

    rewrite(run_dir, change)
    mixed = row(summary(load(run_dir), draws=100), paradigm="diffusion", task="gsm8k", rule="top_p")
    assert (mixed["items"], mixed["items_per_second"], mixed["cells_without_time"]) == (20, 4.0, 1)


def test_a_real_study_says_how_fast_it_was(material, tmp_path):
    study = make_study(material) | {"rules": [{"name": "top_p", "strengths": [0.5], "sites": ["all"]}]}
    result = compare(study, tmp_path / "run")
    assert len(result.summary["speed"]) == 2 * 3 * 2
    for own in result.summary["speed"]:
        assert own["cells_without_time"] == 0
        assert 0 < own["share_in_batches"] <= 1
        cells = [cell for cell in load(result.path).cells if cell.record["task"] == own["task"]]
        mine = [c for c in cells if c.record["model"] == own["model"] and c.record["dense"] == (own["rule"] is None)]
        assert math.isclose(own["items_per_second"], mine[0].record["items"] / mine[0].record["totals"]["wall_seconds"])
        spent = sum(mine[0].samples["seconds"].to_pylist())
        assert math.isclose(own["batch_seconds"], spent)
