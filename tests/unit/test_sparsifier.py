"""sparsify(): reading, nesting, non-finite values, and what is counted as kept."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_families import FFN, LAYERS, WIDTH, hooks, logits, tiny_model
from torch import nn

from dllm_sparsity.errors import UserError
from dllm_sparsity.sparsity.clock import Clock, Phase, Slot, TokenState
from dllm_sparsity.sparsity.reading import NonFiniteError
from dllm_sparsity.sparsity.rules.random import Random
from dllm_sparsity.sparsity.rules.threshold import Threshold
from dllm_sparsity.sparsity.rules.top_k import TopK
from dllm_sparsity.sparsity.rules.top_p import TopP
from dllm_sparsity.sparsity.sparsifier import NO_CLOCK, sparsify


def test_without_a_clock(llama: nn.Module, ids: torch.Tensor) -> None:
    with sparsify(llama, TopK(0.25), "all") as tracker:
        logits(llama, ids)
        logits(llama, ids[:1, :1])
    reading = tracker.read()
    assert reading.notes == (NO_CLOCK,)
    assert set(reading["phase"]) == {"forward"}
    assert set(reading["token_state"]) == {"unknown"}
    assert "inter_prev" not in reading
    assert sum(reading["rows"]) == 22 * LAYERS * 2
    assert reading.sparsity() == 0.75
    assert reading.per_item == {
        None: {"input": (22 * LAYERS * 8, 22 * LAYERS * 32), "intermediate": (22 * LAYERS * 16, 22 * LAYERS * 64)}
    }


def test_reading_several_times(llama: nn.Module, ids: torch.Tensor) -> None:
    with sparsify(llama, TopP(0.5)) as tracker:
        assert tracker.read()["rows"] == []
        with pytest.raises(UserError, match="nothing was counted"):
            tracker.read().sparsity()
        for calls in (1, 2, 3):
            logits(llama, ids)
            assert sum(tracker.read()["rows"]) == calls * 21 * LAYERS
            assert tracker.read().columns == tracker.read().columns
    after = tracker.read()
    assert sum(after["rows"]) == 3 * 21 * LAYERS
    logits(llama, ids)
    assert tracker.read().columns == after.columns
    with pytest.raises(UserError, match="no column 'sites'"):
        after.sparsity(sites="input")
    assert after.sparsity(layer=range(2)) == after.sparsity(layer=(0, 1)) == after.sparsity()


def test_a_tracker_can_be_attached_again_but_not_twice(llama: nn.Module, ids: torch.Tensor) -> None:
    tracker = sparsify(llama, TopP(0.5))
    for _ in range(2):
        with tracker:
            logits(llama, ids)
            with pytest.raises(UserError, match="attached already"):
                tracker.__enter__()
    assert sum(tracker.read()["rows"]) == 2 * 21 * LAYERS
    assert hooks(llama) == 0


def test_after_an_exception_nothing_of_a_free_run_is_counted(llama: nn.Module, ids: torch.Tensor) -> None:
    tracker = sparsify(llama, TopP(0.5))
    with pytest.raises(KeyError), tracker:  # noqa: PT012
        logits(llama, ids)
        raise KeyError
    assert tracker.read()["rows"] == []
    assert not tracker.clock.listeners


def test_nested_with_other_sites_equals_both_at_once(llama: nn.Module, ids: torch.Tensor) -> None:
    with sparsify(llama, TopK(0.5), "all") as both:
        wanted = logits(llama, ids)
    with sparsify(llama, TopK(0.5), "input") as outer, sparsify(llama, TopK(0.5), "intermediate") as inner:
        assert torch.equal(logits(llama, ids), wanted)
    assert sum(outer.read()["rows"]) == sum(inner.read()["rows"]) == 21 * LAYERS  # the other's dry run is not counted
    assert outer.read().sparsity() == both.read().sparsity(site="input")
    assert inner.read().sparsity() == both.read().sparsity(site="intermediate")
    assert hooks(llama) == 0


def test_natural_zeros_are_sparse(ids: torch.Tensor) -> None:
    model = tiny_model("opt")  # ReLU
    seen: list[torch.Tensor] = []
    handles = [
        layer.fc2.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        for layer in model.model.decoder.layers
    ]
    with sparsify(model, None) as counted, sparsify(model, TopP(1.0)) as dense:
        logits(model, ids)
    for handle in handles:
        handle.remove()
    zeros = sum(int((x == 0).sum()) for x in seen if x.numel() > FFN)  # not those of the dry runs
    assert 0.2 < zeros / (21 * LAYERS * FFN) < 0.8
    for tracker in (counted, dense):
        assert sum(tracker.read()["total"]) - sum(tracker.read()["kept"]) == zeros


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "rule",
    [None, TopP(0.5), TopP(0.5, scope="sequence"), TopP(0.5, ties="minimal"), TopK(0.1), Threshold(5.0), Random(0.3)],
    ids=str,
)
def test_nonfinite_values_go_on_and_raise_at_the_end(
    value: float, rule: object, llama: nn.Module, ids: torch.Tensor
) -> None:
    mlp, passed = llama.model.layers[1].mlp, []

    def poison(module: nn.Module, args: tuple) -> tuple:
        x = args[0].clone()
        x[0, 3, 5] = value
        return (x,)

    handles = [mlp.down_proj.register_forward_pre_hook(poison)]
    with sparsify(llama, rule, "all") as tracker:
        handles.append(mlp.down_proj.register_forward_pre_hook(lambda module, args: passed.append(args[0])))
        logits(llama, ids)
        with pytest.raises(NonFiniteError) as caught:
            tracker.read()
    for handle in handles:
        handle.remove()
    assert (caught.value.layer, caught.value.site, caught.value.rows) == (1, "intermediate", 1)
    assert "layer 1, site intermediate" in str(caught.value)
    torch.testing.assert_close(passed[0][0, 3, 5], torch.tensor(value), equal_nan=True)


def test_the_first_place_in_firing_order_is_named(llama: nn.Module, ids: torch.Tensor) -> None:
    handle = llama.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: (args[0] * math.nan,))
    with sparsify(llama, TopP(0.5), ["gate", "input", "intermediate"]) as tracker:
        logits(llama, ids)
    handle.remove()
    with pytest.raises(NonFiniteError, match="layer 0, site input"):
        tracker.read()


def test_nan_in_padding_does_not_raise(llama: nn.Module, ids: torch.Tensor) -> None:
    def poison(module: nn.Module, args: tuple) -> tuple:
        x = args[0].clone()
        x[0, -1] = math.nan
        return (x,)

    states = torch.full((3, 7), int(TokenState.PROMPT))
    states[0, -1] = TokenState.PAD
    handle = llama.model.layers[1].mlp.down_proj.register_forward_pre_hook(poison)
    clock = Clock()
    with sparsify(llama, TopP(0.5, scope="sequence"), clock=clock) as tracker, clock.batch(range(3)):
        clock.tick(Slot(Phase.PREFILL), states)
        logits(llama, ids)
    handle.remove()
    reading = tracker.read()
    assert reading.sparsity() == pytest.approx(0.8, abs=0.2)
    assert reading.per_item[0]["intermediate"][1] == 6 * LAYERS * FFN


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit(dtype: torch.dtype, ids: torch.Tensor) -> None:
    import copy

    model = copy.deepcopy(tiny_model("llama")).to(dtype)
    with sparsify(model, TopK(0.5), "all") as tracker:
        out = logits(model, ids)
    assert out.dtype == dtype
    assert tracker.read().sparsity() == pytest.approx(0.5, abs=0.03)  # ties are kept


def test_in_inference_mode_and_in_training_mode(llama: nn.Module, ids: torch.Tensor) -> None:
    with sparsify(llama, TopP(0.5), "all"):
        wanted = logits(llama, ids)
        with torch.inference_mode():
            assert torch.equal(llama(input_ids=ids).logits, wanted)
        state = torch.get_rng_state()
    with sparsify(llama, TopP(0.5), "all"):
        pass
    assert torch.equal(torch.get_rng_state(), state)  # the dry run leaves the generator alone


def test_widths(llama: nn.Module, ids: torch.Tensor) -> None:
    with sparsify(llama, None, ["all", "gate", "up", "input"]) as tracker:
        logits(llama, ids)
    reading = tracker.read()
    assert tracker.sites == ("input", "gate", "up", "intermediate")
    found = {s: t // n for s, t, n in zip(reading["site"], reading["total"], reading["rows"], strict=True)}
    assert found == {"input": WIDTH, "gate": FFN, "up": FFN, "intermediate": FFN}
