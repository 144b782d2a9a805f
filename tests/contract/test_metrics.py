"""Every registered metric against a plain-Python count, and its sums over splits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dllm_sparsity import registry
from dllm_sparsity.sparsity.clock import Compare, Frame, Phase, Slot
from dllm_sparsity.sparsity.kernels import naive
from dllm_sparsity.sparsity.metric import Metric
from dllm_sparsity.study import records

METRICS = registry.names("metrics")
STEPS = (Compare.START, Compare.PREVIOUS, Compare.PREVIOUS, Compare.OFF)


def frame(rows: int, compare: Compare, step: int = 0, branch: str = "cond") -> Frame:
    zeros = torch.zeros(rows, dtype=torch.long)
    return Frame(Slot(Phase.DENOISE, branch, step=step), compare, zeros, zeros, zeros)


def masks(rows: int = 12, width: int = 19) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(width)
    made = [torch.rand(rows, width, generator=g) < 0.4 for _ in STEPS]
    made[0][0] = made[1][0] = False  # two empty sets are equal
    made[2][1] = True
    return made


def run(name: str, sets: list[torch.Tensor]) -> np.ndarray:
    """Return a metric's counts, [step, row, column]."""
    metric = registry.get("metrics", name)()
    metric.begin()
    counted = []
    for step, (mask, compare) in enumerate(zip(sets, STEPS, strict=True)):
        values = metric.count(0, mask.float(), mask, frame(len(mask), compare, step))
        assert values.dtype == torch.long
        assert values.shape == (len(mask), len(metric.columns))
        counted.append(values.numpy())
    return np.stack(counted)


def density_by_hand(sets: list[list[set]], width: int) -> list:
    return [[[1, len(kept), width] for kept in step] for step in sets]


def overlap_by_hand(sets: list[list[set]], width: int) -> list:
    zeros = [0] * 10
    lines = [[zeros for _ in sets[0]]]
    for step in (1, 2):
        rows = []
        for row, kept in enumerate(sets[step]):
            line = []
            for earlier in (sets[step - 1][row], sets[0][row]):
                inter, union = len(kept & earlier), len(kept | earlier)
                jaccard = inter / union if union else 1.0
                line += [1, inter, union, len(earlier), math.floor(np.float32(jaccard) * 2**24)]
            rows.append(line)
        lines.append(rows)
    return [*lines, [zeros for _ in sets[0]]]


BY_HAND = {"density": density_by_hand, "overlap": overlap_by_hand}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("width", [1, 8, 19, 64])
def test_equals_a_count_by_hand(name: str, width: int) -> None:
    sets = masks(width=width)
    plain = [[set(np.flatnonzero(row)) for row in mask.numpy()] for mask in sets]
    assert run(name, sets).tolist() == BY_HAND[name](plain, width)


@pytest.mark.parametrize("name", METRICS)
def test_split_and_merged_sums_agree(name: str) -> None:
    sets = masks()
    whole = run(name, sets).sum(1)
    parts = [run(name, [mask[part] for mask in sets]).sum(1) for part in (slice(0, 5), slice(5, 6), slice(6, None))]
    assert np.array_equal(whole, sum(parts))


@pytest.mark.parametrize("name", METRICS)
def test_declares_its_columns(name: str) -> None:
    cls = registry.get("metrics", name)
    assert issubclass(cls, Metric)
    assert set(cls.columns) <= {*records.STEP_COLUMNS, *records.OVERLAP_COLUMNS}
    assert len(set(cls.columns)) == len(cls.columns)
    assert set(cls.scales) <= set(cls.columns)
    assert "Source:" in cls.__doc__


def test_metrics_share_no_column() -> None:
    columns = [column for name in METRICS for column in registry.get("metrics", name).columns]
    assert len(columns) == len(set(columns))


def test_overlap_keeps_branches_and_points_apart() -> None:
    first, second = masks()[:2]
    metric = registry.get("metrics", "overlap")()
    metric.begin()
    for point, branch in ((0, "cond"), (0, "uncond"), (1, "cond")):
        mask = first if branch == "cond" and point == 0 else second
        metric.count(point, mask.float(), mask, frame(len(mask), Compare.START, branch=branch))
    again = metric.count(0, second.float(), second, frame(len(second), Compare.PREVIOUS, 1, "uncond"))
    assert torch.equal(again[:, 1], again[:, 2])  # equal to itself: intersection is union
    other = metric.count(0, second.float(), second, frame(len(second), Compare.PREVIOUS, 1))
    assert int(other[:, 1].sum()) == int((first & second).sum())


def test_overlap_refuses_a_comparison_that_has_no_other_side() -> None:
    metric, mask = registry.get("metrics", "overlap")(), masks()[0]
    metric.begin()
    with pytest.raises(ValueError, match=r"without a Compare\.START"):
        metric.count(0, mask.float(), mask, frame(len(mask), Compare.PREVIOUS))
    metric.count(0, mask.float(), mask, frame(len(mask), Compare.START))
    with pytest.raises(ValueError, match="11 rows now, 12 one step before"):
        metric.count(0, mask[1:].float(), mask[1:], frame(11, Compare.PREVIOUS, 1))
    metric.begin()
    with pytest.raises(ValueError, match=r"without a Compare\.START"):
        metric.count(0, mask.float(), mask, frame(len(mask), Compare.PREVIOUS))


@pytest.mark.parametrize("width", [1, 7, 8, 9, 320, 896])
def test_bits_the_torch_way_equal_the_numpy_way(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.rand(33, width, generator=torch.Generator().manual_seed(width)) < 0.5
    packed = naive.pack_bits(mask)
    assert torch.equal(naive.count_bits(packed), mask.sum(-1))
    assert torch.equal(naive.count_true(mask), mask.sum(-1))
    monkeypatch.setattr(naive, "_on_host", lambda tensor: False)
    assert torch.equal(naive.pack_bits(mask), packed)
    assert torch.equal(naive.count_bits(packed), mask.sum(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_kernels_the_torch_way_equal_the_numpy_way(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(300, 257, generator=torch.Generator().manual_seed(1)).abs().to(dtype)
    scores[5] = 0
    keep = scores > 0.5

    def everything() -> list[torch.Tensor]:
        return [
            naive.sorted_descending(scores).to(dtype),
            naive.top_p_cutoff(scores, 0.7),
            naive.top_k_cutoff(scores, 31),
            naive.zero_out(scores, keep),
            naive.count_true(keep),
        ]

    fast = everything()
    monkeypatch.setattr(naive, "_on_host", lambda tensor: False)
    for one, other in zip(fast, everything(), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
