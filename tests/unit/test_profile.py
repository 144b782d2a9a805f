"""The curve that a search reads its answer from: its points, its errors, and what one more strength would tell."""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest

from dllm_sparsity.analysis import profile as profiles
from dllm_sparsity.analysis import spline
from dllm_sparsity.analysis.catalogue import WORLDS
from dllm_sparsity.analysis.column import Column, Threshold
from dllm_sparsity.analysis.critical import PAPER_GRID
from dllm_sparsity.analysis.margins import margins
from dllm_sparsity.analysis.profile import _anywhere, _corners, profile
from dllm_sparsity.analysis.spline import Smooth, smooth

BY_NAME = {world.name: world for world in WORLDS}


def column(quality, sparsity, items=64):
    ones = np.ones(items)
    return Column(np.full(items, quality), ones, ones * (1 - sparsity), ones)


def test_a_profile_without_noise_reads_the_crossing():
    sparse = [column(-2.0 - 0.1 * own, own) for own in (0.05, 0.1, 0.2, 0.4)]
    found = profile(column(-2.0, 0.0), sparse, Threshold(0.99, logarithmic=True, bounded=False))
    assert found.estimate == pytest.approx(-np.log(0.99) / 0.1, abs=1e-4)
    assert found.width < 0.003
    assert found.crosses
    assert found.fails


def test_a_smooth_curve_keeps_to_sure_points_and_doubts_the_gaps():
    place, height = np.array([0.0, 0.2, 0.5, 0.6]), np.array([0.01, 0.009, -0.002, -0.01])
    found = smooth(place, height, np.zeros((4, 4)), np.array([0.0, 0.2, 0.35, 0.5, 0.55, 0.6]))
    value, error = found.value, found.error
    np.testing.assert_allclose(value[[0, 1, 3, 5]], height, atol=1e-5)
    assert error[2] > error[4] > 10 * error[3]


def test_the_noise_of_a_curve_is_how_it_scatters(monkeypatch):
    monkeypatch.setattr(spline, "_BENDS", np.array([300.0]))
    monkeypatch.setattr(spline, "_HASTES", (0.5,))
    place, height = np.array([0.0, 0.2, 0.5, 0.6]), np.array([0.01, 0.009, -0.002, -0.01])
    covariance = 1e-6 * np.array([[0.1, 0, 0, 0], [0, 2, 1, 0], [0, 1, 4, 2], [0, 0, 2, 9]])
    mesh = np.linspace(0, 0.7, 8)
    drawn = np.random.default_rng(0).multivariate_normal(height, covariance, 2000)
    values = np.stack([smooth(place, own, covariance, mesh).value for own in drawn])
    found = smooth(place, height, covariance, mesh)
    np.testing.assert_allclose(found.noise, values.std(0), rtol=0.06)
    assert (found.noise <= found.error).all()


def test_a_steep_end_does_not_leave_the_crossing_unsure():
    world, widths = BY_NAME["accuracy, steep"], []
    for seed in range(4):
        sample = world.draw(seed)
        dense, *sparse = (sample.column(1 - p, 0, world.items) for p in PAPER_GRID)
        widths.append(profile(dense, sparse, world.threshold).width)
    assert np.mean(widths) < 0.075  # 0.084 where the end bends the whole curve


def test_a_cliff_between_two_strengths_may_be_anywhere_between_them():
    world, held = BY_NAME["accuracy, cliff"], 0
    designs = ((0.05, 2000), (0.15, 1000), (0.3, 1000), (0.5, 1000), (0.75, 1000), (0.875, 800), (1.0, 64))
    for seed in range(12):
        sample = world.draw(seed)
        sparse = [sample.column(strength, 0, items) for strength, items in designs]
        low, high = profile(sample.column(0.0, 0, world.items), sparse, world.threshold, ended=True).interval
        held += low <= world.truth()[0] <= high
    assert held >= 11  # 2 where the curve may bend but thirty times as much behind its corner


def test_ways_to_bend_that_nothing_speaks_for_do_not_widen_a_curve(monkeypatch):
    place, height = np.array([0.0, 0.2, 0.5, 0.6]), np.array([0.01, 0.009, -0.002, -0.01])
    mesh, covariance = np.linspace(0, 0.7, 29), 1e-6 * np.eye(4)
    found = smooth(place, height, covariance, mesh, corners=[0.2])
    monkeypatch.setattr(spline, "_SLIGHT", 0.0)
    whole = smooth(place, height, covariance, mesh, corners=[0.2])
    np.testing.assert_allclose(found.value, whole.value, atol=1e-4)
    assert (found.error <= whole.error + 1e-4).all()
    assert (whole.error[1:] / found.error[1:]).max() > 1.2


def test_the_score_of_one_way_to_bend_is_its_curve_in_standard_errors(monkeypatch):
    monkeypatch.setattr(spline, "_BENDS", np.array([300.0]))
    monkeypatch.setattr(spline, "_HASTES", (0.5,))
    place, height = np.array([0.0, 0.2, 0.5, 0.6]), np.array([0.01, 0.009, -0.002, -0.01])
    found = smooth(place, height, 1e-6 * np.eye(4), np.linspace(0, 0.7, 29))
    np.testing.assert_allclose(found.score(), found.value / found.error, rtol=1e-9)
    wider = np.sqrt(found.error**2 + 3 * found.noise**2)
    np.testing.assert_allclose(found.score(4.0), found.value / wider, rtol=1e-9)


def test_the_score_of_ways_that_disagree_is_that_of_their_chances():
    weight, mean = np.array([0.9, 0.1]), np.array([[-6.0], [0.0]])
    curve = Smooth(np.zeros(1), weight, mean, np.ones((2, 1)), np.zeros((2, 1)), np.zeros((2, 0)), np.zeros((1, 0)))
    chance = 0.9 * NormalDist().cdf(-6) + 0.1 * NormalDist().cdf(0)
    assert curve.score()[0] == pytest.approx(NormalDist().inv_cdf(chance))
    assert curve.value[0] / curve.error[0] < -1.96 < curve.score()[0]  # one normal as wide as both is told from zero


def test_the_chance_to_come_out_low_anywhere_is_that_of_a_known_process(monkeypatch):
    monkeypatch.setattr(profiles, "_CROSSINGS", 1.0)  # each of these waves falls short once
    angle = np.linspace(0, 2.0, 401)
    along = np.cos(np.diff(angle))[None]
    flat, whole = np.zeros((1, 401)), np.ones((1, 401))
    curve = Smooth(angle, np.ones(1), flat, whole, whole, along, np.zeros((401, 0)))
    np.testing.assert_allclose(curve.arc, np.diff(angle, prepend=0.0), atol=1e-9)
    waves = np.random.default_rng(0).normal(size=(20_000, 2)) @ np.stack([np.cos(angle), np.sin(angle)])
    for low in (-1.7, -2.3):
        chance = NormalDist().cdf(_anywhere(curve, np.full(401, low))[-1])
        assert (waves.min(1) < low).mean() == pytest.approx(chance, abs=0.006)
    sure = _anywhere(curve, np.append(np.full(400, 9.0), -2.0))[-1]
    assert sure == pytest.approx(-2.0, abs=0.05)  # what surely holds tells nothing


def test_a_long_stretch_on_the_threshold_is_seldom_taken_for_a_miss():
    place, rng = np.linspace(0, 0.6, 9), np.random.default_rng(0)
    covariance, mesh, missed = np.diag([1e-12] + [1e-6] * 8), np.linspace(0, 0.6, 97), 0
    for _ in range(300):
        height = np.append(0.003, rng.normal(0, 1e-3, 8))
        curve = smooth(place, height, covariance, mesh)
        score = curve.score()
        missed += (_anywhere(curve, score) < NormalDist().inv_cdf(0.05)).any()
    assert missed <= 22  # 5 % and two standard errors; 29 by the score alone, at half that rate


def test_a_strength_that_lost_few_by_luck_weighs_less():
    world = BY_NAME["accuracy, few easy items, fails at once"]
    items, sample = world.items, world.draw(18)
    sparse = [sample.column(strength, 0, most) for strength, most in ((0.02, 444), (0.05, 388), (0.3, 64))]
    points = margins(sample.column(0.0, 0, items), sparse, world.threshold)
    before, after = (np.sqrt(np.diag(own.covariance)) for own in (points, points.supposed(np.zeros(4))))
    lucky = points.margin > 0
    assert lucky.tolist() == [True, True, False, False]
    np.testing.assert_array_equal(after[[0, 2, 3]], before[[0, 2, 3]])  # dense, and what came out low
    lost = 444 * (points.margin[0] - points.margin[1])
    assert lost < 1  # 4.4 in the mean
    assert before[1] < 0.5 * after[1] < 0.5 * np.sqrt(points.margin[0] / 444)
    nll = replace(points, _threshold=Threshold(0.99, logarithmic=True, bounded=False))
    assert nll.supposed(np.zeros(4)) is nll


def test_a_dip_that_comes_back_is_not_where_a_cliff_begins():
    def corners(margin):
        place, few = np.linspace(0, 0.8, len(margin)), np.eye(len(margin))
        points = SimpleNamespace(place=place, margin=np.array(margin), covariance=1e-6 * few)
        return [round(own, 3) for own in _corners(points)]

    assert corners([0.01, 0.0055, 0.01, 0.01, 0.0055, 0.0055, -0.1, -0.2, -0.3]) == [0.3, 0.5]
    assert corners([0.01, 0.0055, 0.01, -0.1]) == [0.533]
    assert corners([0.01, -0.1, -0.2]) == [0.0]
    assert corners([0.01, 0.002, 0.002, 0.002, -0.1]) == [0.0, 0.6]  # much is lost early, and nothing more for long
    assert corners([0.01, 0.01, 0.01]) == []


def test_an_end_that_no_strength_lies_near_is_unseen():
    sparse = [column(-2.0 - 0.1 * own, own) for own in (0.05, 0.1, 0.2, 0.4)]
    found = profile(column(-2.0, 0.0), sparse, Threshold(0.99, logarithmic=True, bounded=False))
    points, wide = found.points, {"estimate": 0.15, "low": 0.1, "high": 0.2}
    assert replace(found, points=points, **wide).unseen is None
    assert replace(found, points=points, **wide | {"high": 0.18}).unseen == 0.18
    assert replace(found, points=points, **wide | {"low": 0.12}).unseen == 0.12
    assert replace(found, points=points[points < 0.2], **wide).unseen is None  # nothing lies beyond


def test_a_gap_below_a_sure_strength_is_not_a_miss():
    world = BY_NAME["accuracy, easy items, 98 % kept"]
    for seed in range(8):
        sample = world.draw(seed)
        sparse = [sample.column(strength, 0, items) for strength, items in ((0.05, 1500), (0.25, 1500), (0.5, 200))]
        assert profile(sample.column(0.0, 0, 1500), sparse, world.threshold).low > 0.15  # 15.8 % holds beyond doubt


def test_nothing_is_asked_of_what_lies_behind_a_sure_miss():
    sparse = [column(-2.0 - 0.1 * own, own) for own in (0.05, 0.1, 0.2, 0.4)]
    found = profile(column(-2.0, 0.0), sparse, Threshold(0.99, logarithmic=True, bounded=False))
    mesh = np.linspace(0, 1, 101)
    value = np.where(mesh < 0.2, 1.0, np.where(mesh < 0.3, -1.0, 0.0))
    narrow = np.full((1, 101), 0.04)
    curve = Smooth(mesh, np.ones(1), value[None], narrow, narrow, np.zeros((1, 100)), np.zeros((101, 0)))
    assert replace(found, low=0.1, high=1.0, curve=curve).doubt() < 0.01
    assert replace(found, low=0.1, high=1.0, curve=replace(curve, mean=np.abs(value)[None])).doubt() > 0.1


def test_a_profile_that_never_fails_is_one_sided():
    sparse = [column(-2.0, 0.2), column(-2.0, 0.9)]
    found = profile(column(-2.0, 0.0), sparse, Threshold(0.99, logarithmic=True, bounded=False), ended=True)
    assert (found.crosses, found.fails) == (False, False)
    assert found.estimate == pytest.approx(0.9)


def test_items_that_happen_to_agree_are_not_certain():
    found = profile(column(1.0, 0.0), [column(1.0, 0.5)], Threshold(0.99, logarithmic=False, bounded=True))
    assert found.low < 0.5


def test_a_strength_on_the_first_items_counts_by_its_difference():
    rng = np.random.default_rng(0)
    level, ones = rng.normal(2, 1, 400), np.ones(400)
    dense, near = Column(-level, ones, ones, ones), Column(-level - 0.004, ones, ones * 0.6, ones)
    far = Column(-level - 0.024, ones, ones * 0.5, ones).first(100)
    found = profile(dense, [near, far], Threshold(0.99, logarithmic=True, bounded=False))
    margins = -np.log(0.99) - np.array([0, 0.004, 0.024])
    np.testing.assert_allclose(found.margins, margins, atol=1e-12)
    assert found.errors.max() < 1e-12


def test_groups_are_counted_together():
    rng = np.random.default_rng(0)
    ones, loss = np.ones(400), rng.normal(0.01, 0.02, 100)
    dense = Column(-2 * ones, ones, ones, ones, np.arange(400) // 4)
    sparse = Column(-2 - np.repeat(loss, 4), ones, ones * 0.5, ones)
    threshold = Threshold(0.99, logarithmic=True, bounded=False)
    found = profile(dense, [sparse], threshold)
    alone = profile(Column(dense.height, ones, ones, ones), [sparse], threshold)
    assert found.errors[1] == pytest.approx(loss.std() / 10, rel=0.05)
    assert found.errors[1] == pytest.approx(2 * alone.errors[1])


def test_one_group_is_not_surer_than_its_items():
    rng = np.random.default_rng(0)
    ones, right = np.ones(64), (rng.uniform(size=64) > 0.1).astype(float)
    threshold = Threshold(0.99, logarithmic=False, bounded=True)
    errors = [
        profile(Column(ones, ones, ones, ones, group), [Column(right, ones, ones * 0.5, ones, group)], threshold).errors
        for group in (np.zeros(64, dtype=np.int64), None)
    ]
    assert errors[0][1] >= errors[1][1] > 0.01  # of one group alone nothing is seen to vary


def test_items_that_were_measured_near_by_tell_less_than_new_ones():
    sample = BY_NAME["accuracy, 95 % kept"].draw(0)
    dense = sample.column(0.0, 0, 1000)
    sparse = [sample.column(strength, 0, 500) for strength in (0.1, 0.3, 0.5, 0.8)]
    threshold = sample.world.threshold
    old, new = (profile(dense, sparse, threshold, block=block) for block in (range(500), range(500, 1000)))
    assert old.doubt() == new.doubt()
    near = int(np.abs(new.candidates - old.points[3]).argmin())
    assert new.doubt(near) < old.doubt(near) < old.doubt()


def test_a_sample_of_items_takes_those_that_are_there():
    numbers = np.array([5, 2, 9])
    own = Column(numbers * 1.0, np.ones(3), np.ones(3), np.ones(3), item=numbers)
    drawn = own.drawn(np.array([9, 1, 5, 9]))
    assert drawn.height.tolist() == [9, 5, 9]
    assert drawn.items.tolist() == [0, 2, 3]
