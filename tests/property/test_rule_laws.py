"""Laws that masks obey whatever the row holds."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dllm_sparsity import registry
from dllm_sparsity.sparsity.rule import Where
from dllm_sparsity.sparsity.rules.top_p import TopP

ENTRIES = st.one_of(
    st.floats(-1000, 1000, width=32, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-6),
    st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0]),
)
ROWS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12), elements=ENTRIES)
SHARES = st.floats(0, 1)
NORMAL = SHARES.filter(lambda p: p == 0 or p > 1e-20)  # a smaller one of a small entry underflows
RULES = st.sampled_from(registry.names("rules"))
EASY = settings(max_examples=120, deadline=None)


def kept(rule: object, rows: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(rows.copy())
    return rule.keep(tensor, Where(0, "input", None, torch.zeros(len(tensor), dtype=torch.long), None))


def made(name: str, share: float) -> object:
    cls = registry.get("rules", name)
    return cls(max(share, 1e-3) if cls.open_low else share)


@EASY
@given(ROWS, SHARES, st.sampled_from([1.0, 2.0, 0.5]), st.sampled_from(["keep", "minimal"]))
def test_top_p_keeps_the_mass_and_no_smaller_prefix_does(rows: np.ndarray, p: float, power: float, ties: str) -> None:
    mask = kept(TopP(p, power=power, ties=ties), rows).numpy()
    for row, got in zip(np.abs(rows.astype(np.float64)), mask, strict=True):
        mass = (row / max(row.max(), 1e-300)) ** power
        assert got.any()
        assert mass[got].sum() >= p * mass.sum() * (1 - 1e-12)
        assert not got.all() or p > 0 or len(set(row)) == 1
        if row[got].min() > 0:  # without the smallest kept ones the mass falls short
            fewer = np.sort(mass[got])[::-1]
            fewer = fewer[: -1 if ties == "minimal" else -int((row[got] == row[got].min()).sum())]
            assert not len(fewer) or fewer.sum() < p * mass.sum() * (1 + 1e-12)
        assert (got >= (row > row[got].min())).all()  # nothing larger is left out


@EASY
@given(ROWS, SHARES, st.randoms(use_true_random=False))
def test_a_permutation_permutes_the_mask(rows: np.ndarray, share: float, random: object) -> None:
    order = list(range(rows.shape[1]))
    random.shuffle(order)
    for name in registry.names("rules"):
        if name != "random":
            rule = made(name, share)
            assert torch.equal(kept(rule, rows)[:, order], kept(rule, rows[:, order]))


@EASY
@given(ROWS, NORMAL, st.integers(-20, 20), st.sampled_from([1.0, 2.0]))
def test_a_power_of_two_changes_no_mask(rows: np.ndarray, share: float, exponent: int, power: float) -> None:
    scaled = rows * np.float32(2.0**exponent)
    for rule in (
        made("max_p", share),
        made("top_k", share),
        TopP(share, power=power),
        TopP(share, power, ties="minimal"),
    ):
        assert torch.equal(kept(rule, rows), kept(rule, scaled))


@EASY
@given(ROWS, SHARES, RULES)
def test_signs_batch_and_order_of_rows_change_no_mask(rows: np.ndarray, share: float, name: str) -> None:
    rule = made(name, share)
    whole = kept(rule, rows)
    assert torch.equal(kept(rule, rows[::-1]).flip(0), whole)
    for n in range(len(rows)):
        assert torch.equal(kept(rule, rows[n : n + 1])[0], whole[n])
    if name != "random":
        assert torch.equal(kept(rule, -rows), whole)


@EASY
@given(ROWS, SHARES, SHARES, RULES)
def test_a_denser_strength_keeps_all_that_a_sparser_one_keeps(rows: np.ndarray, a: float, b: float, name: str) -> None:
    cls = registry.get("rules", name)
    sparser, denser = sorted((a, b), reverse=not cls.denser_upwards)
    less, more = kept(made(name, sparser), rows), kept(made(name, denser), rows)
    assert bool((more | ~less).all())
