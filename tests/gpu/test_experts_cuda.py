"""On a GPU: experts count what they count on the CPU, and a model spread over devices keeps a ledger on each."""

import copy

import pytest
import tiny
import torch
from tiny_experts import FUSED, LISTS, tiny_moe

from dllm_sparsity.sparsity.clock import Clock, Phase, Slot, TokenState
from dllm_sparsity.sparsity.rules.top_p import TopP
from dllm_sparsity.sparsity.sparsifier import sparsify

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
IDS = torch.randint(5, 90, (3, 7), generator=torch.Generator().manual_seed(0))


def run(model, rule, device, steps=3, sync_mode="default"):
    clock, ids = Clock(), IDS.to(device)
    states = torch.full(IDS.shape, int(TokenState.MASKED), device=device)
    states[0, :2] = TokenState.PAD
    with sparsify(model, rule, "all", clock=clock) as tracker, torch.no_grad():
        clock.begin(["a", "b", "c"], steps)
        torch.cuda.set_sync_debug_mode(sync_mode)
        try:
            for step in range(steps):
                clock.tick(Slot(Phase.DENOISE, step=step), states)
                model(input_ids=ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        clock.end()
    return dict(tracker.read())


@pytest.mark.parametrize("name", [*FUSED, *LISTS])
def test_experts_count_the_same_on_both_devices(name):
    here = tiny_moe(name)
    there = copy.deepcopy(here).cuda()
    plain, got = run(here, TopP(0.8), "cpu"), run(there, TopP(0.8), "cuda")
    for key in ("step", "layer", "site", "expert", "token_state", "rows", "total"):
        assert got[key] == plain[key]
    assert sum(got["kept"]) == pytest.approx(sum(plain["kept"]), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", [*FUSED, *LISTS])
def test_a_pass_through_has_the_same_bits(name, dtype):
    model = copy.deepcopy(tiny_moe(name)).to("cuda", dtype)
    ids = IDS.cuda()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with sparsify(model, None, "all"):
            assert torch.equal(model(input_ids=ids).logits, before)
        with sparsify(model, TopP(1.0), "all"):
            assert torch.equal(model(input_ids=ids).logits, before)


def test_experts_never_wait_for_the_device():
    model = copy.deepcopy(tiny_moe("qwen3_moe")).to("cuda", torch.bfloat16)
    model.config.use_cache = True  # without a cache transformers looks at the position ids
    assert run(model, TopP(0.8), "cuda", sync_mode="error") == run(model, TopP(0.8), "cuda")


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_model_spread_over_devices(name):
    from accelerate import dispatch_model

    model = tiny.llama() if name == "llama" else copy.deepcopy(tiny_moe(name))
    plain = run(model, TopP(0.8), "cpu")
    where = {"model.embed_tokens": 0, "model.layers.0": 0, "model.rotary_emb": 0, "model.norm": 0, "lm_head": 0}
    spread = dispatch_model(model, {**where, "model.layers.1": "cpu"}, main_device=0)
    got = run(spread, TopP(0.8), "cuda")
    for key in ("step", "layer", "site", "expert", "token_state", "rows", "total"):
        assert got[key] == plain[key]
    assert sum(got["kept"]) == pytest.approx(sum(plain["kept"]), rel=1e-3)
