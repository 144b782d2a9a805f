"""Statistics against closed forms and against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dllm_sparsity.analysis.statistics import (
    above_chance,
    group_sums,
    holm,
    mcnemar_exact,
    paired_difference,
    paired_error,
    percentile_interval,
    resampled_sums,
    smallest_detectable,
    smallest_detectable_by_mcnemar,
    t_test,
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


@pytest.mark.parametrize("items", [6, 24, 500, 14042])
def test_six_lost_items_are_the_fewest_that_mcnemar_can_tell(items):
    least = smallest_detectable_by_mcnemar(items)
    assert stats.binom.sf(5, items, least) == pytest.approx(0.8)
    assert mcnemar_exact(5, 0) > 0.05 > mcnemar_exact(6, 0)
    assert smallest_detectable_by_mcnemar(5) is None


def test_percentile_interval_leaves_nan_out():
    assert percentile_interval(np.array([np.nan, *range(101)], dtype=float)) == pytest.approx((2.5, 97.5))
    assert np.isnan(percentile_interval(np.array([np.nan]))).all()


def test_above_chance():
    assert not above_chance(0.27, 100, 0.25)
    assert above_chance(0.40, 100, 0.25)
    assert not above_chance(0.0, 100, 0.0)
    assert not above_chance(0.01, 100, 0.0)  # one right answer in a hundred, where guessing gives none
    assert not above_chance(1.0, 1, 0.5)  # the accuracy's own error is zero there
    assert not above_chance(1.0, 2, 0.5)
    for items in (3, 10, 80):
        least = 0.5 + 2 * math.sqrt(0.25 / items)
        assert not above_chance(min(1.0, least - 0.01), items, 0.5)
        assert above_chance(least + 0.01, items, 0.5) or least >= 1


@pytest.mark.parametrize("degrees", [1, 2, 3, 10, 99, 5000, 10**6])
@pytest.mark.parametrize("ratio", [1e-9, 0.01, 0.5, 1.0, 2.0, 3.0, 8.0, 30.0, 1000.0])
def test_t_test_is_students(ratio, degrees):
    expected = 2 * stats.t.sf(ratio, degrees)
    assert t_test(-ratio * 0.1, 0.1, degrees) == pytest.approx(expected, rel=1e-8, abs=1e-300)


def test_t_test_without_spread_or_degrees():
    assert t_test(0.0, 0.0, 5) == 1.0
    assert t_test(0.3, 0.0, 5) == 0.0
    assert np.isnan(t_test(0.3, 0.1, 0))
    assert np.isnan(t_test(0.3, np.nan, 5))


def test_paired_t_of_means_is_scipys():
    rng = np.random.default_rng(3)
    first, second, ones = rng.normal(size=80), rng.normal(0.2, 1, size=80), np.ones(80)
    error = paired_error((first, ones), (second, ones))
    assert error == pytest.approx((first - second).std(ddof=1) / np.sqrt(80))
    assert t_test(first.mean() - second.mean(), error, 79) == pytest.approx(stats.ttest_rel(first, second).pvalue)


def test_clustered_error_is_the_textbook_formula():
    """SE^2 = (sum of d_i^2 + sum over pairs i != j of one group of d_i d_j) / n^2, d the deviations, times G / (G - 1)."""
    rng = np.random.default_rng(4)
    groups = rng.integers(0, 9, 60)
    groups = np.unique(groups, return_inverse=True)[1]
    values, ones = rng.normal(size=60) + rng.normal(size=9)[groups], np.ones(60)
    deviations = values - values.mean()
    same = groups[:, None] == groups[None, :]
    variance = (deviations[:, None] * deviations[None, :] * same).sum() / 60**2
    zero = np.zeros(60)
    assert paired_error((values, ones), (zero, ones), groups) == pytest.approx(np.sqrt(variance * 9 / 8))
    assert paired_error((values, ones), (zero, ones), np.arange(60)) == pytest.approx(values.std(ddof=1) / np.sqrt(60))


def test_equal_groups_are_one_observation_each():
    """Groups of one size: the clustered error is that of the mean of the groups' means."""
    rng = np.random.default_rng(5)
    values = rng.normal(size=(25, 8)) + rng.normal(size=(25, 1))
    flat, ones, zero = values.ravel(), np.ones(200), np.zeros(200)
    groups = np.repeat(np.arange(25), 8)
    error = paired_error((flat, ones), (zero, ones), groups)
    assert error == pytest.approx(values.mean(1).std(ddof=1) / 5)
    assert error > 1.5 * paired_error((flat, ones), (zero, ones))
    drawn = resampled_sums(np.column_stack([flat, ones]), draws=4000, groups=groups)
    assert (drawn[:, 0] / drawn[:, 1]).std() == pytest.approx(error * np.sqrt(24 / 25), rel=0.05)


def test_error_of_a_ratio_is_that_of_its_bootstrap():
    rng = np.random.default_rng(6)
    tokens = rng.integers(2, 30, 500).astype(float)
    first, second = tokens * rng.normal(2.0, 0.3, 500), tokens * rng.normal(2.1, 0.3, 500)
    sums = resampled_sums(np.column_stack([first, second, tokens]), draws=4000)
    drawn = (sums[:, 0] - sums[:, 1]) / sums[:, 2]
    assert paired_error((first, tokens), (second, tokens)) == pytest.approx(drawn.std(), rel=0.05)


def test_group_sums_by_hand():
    columns = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert group_sums(columns, np.array([0, 1, 0])).tolist() == [[6.0, 8.0], [3.0, 4.0]]


def _covers(value, low, high):
    return low <= value <= high


def test_bootstrap_interval_covers_a_normal_mean_in_95_of_100():
    rng = np.random.default_rng(7)
    ones, trials = np.ones(120), 400
    drawn = [(rng.normal(0.3, 1.0, 120), rng.normal(0.0, 1.0, 120)) for _ in range(trials)]
    intervals = [paired_difference((a, ones), (b, ones), draws=400, seed=n)[1:] for n, (a, b) in enumerate(drawn)]
    share = np.mean([_covers(0.3, *interval) for interval in intervals])
    assert abs(share - 0.95) < 3 * np.sqrt(0.95 * 0.05 / trials)


def test_only_the_cluster_bootstrap_covers_where_items_share_a_group():
    rng = np.random.default_rng(8)
    groups, ones, zero, trials = np.repeat(np.arange(60), 6), np.ones(360), np.zeros(360), 300
    shares = {}
    worlds = [rng.normal(size=60)[groups] + rng.normal(size=360) for _ in range(trials)]
    for name, used in (("clustered", groups), ("plain", None)):
        found = [
            paired_difference((values, ones), (zero, ones), 300, seed, used)[1:] for seed, values in enumerate(worlds)
        ]
        shares[name] = np.mean([_covers(0.0, *interval) for interval in found])
    assert shares["clustered"] > 0.91
    assert shares["plain"] < 0.80
