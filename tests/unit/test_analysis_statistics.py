"""Statistics against closed forms and against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dllm_sparsity.analysis.statistics import (
    above_chance,
    holm,
    mcnemar_exact,
    paired_difference,
    percentile_interval,
    resampled_sums,
    smallest_detectable,
)


def test_bootstrap_standard_error_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(size=400)
    means = resampled_sums(values[:, None], draws=4000)[:, 0] / 400
    assert means.std() == pytest.approx(values.std() / np.sqrt(400), rel=0.05)
    assert means.mean() == pytest.approx(values.mean(), abs=0.005)


def test_chunks_and_columns_do_not_change_the_draws(monkeypatch):
    values = np.random.default_rng(1).normal(size=(50, 2))
    whole = resampled_sums(values, draws=30)
    monkeypatch.setattr("dllm_sparsity.analysis.statistics._CHUNK_ELEMENTS", 100)
    np.testing.assert_allclose(resampled_sums(values, draws=30), whole)
    np.testing.assert_allclose(resampled_sums(values[:, :1], draws=30), whole[:, :1])


def test_paired_interval_is_narrower_than_an_unpaired_one_and_covers_the_closed_form():
    rng = np.random.default_rng(2)
    first = (rng.random(800) < 0.7).astype(float)
    second = np.where(rng.random(800) < 0.04, 0.0, first)
    ones = np.ones(800)
    value, low, high = paired_difference((second, ones), (first, ones))
    assert value == pytest.approx(second.mean() - first.mean())
    error = (second - first).std() / np.sqrt(800)
    assert low == pytest.approx(value - 1.96 * error, abs=0.003)
    assert high == pytest.approx(value + 1.96 * error, abs=0.003)
    assert high - low < 2 * 1.96 * np.sqrt((first.var() + second.var()) / 800)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 1), (10, 10), (30, 12), (900, 1000)])
def test_mcnemar_is_the_binomial_test(lost, gained):
    expected = stats.binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert mcnemar_exact(lost, gained) == pytest.approx(expected)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_smallest_detectable_difference():
    assert smallest_detectable(1.0) == pytest.approx(stats.norm.ppf(0.975) + stats.norm.ppf(0.8))


def test_percentile_interval_leaves_nan_out():
    assert percentile_interval(np.array([np.nan, *range(101)], dtype=float)) == pytest.approx((2.5, 97.5))
    assert np.isnan(percentile_interval(np.array([np.nan]))).all()


def test_above_chance():
    assert not above_chance(0.27, 100, 0.25)
    assert above_chance(0.40, 100, 0.25)
    assert not above_chance(0.0, 100, 0.0)
