"""The four readings of critical sparsity on curves whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from dllm_sparsity.analysis.critical import READINGS, readings


def read(sparsity, quality, retention=0.99, logarithmic=False):
    values, censored = readings(np.array(sparsity, float), np.array(quality, float), retention, logarithmic)
    return {name: float(values[name]) for name in READINGS}, {name: bool(censored[name]) for name in READINGS}


def test_a_falling_curve():
    values, censored = read([0.0, 0.2, 0.4, 0.6], [0.80, 0.80, 0.796, 0.70])
    assert values["grid_max"] == values["first_crossing"] == values["max_normalised"] == 0.4
    assert values["interpolated"] == pytest.approx(0.4 + 0.2 * (0.796 - 0.792) / 0.096)
    assert not any(censored.values())


def test_a_curve_that_falls_and_comes_back():
    values, _ = read([0.0, 0.2, 0.4, 0.6, 0.8], [0.8, 0.8, 0.7, 0.8, 0.1])
    assert values["grid_max"] == 0.6
    assert values["first_crossing"] == 0.2
    assert values["interpolated"] == pytest.approx(0.2 + 0.2 * 0.08)


def test_the_best_point_as_reference():
    values, _ = read([0.0, 0.2, 0.4], [0.80, 0.90, 0.80])
    assert values["grid_max"] == 0.4
    assert values["max_normalised"] == 0.2


def test_no_failing_point_is_censored():
    values, censored = read([0.0, 0.2, 0.4], [0.8, 0.8, 0.8])
    assert set(values.values()) == {0.4}
    assert all(censored.values())


def test_every_sparse_point_fails():
    values, _ = read([0.0, 0.2, 0.4], [0.8, 0.4, 0.4])
    assert values["grid_max"] == values["first_crossing"] == 0.0
    assert values["interpolated"] == pytest.approx(0.2 * 0.008 / 0.4)


def test_order_of_the_points_is_free():
    assert read([0.0, 0.6, 0.2, 0.4], [0.8, 0.7, 0.8, 0.796]) == read([0.0, 0.2, 0.4, 0.6], [0.8, 0.8, 0.796, 0.7])


def test_a_threshold_met_exactly_passes():
    assert read([0.0, 0.5], [0.8, 0.8 * 0.99])[0]["grid_max"] == 0.5


def test_a_likelihood_is_compared_in_nats():
    nll = np.array([2.0, 2.005, 2.02, 2.5])
    values, _ = read([0.0, 0.3, 0.5, 0.7], -nll, logarithmic=True)
    assert values["grid_max"] == 0.3
    assert values["interpolated"] == pytest.approx(0.3 + 0.2 * (-np.log(0.99) - 0.005) / 0.015)


def test_draws_are_read_row_by_row():
    sparsity = np.array([[0.0, 0.2, 0.4], [0.0, 0.3, 0.1]])
    height = np.array([[0.8, 0.8, 0.1], [0.8, 0.1, 0.8]])
    values, _ = readings(sparsity, height, 0.99, logarithmic=False)
    assert values["first_crossing"].tolist() == [0.2, 0.1]
