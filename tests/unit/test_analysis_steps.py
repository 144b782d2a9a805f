"""Step tables and overlap, against sums by hand."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from dllm_sparsity.analysis.overlap import has_overlap, overlap_by
from dllm_sparsity.analysis.steps import coarsen, counted, grid, sparsity_by


def steps(**columns):
    length = len(columns["kept"])
    base = {"phase": ["denoise"] * length, "branch": ["cond"] * length, "token_state": ["masked"] * length}
    base |= {"step": [0] * length, "layer": [0] * length, "site": ["input"] * length}
    return pa.table(base | columns)


def test_sparsity_is_a_ratio_of_sums():
    table = steps(layer=[0, 0, 1], rows=[1, 3, 2], kept=[10, 0, 5], total=[10, 30, 20])
    found = sparsity_by(table, ("layer",)).to_pylist()
    assert [row["sparsity"] for row in found] == [0.75, 0.75]
    assert [row["rows"] for row in found] == [4, 2]


def test_excluded_rows():
    table = steps(
        token_state=["masked", "pad", "after_eos", "masked"],
        branch=["cond", "cond", "cond", "uncond"],
        rows=[1] * 4,
        kept=[1] * 4,
        total=[2] * 4,
    )
    assert len(counted(table)) == 1
    assert counted(table, after_eos=True)["token_state"].to_pylist() == ["masked", "after_eos"]


def test_coarsen_and_grid():
    table = steps(step=list(range(10)), rows=[1] * 10, kept=[1] * 10, total=[2] * 10)
    coarse = coarsen(table, "step", 4)
    assert sorted(set(coarse["step"].to_pylist())) == [0, 3, 6, 9]
    assert coarsen(table, "step", 10) is table
    rows, columns, matrix = grid(sparsity_by(coarse, ("layer", "step")), "layer", "step", "sparsity")
    assert (rows, columns, matrix.tolist()) == ([0], [0, 3, 6, 9], [[0.5] * 4])


def test_overlap_beside_the_independence_line():
    # width 10, four tokens compared: earlier density 0.5, now (12 + 24 - 20) / 40 = 0.4
    table = steps(
        rows=[5],
        kept=[20],
        total=[50],
        rows_prev=[4],
        inter_prev=[12],
        union_prev=[24],
        kept_prev=[20],
        jaccard_sum_prev=[2.2],
    )
    row = overlap_by(table, ("step",)).to_pylist()[0]
    assert row["pooled"] == 0.5
    assert row["per_token"] == pytest.approx(0.55)
    assert row["independent"] == pytest.approx(0.5 * 0.4 / (0.5 + 0.4 - 0.5 * 0.4))
    assert has_overlap(table)
    assert not has_overlap(table, "first")


def test_independent_sets_meet_the_line():
    rng = np.random.default_rng(0)
    before, now = rng.random((500, 200)) < 0.45, rng.random((500, 200)) < 0.45
    inter, union = (before & now).sum(1), (before | now).sum(1)
    table = steps(
        rows=[500],
        kept=[int(now.sum())],
        total=[100_000],
        rows_prev=[500],
        inter_prev=[int(inter.sum())],
        union_prev=[int(union.sum())],
        kept_prev=[int(before.sum())],
        jaccard_sum_prev=[float((inter / union).sum())],
    )
    row = overlap_by(table, ("step",)).to_pylist()[0]
    assert row["pooled"] == pytest.approx(row["independent"], abs=0.005)
    assert row["independent"] == pytest.approx(0.45 / (2 - 0.45), abs=0.01)


def test_steps_that_compared_nothing_are_left_out():
    columns = {f"{name}_prev": [0] for name in ("rows", "inter", "union", "kept")} | {"jaccard_sum_prev": [0.0]}
    assert len(overlap_by(steps(rows=[5], kept=[1], total=[50], **columns), ("step",))) == 0
