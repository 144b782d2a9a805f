"""Qualities as pairs per item, and the FLOPs that zeros would save."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from dllm_sparsity.analysis.flops import ffn_flops_saved
from dllm_sparsity.analysis.qualities import SCALES, pairs


def samples(**columns):
    length = len(next(iter(columns.values())))
    empty = {
        "correct": pa.nulls(length, pa.float64()),
        "metrics": pa.nulls(length, pa.string()),
        "target": pa.nulls(length, pa.int32()),
    }
    return pa.table(empty | {name: pa.array(value) for name, value in columns.items()})


def quality(kind, name="q"):
    return {"name": name, "kind": kind, "chance": None}


def test_accuracy_reads_the_metric_by_name_and_else_the_headline():
    table = samples(correct=[1.0, 0.0, None], metrics=[json.dumps({"acc": 0.0}), json.dumps({"acc": 1}), "nonsense"])
    assert pairs(quality("accuracy", "acc"), table, table)[0].tolist()[:2] == [0.0, 1.0]
    top, bottom = pairs(quality("accuracy", "other"), table, table)
    assert top.tolist()[:2] == [1.0, 0.0]
    assert np.isnan(top[2])
    assert np.isnan(bottom[2])


def test_nll_is_that_of_the_right_option_per_token():
    table = samples(
        target=[1, None, None, 5, 0],
        loglikelihoods=[[-4.0, -2.0], [-9.0], [-1.0, -2.0], [-1.0], [-np.inf]],
        target_tokens=[[3, 2], [3], [1, 1], [1], [1]],
    )
    top, bottom = pairs(quality("nll"), table, table)
    assert top[:2].tolist() == [2.0, 9.0]
    assert bottom[:2].tolist() == [2.0, 3.0]
    assert np.isnan(top[2:]).all()


def test_agreement_counts_equal_positions_over_the_longer_answer():
    dense = samples(answer_tokens=[[1, 2, 3], [1], [], None])
    sparse = samples(answer_tokens=[[1, 9, 3, 4], [], [], [1]])
    top, bottom = pairs(quality("agreement"), sparse, dense)
    assert top[:3].tolist() == [2.0, 0.0, 0.0]
    assert bottom[:3].tolist() == [4.0, 1.0, 0.0]
    assert np.isnan(top[3])
    top, bottom = pairs(quality("agreement"), dense.slice(0, 3), dense.slice(0, 3))
    assert top.sum() / bottom.sum() == 1.0


def test_retention_of_a_likelihood_is_exp_of_its_loss():
    assert SCALES["nll"].retention(2.0 - np.log(0.99), 2.0) == pytest.approx(0.99)
    assert SCALES["loglikelihood"].retention(-2.0 + np.log(0.99), -2.0) == pytest.approx(0.99)
    assert SCALES["accuracy"].retention(0.4, 0.8) == pytest.approx(0.5)


def test_flops_by_hand():
    half = dict.fromkeys(("input", "gate", "up", "intermediate"), 0.5)
    assert ffn_flops_saved("input", half, gated=True) == pytest.approx(1 / 3)
    assert ffn_flops_saved("gate", half, gated=True) == pytest.approx(1 / 3)
    assert ffn_flops_saved("up", half, gated=True) == pytest.approx(1 / 3)
    assert ffn_flops_saved("intermediate", half, gated=True) == pytest.approx(1 / 6)
    assert ffn_flops_saved("all", half | {"input": 0.2}, gated=True) == pytest.approx((2 * 0.2 + 0.5) / 3)
    assert ffn_flops_saved("all", half, gated=False) == pytest.approx(0.5)
    assert ffn_flops_saved("gate", half, gated=False) is None
    assert ffn_flops_saved("all", {"input": 0.5}, gated=True) is None
