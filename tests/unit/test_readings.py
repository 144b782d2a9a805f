"""What a search answered, read as a curve's critical sparsity, and compared between paradigms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from test_analysis_clusters import make_cell, width

from dllm_sparsity.analysis.comparison import comparisons
from dllm_sparsity.analysis.curves import curves_of

HALF = 0.03


def searched_curve(paradigm, value):
    names = ("paradigm", "model", "task", "rule", "site", "layers", "rule_parameters")
    answer = dict(zip(names, (paradigm, paradigm, "t", "top_p", "input", None, {}), strict=True))
    answer |= {"retention": 0.99, "quality": "nll", "value": value, "interval": [value - HALF, value + HALF]}
    answer |= {"censored": False, "reason": None, "items": 40}
    dense = np.random.default_rng(0).normal(3.0, 0.5, 40)
    cells = [
        make_cell(0, dense, None, paradigm=paradigm, searches=(answer,)),
        make_cell(2, dense + 0.1, None, paradigm=paradigm, sparsity=0.5),
    ]
    cells[1].record["parts"] = {"block": [0, 40]}
    (curve,), _ = curves_of(cells)
    return curve


def test_two_answers_on_the_same_items_do_not_share_their_draws():
    first, second = searched_curve("autoregressive", 0.4), searched_curve("diffusion", 0.5)
    for curve in (first, second):
        assert np.quantile(curve.reading().draws, [0.025, 0.975]) == pytest.approx(curve.reading().interval, abs=0.004)
    (pair,) = comparisons([first, second], (0.99,))
    assert not pair.paired
    assert pair.difference == pytest.approx(0.1)
    assert width(pair.interval) == pytest.approx(2 * math.sqrt(2) * HALF, rel=0.1)
