"""Mixtures of experts: every expert is counted with the tokens that were routed to it, and nothing else changes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny_experts import EXPERT_FFN, EXPERTS, FUSED, LISTS, TOP, tiny_moe
from tiny_families import LAYERS, WIDTH, hooks, logits
from torch import nn

from dllm_sparsity import registry
from dllm_sparsity.errors import UserError
from dllm_sparsity.families import find_ffns
from dllm_sparsity.families.experts import NAME
from dllm_sparsity.sparsity import ledger as ledger_module
from dllm_sparsity.sparsity.clock import Clock, Phase, Slot, TokenState
from dllm_sparsity.sparsity.rules.top_k import TopK
from dllm_sparsity.sparsity.rules.top_p import TopP
from dllm_sparsity.sparsity.sparsifier import sparsify

ALL = (*FUSED, *LISTS)
SITES = ("input", "gate", "up", "intermediate")


def sites_of(name: str) -> tuple[str, ...]:
    return ("input", "intermediate") if name == "gpt_oss" else SITES


def routing(name: str, model: nn.Module, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """Record which experts each token is routed to, layer by layer, from what the router says."""
    seen: dict[int, torch.Tensor] = {}
    handles = []
    for layer, block in enumerate(model.layers if name in LISTS else model.model.layers):
        if name in LISTS:
            if hasattr(block.mlp, "gate"):
                handles.append(
                    block.mlp.gate.register_forward_hook(
                        lambda module, args, output, layer=layer: seen.update({layer: output.topk(TOP, -1).indices})
                    )
                )
        else:
            handles.append(
                block.mlp.experts.register_forward_pre_hook(
                    lambda module, args, kwargs, layer=layer: seen.update({layer: args[1]}), with_kwargs=True
                )
            )
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return seen


def expert_layers(name: str) -> list[int]:
    return list(range(LAYERS)) if name in FUSED else list(range(1, LAYERS))


@pytest.mark.parametrize("name", ALL)
def test_every_layer_is_found(name: str) -> None:
    ffns = find_ffns(tiny_moe(name))
    routed = [ffn for ffn in ffns if ffn.experts]
    assert [ffn.layer for ffn in routed] == expert_layers(name)
    assert {ffn.layer for ffn in ffns} == set(range(LAYERS))
    for ffn in routed:
        assert tuple(ffn.points) == sites_of(name)
        assert (ffn.d_model, ffn.d_ffn, ffn.experts, ffn.gated) == (WIDTH, EXPERT_FFN, EXPERTS, True)
        assert all(ffn.missing[site] for site in SITES if site not in ffn.points)
    dense = [ffn.name for ffn in ffns if not ffn.experts]
    assert dense == {"llada_moe": ["layers.0.mlp"], "llada2": ["layers.0.mlp", "layers.1.mlp.shared_experts"]}.get(
        name, []
    )


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("rule", [None, *registry.names("rules")])
def test_the_dense_setting_is_bit_identical(
    name: str, rule: str | None, implementation: str, ids: torch.Tensor
) -> None:
    model = tiny_moe(name)
    model.set_experts_implementation(implementation)
    try:
        before, had = logits(model, ids), hooks(model)
        made = registry.get("rules", rule) if rule else None
        with sparsify(model, made and made(made.dense), sites_of(name)):
            assert model.config._experts_implementation == NAME
            assert torch.equal(logits(model, ids), before)
        assert model.config._experts_implementation == implementation
        assert hooks(model) == had
        assert torch.equal(logits(model, ids), before)
    finally:
        model.set_experts_implementation("grouped_mm")


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("rule", [None, *registry.names("rules")])
def test_the_dense_setting_of_lists_is_bit_identical(name: str, rule: str | None, ids: torch.Tensor) -> None:
    model = tiny_moe(name)
    before, had = logits(model, ids), hooks(model)
    made = registry.get("rules", rule) if rule else None
    with sparsify(model, made and made(made.dense), SITES):
        assert torch.equal(logits(model, ids), before)
    assert hooks(model) == had


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pass_through_has_the_same_bits_in_half_precision(name: str, dtype: torch.dtype, ids: torch.Tensor) -> None:
    model = tiny_moe(name)
    model.to(dtype)
    try:
        before = logits(model, ids)
        with sparsify(model, None, sites_of(name)):
            assert torch.equal(logits(model, ids), before)
    finally:
        model.float()


def states_of(ids: torch.Tensor) -> torch.Tensor:
    states = torch.full(ids.shape, int(TokenState.COMMITTED))
    states[:, :2], states[:, -2:], states[0, 0] = TokenState.PROMPT, TokenState.MASKED, TokenState.PAD
    return states


def run(model: nn.Module, ids: torch.Tensor, rule: object, sites: tuple[str, ...], steps: int = 1, **options: object):
    clock = Clock()
    with sparsify(model, rule, sites, clock=clock, **options) as tracker:
        with clock.batch(["a", "b", "a"], steps):
            for step in range(steps):
                clock.tick(Slot(Phase.DENOISE, step=step), states_of(ids))
                logits(model, (ids + step) % 97)
    return tracker.read()


@pytest.mark.parametrize("name", ALL)
def test_rows_are_the_routed_tokens_of_each_expert(name: str, ids: torch.Tensor) -> None:
    model = tiny_moe(name)
    wanted: Counter = Counter()
    for step in range(2):
        for layer, chosen in routing(name, model, (ids + step) % 97).items():
            for state, experts in zip(states_of(ids).flatten().tolist(), chosen.tolist(), strict=True):
                for expert in experts:
                    wanted[step, layer, expert, TokenState(state).name.lower()] += 1
    reading = run(model, ids, None, ("input", "intermediate"), steps=2)
    for site in ("input", "intermediate"):
        got: Counter = Counter()
        for step, layer, expert, state, rows, where, total in zip(
            *(reading[key] for key in ("step", "layer", "expert", "token_state", "rows", "site", "total")), strict=True
        ):
            if where == site and expert >= 0:
                got[step, layer, expert, state] += rows
                assert rows > 0  # an expert without tokens is missing, not zero
                assert total == rows * (WIDTH if site == "input" else EXPERT_FFN)
        assert got == wanted
    for key in ("rows_prev", "inter_first"):
        assert sum(value for value, expert in zip(reading[key], reading["expert"], strict=True) if expert >= 0) == 0


def masked(rows: torch.Tensor) -> torch.Tensor:
    count = max(1, int(0.4 * rows.shape[-1] + 1e-9))
    lowest = rows.abs().sort(-1, descending=True).values[..., count - 1 : count]
    return torch.where(rows.abs() >= lowest, rows, 0)


@pytest.mark.parametrize(
    "sites", [("input",), ("gate",), ("up",), ("intermediate",), ("input", "intermediate")], ids="+".join
)
@pytest.mark.parametrize("name", ALL)
def test_one_layer_is_what_the_definition_says(name: str, sites: tuple[str, ...], ids: torch.Tensor) -> None:
    """Compute an expert layer by hand, expert by expert, with masks on its sites; count what they keep."""
    if not set(sites) <= set(sites_of(name)):
        pytest.skip("the gate cannot be split")
    model, layer = tiny_moe(name), 1
    block = (model.layers if name in LISTS else model.model.layers)[layer].mlp
    seen: dict[str, torch.Tensor] = {}

    def enter(module: nn.Module, args: tuple) -> None:
        seen["x"] = args[0].reshape(-1, WIDTH)

    handles = [block.register_forward_pre_hook(enter)]
    handles.append(
        block.register_forward_hook(lambda m, a, out: seen.update(y=out[0] if isinstance(out, tuple) else out))
    )
    with sparsify(model, TopK(0.4), sites, layers=[layer]) as tracker:
        logits(model, ids)
    for handle in handles:
        handle.remove()
    at = {site: masked if site in sites else (lambda rows: rows) for site in SITES}
    kept: Counter = Counter()

    def act(site: str, rows: torch.Tensor, expert: int) -> torch.Tensor:
        made = at[site](rows)
        if site in sites:
            kept[site, expert] += int((made != 0).sum())
        return made

    def by_hand(x: torch.Tensor, expert: int) -> torch.Tensor:
        x = act("input", x, expert)
        if name in LISTS:
            mlp = block.experts[expert] if expert >= 0 else block.shared_experts
            gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
            inner = act("gate", torch.nn.functional.silu(x @ gate.T), expert) * act("up", x @ up.T, expert)
            return act("intermediate", inner, expert) @ down.T
        e = block.experts
        if name == "gpt_oss":
            inner = e._apply_gate(x @ e.gate_up_proj[expert] + e.gate_up_proj_bias[expert])
            return act("intermediate", inner, expert) @ e.down_proj[expert] + e.down_proj_bias[expert]
        gate, up = (x @ e.gate_up_proj[expert].T).chunk(2, -1)
        inner = act("gate", e.act_fn(gate), expert) * act("up", up, expert)
        return act("intermediate", inner, expert) @ e.down_proj[expert].T

    with torch.no_grad():
        x = seen["x"]
        if name in LISTS:
            weight, chosen = block.gate(x).softmax(-1).topk(TOP, -1)
        else:
            _, weight, chosen = (block.router if name == "gpt_oss" else block.gate)(x)
        wanted = torch.zeros_like(x)
        for expert in range(EXPERTS):
            token, rank = torch.where(chosen == expert)
            if len(token):
                wanted[token] += by_hand(x[token], expert) * weight[token, rank, None]
        if name == "llada2":
            wanted += by_hand(x, -1)
    assert torch.allclose(seen["y"].reshape(-1, WIDTH), wanted, atol=1e-5)
    reading = tracker.read()
    got: Counter = Counter()
    for site, expert, number in zip(reading["site"], reading["expert"], reading["kept"], strict=True):
        got[site, expert] += number
    assert got == kept


@pytest.mark.parametrize("name", ["qwen3_moe", "llada2"])
def test_a_table_without_room_is_read_out_between_passes(
    name: str, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_moe(name)
    plain = run(model, ids, TopP(0.7), SITES, steps=7)
    monkeypatch.setattr(ledger_module, "_FIRST_BYTES", 1)
    tight = run(model, ids, TopP(0.7), SITES, steps=7)
    assert dict(tight) == dict(plain)
    assert tight.per_item == plain.per_item
    summed = {site: [0, 0] for site in SITES}
    for site, state, kept, total in zip(*(plain[k] for k in ("site", "token_state", "kept", "total")), strict=True):
        if state != "pad":
            summed[site][0] += kept
            summed[site][1] += total
    items = plain.per_item.values()
    assert {s: [sum(i[s][0] for i in items), sum(i[s][1] for i in items)] for s in SITES} == summed


def test_a_rule_on_one_layer_leaves_the_others(ids: torch.Tensor) -> None:
    model = tiny_moe("qwen3_moe")
    with sparsify(model, TopP(0.5), "all", layers=[1]) as one:
        with sparsify(model, None, "all") as both:
            logits(model, ids)
        assert model.config._experts_implementation == NAME  # the outer one is still attached
    assert set(one.read()["layer"]) == {1}
    reading = both.read()
    zeros = {layer: reading.sparsity(layer=layer, site="input") for layer in (0, 1)}
    assert zeros[0] == 0
    assert zeros[1] > 0.1


def test_what_cannot_be_counted_is_refused(ids: torch.Tensor) -> None:
    model = tiny_moe("qwen3_moe")
    model.set_experts_implementation("eager")
    before = logits(model, ids)
    try:
        with pytest.raises(UserError, match="inside of which nothing can be seen"), sparsify(model, TopP(0.5)):
            pass
        assert model.config._experts_implementation == "eager"
        assert torch.equal(logits(model, ids), before)
    finally:
        model.set_experts_implementation("grouped_mm")
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    try:
        with pytest.raises(UserError, match="spread over processes"), sparsify(model, TopP(0.5)):
            pass
    finally:
        model.model.layers[1].mlp.experts._is_expert_parallel = False
    assert model.config._experts_implementation == "grouped_mm"
    odd = nn.Module()
    odd.layers = nn.ModuleList([nn.Module()])
    odd.layers[0].experts = nn.Module()
    odd.layers[0].experts.down_proj = nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(UserError, match="in a form that is not covered"):
        find_ffns(odd)


def test_a_layer_that_is_not_known_is_named() -> None:
    model = nn.Module()
    known = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    odd = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4)) for _ in range(2)]
    model.layers = nn.ModuleList([known, *odd])
    with pytest.raises(UserError, match="layers 1, 2 of layers have no FFN"):
        find_ffns(model)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_one_compiled_graph_counts_the_same(name: str, ids: torch.Tensor) -> None:
    model = tiny_moe(name)
    readings = []
    for fullgraph in (False, True):
        torch._dynamo.reset()
        with sparsify(model, TopP(0.5), "all") as tracker:
            logits(torch.compile(model, backend="eager", fullgraph=True) if fullgraph else model, ids)
        readings.append(tracker.read())
    torch._dynamo.reset()
    assert dict(readings[0]) == dict(readings[1])


class SharedFirst(nn.Module):
    """A block that names its shared expert before its experts."""

    def __init__(self) -> None:
        super().__init__()
        inner = tiny_moe("llada2").layers[1].mlp
        self.gate, self.shared_mlp, self.experts = inner.gate, inner.shared_experts, inner.experts


def test_experts_are_found_once_wherever_they_stand() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Module()])
    model.layers[0].mlp = SharedFirst()
    assert sorted(ffn.name for ffn in find_ffns(model)) == ["layers.0.mlp.experts", "layers.0.mlp.shared_mlp"]


@pytest.mark.parametrize("name", ["llada2", "qwen3_moe"])
def test_a_second_tracker_sees_the_same_tokens(name: str, ids: torch.Tensor) -> None:
    model = tiny_moe(name)
    alone = run(model, ids, None, ("input",))
    with sparsify(model, TopK(0.5), "input"):
        inner = run(model, ids, None, ("input",))
    rows: list[Counter] = [Counter(), Counter()]  # with a rule below, later layers route elsewhere, and as much
    for counter, reading in zip(rows, (alone, inner), strict=True):
        for layer, state, expert, count in zip(
            *(reading[k] for k in ("layer", "token_state", "expert", "rows")), strict=True
        ):
            counter[layer, state, expert >= 0] += count
    assert rows[0] == rows[1]


@pytest.mark.parametrize("name", ["llada2", "qwen3_moe"])
def test_a_copy_made_inside_the_block_runs_without_the_rule_afterwards(name: str, ids: torch.Tensor) -> None:
    import copy

    model = tiny_moe(name)
    before = logits(model, ids)
    with sparsify(model, TopK(0.3), "all"):
        other = copy.deepcopy(model)
    assert torch.equal(logits(other, ids), before)
