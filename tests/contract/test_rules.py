"""Every registered rule against its definition in plain Python, and against the contract."""

from __future__ import annotations

import dataclasses
import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from dllm_sparsity import registry
from dllm_sparsity.errors import UserError
from dllm_sparsity.sparsity.rule import CutoffRule, Rule, Where
from dllm_sparsity.sparsity.rules.max_p import MaxP
from dllm_sparsity.sparsity.rules.random import Random
from dllm_sparsity.sparsity.rules.threshold import Threshold
from dllm_sparsity.sparsity.rules.top_k import TopK
from dllm_sparsity.sparsity.rules.top_p import TopP

RULES = registry.names("rules")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def where(rows: torch.Tensor, sequence: list[int] | None = None, counted: list[bool] | None = None, layer: int = 0):
    numbers = torch.tensor(sequence) if sequence else torch.zeros(len(rows), dtype=torch.long)
    return Where(layer, "input", None, numbers, None if counted is None else torch.tensor(counted))


def kept(rule: Rule, rows: torch.Tensor, **place) -> torch.Tensor:
    before = rows.clone()
    mask = rule.keep(rows, where(rows, **place))
    assert mask.dtype == torch.bool
    assert mask.shape == rows.shape
    assert torch.equal(rows, before)
    return mask


def samples(dtype: torch.dtype, width: int = 37) -> torch.Tensor:
    """Rows of several kinds: Gaussian, heavy-tailed, with ties, with zeros, all equal, all zero, one entry."""
    g = torch.Generator().manual_seed(width)
    rows = torch.randn(24, width, generator=g)
    rows[4:8] = rows[4:8] ** 3
    rows[8:12] = rows[8:12].round()
    rows[12:16] *= torch.rand(4, width, generator=g) < 0.5
    rows[16] = -1.5
    rows[17] = 0
    rows[18] = 0
    rows[18, 5] = -2
    return rows.to(dtype)


def strengths(name: str) -> list[float]:
    cls = registry.get("rules", name)
    inner = [0.03, 0.25, 0.5, 0.77, 0.95]
    ends = [cls.low] if not cls.open_low else []
    return [*ends, *inner, *([cls.high] if cls.high == 1 else [3.0])]


# ---- definitions


def top_p_definition(row: list[float], p: float, power: float = 1.0) -> list[bool]:
    size = [abs(x) for x in row]
    if power != 1:
        top = max(size)
        size = [(x / top) ** power if top else 0.0 for x in size]
    ordered = sorted(size, reverse=True)
    sums = list(itertools.accumulate(ordered))
    first = next((n for n, mass in enumerate(sums) if mass >= p * sums[-1]), len(row) - 1)
    return [x >= ordered[first] for x in size]


def top_k_definition(row: list[float], k: float) -> list[bool]:
    count = max(1, int(Fraction(str(k)) * len(row)))
    lowest = sorted((abs(x) for x in row), reverse=True)[count - 1]
    return [abs(x) >= lowest for x in row]


def max_p_definition(row: list[float], p: float) -> list[bool]:
    cut = np.float32(p) * np.float32(max(abs(x) for x in row))
    return [np.float32(abs(x)) >= cut for x in row]


def threshold_definition(row: list[float], t: float) -> list[bool]:
    return [np.float32(abs(x)) >= np.float32(t) for x in row]


DEFINED = {
    "top_p": top_p_definition,
    "top_k": top_k_definition,
    "max_p": max_p_definition,
    "threshold": threshold_definition,
}


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("name", DEFINED)
def test_equals_definition(name: str, dtype: torch.dtype) -> None:
    rows = samples(dtype)
    for strength in strengths(name):
        mask = kept(registry.get("rules", name)(strength), rows)
        wanted = [DEFINED[name](row, strength) for row in rows.double().tolist()]
        assert mask.tolist() == wanted, strength


@pytest.mark.parametrize("power", [0.5, 2.0, 3.0])
def test_top_p_power(power: float) -> None:
    rows = samples(torch.float32)
    for p in (0.0, 0.3, 0.9):
        wanted = [top_p_definition(row, p, power) for row in rows.double().tolist()]
        same = [a == b for a, b in zip(kept(TopP(p, power=power), rows).tolist(), wanted, strict=True)]
        assert all(same)
    order_first = kept(TopP(0.5, power=2), rows).sum() <= kept(TopP(0.5), rows).sum()
    assert order_first  # energy is more concentrated than mass


@pytest.mark.parametrize("ties", ["keep", "minimal"])
@pytest.mark.parametrize("p", [0.0, 0.125, 0.5, 0.625, 0.75, 0.9375, 1.0])
def test_top_p_against_every_subset(p: float, ties: str) -> None:
    rows = torch.randint(-3, 4, (60, 7), generator=torch.Generator().manual_seed(1)).float()
    rows[0] = 0
    mask = kept(TopP(p, ties=ties), rows)
    for row, got in zip(rows.tolist(), mask.tolist(), strict=True):
        mass = [abs(Fraction(x)) for x in row]
        target = Fraction(p) * sum(mass)
        sizes = [sum(s) for s in itertools.product((0, 1), repeat=7) if sum(itertools.compress(mass, s)) >= target]
        smallest = max(1, min(sizes))
        if ties == "minimal":
            assert sum(got) == smallest
            assert sum(itertools.compress(mass, got)) >= target
        else:
            lowest = sorted(mass, reverse=True)[smallest - 1]
            assert got == [x >= lowest for x in mass]


def test_top_p_zero_keeps_the_largest_and_its_ties() -> None:
    rows = torch.tensor([[1.0, -3, 3, 2], [0, 0, 5, 0]])
    assert kept(TopP(0.0), rows).tolist() == [[False, True, True, False], [False, False, True, False]]
    assert kept(TopP(0.0, ties="minimal"), rows).sum(-1).tolist() == [1, 1]


@pytest.mark.parametrize("ties", ["keep", "minimal"])
def test_sequence_scope_is_top_p_of_the_flattened_row(ties: str) -> None:
    rows = samples(torch.float32)[:8].clone()
    numbers = [0, 1, 0, 1, 2, 2, 2, 0]
    mask = kept(TopP(0.6, scope="sequence", ties=ties), rows, sequence=numbers)
    for number in range(3):
        members = [n for n, other in enumerate(numbers) if other == number]
        assert torch.equal(mask[members].reshape(1, -1), kept(TopP(0.6, ties=ties), rows[members].reshape(1, -1)))


def test_sequence_scope_ignores_padding() -> None:
    rows = samples(torch.float32)[:8].clone()
    numbers, counted = [0] * 4 + [1] * 4, [True, True, True, False] * 2
    mask = kept(TopP(0.6, scope="sequence"), rows, sequence=numbers, counted=counted)
    loud = rows.clone()
    loud[[3, 7]] *= 1000
    again = kept(TopP(0.6, scope="sequence"), loud, sequence=numbers, counted=counted)
    real = torch.tensor(counted)
    assert torch.equal(mask[real], again[real])
    alone = kept(TopP(0.6, scope="sequence"), rows[:3], sequence=[0] * 3)
    assert torch.equal(mask[:3], alone)


# ---- random


LIKE = [TopP(0.7), TopP(0.5, ties="minimal"), TopK(0.4), MaxP(0.3), Threshold(0.5)]


@pytest.mark.parametrize("like", LIKE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_random_has_the_density_of_its_rule(like: Rule, dtype: torch.dtype) -> None:
    rows = samples(dtype)
    mask = kept(Random(like=like), rows) & (rows != 0)
    assert torch.equal(mask.sum(-1), (kept(like, rows) & (rows != 0)).sum(-1))


def test_random_is_a_function_of_row_layer_and_seed() -> None:
    rows = torch.randn(50, 64, generator=torch.Generator().manual_seed(3))
    whole = kept(Random(0.6), rows)
    assert torch.equal(whole[7:9], kept(Random(0.6), rows[7:9]))
    assert torch.equal(whole, kept(Random(0.6), rows.flip(0)).flip(0))
    for other in (kept(Random(0.6, seed=1), rows), kept(Random(0.6), rows, layer=1)):
        assert (other != whole).float().mean() > 0.2


def test_random_places_are_uniform() -> None:
    rows = torch.randn(4000, 32, generator=torch.Generator().manual_seed(4))
    mask = kept(Random(like=TopK(0.25)), rows)
    share = mask.double().mean(0)
    # each entry is kept with probability 1/4: the statistic has mean 31 x (1 - 1/4) x 32/31 = 24, loosely bounded
    chi2 = (4000 * (share - 0.25) ** 2 / 0.25).sum()
    assert 5 < float(chi2) < 60
    large = kept(TopK(0.25), rows)
    assert abs(float((mask & large).double().mean()) - 1 / 16) < 0.005  # size plays no part
    both = (mask[:, :-1] & mask[:, 1:]).double().mean()
    assert abs(float(both) - 0.25 * 7 / 31) < 0.005  # nor does the neighbour


def test_random_refuses_a_half_told_story() -> None:
    for arguments in ({}, {"p": 0.5, "like": TopP(0.5)}, {"like": 3}, {"p": 0.5, "like": "nothing"}):
        with pytest.raises(UserError):
            Random(**arguments)


# ---- the contract, for whatever is registered


@pytest.mark.parametrize("name", RULES)
def test_is_a_frozen_rule(name: str) -> None:
    cls = registry.get("rules", name)
    assert issubclass(cls, Rule)
    rule = cls(0.5)
    assert rule.strength == 0.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(rule, dataclasses.fields(rule)[0].name, 0.1)
    assert cls.__doc__
    assert "Source:" in cls.__doc__ or name == "random"
    assert cls(0.5) == cls(0.5)
    assert hash(cls(0.5)) == hash(cls(0.5))


@pytest.mark.parametrize("name", RULES)
def test_refuses_a_strength_out_of_range(name: str) -> None:
    cls = registry.get("rules", name)
    bad = [-0.1, float("nan"), float("inf"), "half"]
    bad += [1.5] if cls.high == 1 else []
    bad += [cls.low] if cls.open_low else []
    for value in bad:
        with pytest.raises(UserError, match="out of range"):
            cls(value)
    assert cls(cls.dense).is_dense
    assert not cls(0.5).is_dense


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_dense_setting_keeps_every_nonzero(name: str, dtype: torch.dtype) -> None:
    rows = samples(dtype)
    cls = registry.get("rules", name)
    assert bool((kept(cls(cls.dense), rows) | (rows == 0)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_density_follows_strength(name: str, dtype: torch.dtype) -> None:
    rows = samples(dtype)
    cls = registry.get("rules", name)
    counts = [(kept(cls(s), rows) & (rows != 0)).sum(-1) for s in sorted(strengths(name))]
    steps = list(itertools.pairwise(counts if cls.denser_upwards else counts[::-1]))
    assert all(bool((sparse <= dense).all()) for sparse, dense in steps)
    assert any(bool((sparse < dense).any()) for sparse, dense in steps)


@pytest.mark.parametrize("name", RULES)
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    rows = torch.cat([samples(torch.float32)] * 90)  # several chunks of the CPU kernels
    rule = registry.get("rules", name)(0.6)
    whole = kept(rule, rows)
    for n in (0, 5, 9, 13, 16, 17, 18):
        assert torch.equal(whole[n], kept(rule, rows[n : n + 1])[0])
    assert torch.equal(whole, kept(rule, rows[:24]).repeat(90, 1))
    assert torch.equal(whole, kept(rule, rows.T.contiguous().T))


@pytest.mark.parametrize("name", RULES)
def test_a_zero_row_and_one_column(name: str) -> None:
    rule = registry.get("rules", name)(0.6)
    zero = torch.zeros(2, 5)
    assert torch.equal(zero * kept(rule, zero), zero)
    single = torch.tensor([[2.0], [0.0], [-0.7]])
    kept(rule, single)
    assert kept(rule, torch.zeros(0, 5)).shape == (0, 5)


@pytest.mark.parametrize("name", [name for name in RULES if issubclass(registry.get("rules", name), CutoffRule)])
def test_cutoff_form(name: str) -> None:
    rows = samples(torch.float32)
    rule = registry.get("rules", name)(0.6)
    scores = rule.score(rows, where(rows))
    cutoff = rule.cutoff(scores)
    assert cutoff.shape == (len(rows), 1)
    assert torch.equal(kept(rule, rows), scores >= cutoff)


def test_subnormal_and_huge_values() -> None:
    rows = torch.tensor([[1e-45, 3e-45, 0, 1e-44], [3e38, -3e38, 1e38, 3e38]])
    assert kept(TopP(0.5), rows).tolist() == [top_p_definition(row, 0.5) for row in rows.double().tolist()]
    half = torch.full((1, 100), 6e4, dtype=torch.float16)
    assert bool(kept(TopP(0.5), half).all())
    assert int(kept(TopP(0.5, ties="minimal"), half).sum()) == 50
    assert bool(kept(MaxP(1.0), torch.tensor([[1 + 2**-50, 1.0]], dtype=torch.float64))[0, 0])
