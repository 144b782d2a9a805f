"""Laws of critical sparsity: monotone in retention, between neighbours of the grid, blind to the order of items."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dllm_sparsity.analysis.critical import READINGS, readings
from dllm_sparsity.analysis.paired import paired_tests
from dllm_sparsity.analysis.qualities import SCALES
from dllm_sparsity.analysis.statistics import holm, mcnemar_exact, paired_error

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


MARKS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60)
SCORES = st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9), st.integers(1, 9)), min_size=3, max_size=40)


@given(MARKS, st.booleans(), st.randoms(use_true_random=False))
def test_swapping_two_cells_turns_the_sign_and_keeps_the_rest(marks, grouped, random):
    one, two = np.array(marks, float).T
    ones = np.ones(len(one))
    groups = np.unique([random.randrange(4) for _ in marks], return_inverse=True)[1] if grouped else None
    there, back = (
        paired_tests(first, [second], groups, draws=40)[0]
        for first, second in (((one, ones), (two, ones)), ((two, ones), (one, ones)))
    )
    assert there.difference == -back.difference
    np.testing.assert_allclose(there.interval, [-end for end in reversed(back.interval)], atol=1e-12)
    np.testing.assert_allclose([there.p, there.standard_error], [back.p, back.standard_error], rtol=1e-9, atol=1e-15)
    assert (there.smallest_detectable() is None) == (back.smallest_detectable() is None)
    if there.smallest_detectable() is not None:
        np.testing.assert_allclose(there.smallest_detectable(), back.smallest_detectable(), rtol=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_keeps_the_order_and_never_lowers(values):
    corrected = holm(values)
    assert all(raw <= own <= 1 for raw, own in zip(values, corrected, strict=True))
    ordered = [own for _, own in sorted(zip(values, corrected, strict=True))]
    assert ordered == sorted(ordered)
    assert min(corrected) == min(1.0, len(values) * min(values))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.001, 0.2))
def test_holm_rejects_what_its_definition_rejects(values, level):
    """Step down: reject the k-th smallest of m while it is at most level / (m - k + 1)."""
    left, rejected = sorted(values), 0
    while rejected < len(left) and left[rejected] * (len(left) - rejected) <= level:
        rejected += 1
    assert sum(own <= level for own in holm(values)) == rejected


@given(SCORES, st.integers(2, 6))
def test_errors_shrink_with_the_root_of_the_number_of_items(scores, times):
    one, two, tokens = np.array(scores).T
    once = paired_error((one, tokens), (two, tokens))
    many = paired_error(*((np.tile(own, times), np.tile(tokens, times)) for own in (one, two)))
    items = len(one)
    expected = np.sqrt((items - 1) * times / (items * times - 1) / times)
    np.testing.assert_allclose(many, once * expected, rtol=1e-6, atol=1e-12)


@given(SCORES)
def test_a_group_of_its_own_for_each_item_changes_nothing(scores):
    one, two, tokens = np.array(scores).T
    alone = paired_error((one, tokens), (two, tokens))
    np.testing.assert_allclose(
        paired_error((one, tokens), (two, tokens), np.arange(len(one))), alone, rtol=1e-9, atol=1e-15
    )


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_is_symmetric_and_a_probability(lost, gained):
    p = mcnemar_exact(lost, gained)
    assert p == mcnemar_exact(gained, lost)
    assert 0 < p <= 1
    assert (p == 1) or lost != gained


def test_the_smallest_detectable_difference_shrinks_like_one_over_root_n():
    rng = np.random.default_rng(11)
    one, two = rng.normal(size=(2, 300))
    ones = np.ones(300)
    small = paired_tests((one, ones), [(two, ones)], draws=4000)[0].smallest_detectable()
    tiled = (np.tile(own, 9) for own in (one, two))
    first, second = ((own, np.ones(2700)) for own in tiled)
    large = paired_tests(first, [second], draws=4000)[0].smallest_detectable()
    np.testing.assert_allclose(small / large, 3.0, rtol=0.06)
