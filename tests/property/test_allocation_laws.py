"""Laws of the allocation: on convex losses that add up it is the best there is, and never worse than uniform."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_sparsity.analysis.allocation import allocate, path_of
from dllm_sparsity.analysis.slopes import Sensitivity, Slope, slopes_of

EASY = settings(max_examples=80, deadline=None)


@st.composite
def convex_layers(draw, layers=3, points=3):
    made = []
    for _ in range(draw(st.integers(1, layers))):
        runs = np.array(draw(st.lists(st.integers(1, 20), min_size=points, max_size=points)), dtype=float)
        prices = sorted(draw(st.lists(st.integers(0, 50), min_size=points, max_size=points)))
        dropped, losses = (np.concatenate([[0.0], np.cumsum(own)]) for own in (runs, runs * prices / 100))
        made.append(Slope(dropped, losses, np.linspace(1, 0, points + 1)))
    return made


@EASY
@given(convex_layers())
def test_no_choice_of_strengths_drops_more_for_its_loss(slopes: list[Slope]) -> None:
    found = allocate(slopes)
    for choice in itertools.product(*(range(len(slope.dropped)) for slope in slopes)):  # uniform ones among them
        loss = sum(slope.losses[n] for slope, n in zip(slopes, choice, strict=True))
        dropped = sum(slope.dropped[n] for slope, n in zip(slopes, choice, strict=True))
        assert found.most(loss + 1e-9) >= dropped - 1e-6 * (1 + dropped)


@EASY
@given(convex_layers(), st.floats(0, 1))
def test_a_point_of_the_path_keeps_its_promise(slopes: list[Slope], share: float) -> None:
    found = allocate(slopes)
    dropped = share * found.dropped[-1]
    own = [np.interp(dropped, found.dropped, column) for column in found.shares.T]
    assert np.isclose(sum(own), dropped)
    loss = sum(np.interp(x, slope.dropped, slope.losses) for x, slope in zip(own, slopes, strict=True))
    assert np.isclose(loss, np.interp(dropped, found.dropped, found.losses))
    assert found.most(loss + 1e-9) >= dropped - 1e-6 * (1 + dropped)


STRENGTHS = (0.8, 0.5, 0.3, 0.1)


@EASY
@given(
    st.lists(
        st.tuples(
            st.lists(st.floats(0.01, 0.95), min_size=4, max_size=4, unique=True),
            st.lists(st.floats(-0.1, 2), min_size=4, max_size=4),
            st.lists(st.floats(0, 0.5), min_size=4, max_size=4),
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([0.0, 0.005]),
)
def test_whatever_was_measured_the_path_goes_from_dense_to_the_end(rows: list, natural: float) -> None:
    layers = [
        Sensitivity((n,), STRENGTHS, tuple(sorted(places)), tuple(losses), tuple(errors), 100.0, natural)
        for n, (places, losses, errors) in enumerate(rows)
    ]
    slopes = slopes_of(layers, 1.0)
    for slope in slopes:
        assert (np.diff(slope.losses) >= -1e-9).all()
        assert (np.diff(np.diff(slope.losses) / np.diff(slope.dropped)) >= -1e-6).all()
    table = np.array(path_of(allocate(slopes), 100.0 * len(layers) * (1 - natural), 0.0))
    assert (table[0] == 1).all()
    assert (table[-1] == 0).all()
    assert (np.diff(table, axis=0) <= 1e-9).all()


PLACES = np.array([0.5, 0.7, 0.85, 0.97])


def measured(scales, error, rng=None):
    noise = np.zeros((len(scales), 4)) if rng is None else rng.normal(size=(len(scales), 4)) * error
    return [
        Sensitivity((n,), STRENGTHS, tuple(PLACES), tuple(own), (error,) * 4, 100.0)
        for n, own in enumerate(np.outer(scales, PLACES**4) + noise)
    ]


@EASY
@given(st.lists(st.floats(0.05, 20), min_size=2, max_size=8))
def test_what_is_measured_without_error_is_believed(scales: list[float]) -> None:
    for own, slope in zip(measured(scales, 0.0), slopes_of(measured(scales, 0.0), 1.0), strict=True):
        found = np.interp(PLACES * 100, slope.dropped, slope.losses)
        np.testing.assert_allclose(found, own.losses, rtol=0.02, atol=0.01 * max(scales))  # no layer is free


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_what_noise_alone_tells_apart_is_drawn_together(seed: int) -> None:
    def spread(table):
        row = np.array(table)[len(table) // 2]
        return row.max() - row.min()

    rng = np.random.default_rng(seed)
    alike = spread(path_of(allocate(slopes_of(measured([1.0] * 8, 0.2, rng), 1.0)), 800.0, 0.0))
    apart = spread(path_of(allocate(slopes_of(measured([0.2] * 4 + [5.0] * 4, 0.2, rng), 1.0)), 800.0, 0.0))
    assert alike < apart
