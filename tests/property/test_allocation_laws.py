"""Laws of the allocation: on convex losses that add up it is the best there is, and never worse than uniform."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_sparsity.analysis.allocation import Sensitivity, allocate, path_of, slope_of

EASY = settings(max_examples=80, deadline=None)


@st.composite
def convex_layers(draw, layers=3, points=3):
    made = []
    for layer in range(draw(st.integers(1, layers))):
        steps = draw(st.lists(st.integers(1, 20), min_size=points, max_size=points))
        rises = sorted(draw(st.lists(st.integers(0, 50), min_size=points, max_size=points)))
        sparsity = np.cumsum(steps) / (sum(steps) + draw(st.integers(0, 10)))
        losses = np.cumsum(np.array(rises) * np.array(steps)) / 100
        strengths = tuple(round(1 - 0.3 * (n + 1), 3) for n in range(points))
        total = float(draw(st.integers(1, 5)) * 100)
        made.append(Sensitivity((layer,), strengths, tuple(sparsity), tuple(losses), (0.0,) * points, total))
    return made


@EASY
@given(convex_layers())
def test_convex_losses_come_back_as_they_are(layers: list[Sensitivity]) -> None:
    for own in layers:
        slope = slope_of(own, 1.0)
        np.testing.assert_allclose(slope.losses[1:], own.losses, atol=1e-6)
        np.testing.assert_allclose(slope.dropped[1:], np.array(own.sparsity) * own.total)


@EASY
@given(convex_layers())
def test_no_choice_of_strengths_drops_more_for_its_loss(layers: list[Sensitivity]) -> None:
    slopes = [slope_of(own, 1.0) for own in layers]
    found = allocate(slopes)
    for choice in itertools.product(*(range(len(slope.dropped)) for slope in slopes)):  # uniform ones among them
        loss = sum(slope.losses[n] for slope, n in zip(slopes, choice, strict=True))
        dropped = sum(slope.dropped[n] for slope, n in zip(slopes, choice, strict=True))
        assert found.most(loss + 1e-9) >= dropped - 1e-6 * (1 + dropped)


@EASY
@given(convex_layers(), st.floats(0, 1))
def test_a_point_of_the_path_keeps_its_promise(layers: list[Sensitivity], share: float) -> None:
    slopes = [slope_of(own, 1.0) for own in layers]
    found = allocate(slopes)
    dropped = share * found.dropped[-1]
    own = [np.interp(dropped, found.dropped, column) for column in found.shares.T]
    assert np.isclose(sum(own), dropped)
    loss = sum(np.interp(x, slope.dropped, slope.losses) for x, slope in zip(own, slopes, strict=True))
    assert np.isclose(loss, np.interp(dropped, found.dropped, found.losses))
    assert found.most(loss + 1e-9) >= dropped - 1e-6 * (1 + dropped)


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
    strengths = (0.8, 0.5, 0.3, 0.1)
    layers = [
        Sensitivity((n,), strengths, tuple(sorted(places)), tuple(losses), tuple(errors), 100.0, natural)
        for n, (places, losses, errors) in enumerate(rows)
    ]
    slopes = [slope_of(own, 1.0) for own in layers]
    for slope in slopes:
        assert (np.diff(slope.losses) >= -1e-9).all()
        assert (np.diff(np.diff(slope.losses) / np.diff(slope.dropped)) >= -1e-9).all()
    table = np.array(path_of(allocate(slopes), 100.0 * len(layers) * (1 - natural), 0.0))
    assert (table[0] == 1).all()
    assert (table[-1] == 0).all()
    assert (np.diff(table, axis=0) <= 0).all()
