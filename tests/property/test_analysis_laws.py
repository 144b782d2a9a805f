"""Laws of critical sparsity: monotone in retention, between neighbours of the grid, blind to the order of items."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dllm_sparsity.analysis.critical import READINGS, readings
from dllm_sparsity.analysis.qualities import SCALES

SHARES = st.floats(0.0, 1.0, allow_nan=False)
CURVES = st.lists(st.tuples(SHARES, st.floats(0.01, 1.0)), min_size=1, max_size=8)


def arrays(curve, dense):
    sparsity, quality = zip((0.0, dense), *curve, strict=True)
    return np.array(sparsity), np.array(quality)


@given(CURVES, st.floats(0.01, 1.0), st.floats(0.5, 0.999), st.floats(0.5, 0.999), st.booleans())
def test_keeping_more_never_allows_more_sparsity(curve, dense, first, second, logarithmic):
    sparsity, quality = arrays(curve, dense)
    loose, _ = readings(sparsity, quality, min(first, second), logarithmic)
    strict, _ = readings(sparsity, quality, max(first, second), logarithmic)
    for name in READINGS:
        assert strict[name] <= loose[name] + 1e-9


@given(CURVES, st.floats(0.01, 1.0), st.floats(0.5, 0.999), st.booleans())
def test_readings_are_ordered_and_on_the_grid(curve, dense, retention, logarithmic):
    sparsity, quality = arrays(curve, dense)
    values, censored = readings(sparsity, quality, retention, logarithmic)
    for name in ("grid_max", "first_crossing", "max_normalised"):
        assert values[name] in sparsity
    assert values["first_crossing"] <= values["grid_max"]
    following = np.sort(sparsity)[np.searchsorted(np.sort(sparsity), values["first_crossing"], side="right") :]
    assert values["first_crossing"] <= values["interpolated"]
    if following.size and not censored["interpolated"]:
        assert values["interpolated"] <= following[0] + 1e-12
    if censored["grid_max"]:
        assert set(map(float, values.values())) >= {float(sparsity.max())}


@given(CURVES, st.floats(0.01, 1.0), st.randoms(use_true_random=False))
def test_order_of_points_is_free(curve, dense, random):
    shuffled = list(dict(curve).items())
    ordered = list(shuffled)
    random.shuffle(shuffled)
    first, _ = readings(*arrays(ordered, dense), 0.99, logarithmic=False)
    second, _ = readings(*arrays(shuffled, dense), 0.99, logarithmic=False)
    for name in READINGS:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-9)


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(1, 9)), min_size=1, max_size=30), st.randoms())
def test_a_quality_does_not_see_the_order_of_items(items, random):
    shuffled = list(items)
    random.shuffle(shuffled)
    first, second = (np.array(order, float).sum(0) for order in (items, shuffled))
    np.testing.assert_allclose(first[0] / first[1], second[0] / second[1], rtol=1e-12)


@given(st.sampled_from(sorted(SCALES)), st.floats(0.05, 3.0), st.floats(0.05, 3.0), st.floats(0.9, 0.999))
def test_retention_and_threshold_agree(kind, dense, quality, retention):
    scale = SCALES[kind]
    height = np.array([scale.sign * dense, scale.sign * quality])
    values, _ = readings(np.array([0.0, 0.5]), height, retention, scale.logarithmic)
    kept = float(scale.retention(quality, dense))
    if abs(kept - retention) > 1e-9:
        assert (values["grid_max"] == 0.5) == (kept > retention)
