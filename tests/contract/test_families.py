"""Every family: its sites are what the paper says, all of them fire, and the model comes back as it was."""

from __future__ import annotations

import pytest
import torch
from tiny_families import FAMILIES, FFN, GATED, LAYERS, PLAIN, WIDTH, hooks, logits, tiny_model
from torch import nn

from dllm_sparsity import registry
from dllm_sparsity.errors import UserError
from dllm_sparsity.families import find_ffns, linear_weight
from dllm_sparsity.sparsity.rules.top_k import TopK
from dllm_sparsity.sparsity.rules.top_p import TopP
from dllm_sparsity.sparsity.sparsifier import sparsify

FIRES = {"gated": ("input", "gate", "up", "intermediate"), "plain": ("input", "intermediate")}
RULE = TopK(0.4)


def sites_of(name: str) -> tuple[str, ...]:
    return FIRES["gated" if name in GATED else "plain"]


def masked(x: torch.Tensor) -> torch.Tensor:
    """Apply RULE by sorting, without the package."""
    count = max(1, int(0.4 * x.shape[-1] + 1e-9))
    lowest = x.abs().sort(-1, descending=True).values[..., count - 1 : count]
    return torch.where(x.abs() >= lowest, x, 0)


def parts(name: str, model: nn.Module) -> list[dict]:
    """Name each layer's linears by hand: up, down, gate and activation, and the module that holds them."""
    core = model.get_decoder() if name == "opt" else model.base_model if name != "llada" else model
    found = []
    for n in range(LAYERS):
        if name == "llada":
            b = core.blocks[n]
            found.append({"gate": b.ff_proj, "up": b.up_proj, "down": b.ff_out, "act": b.act})
        elif name == "phi3":
            m = core.layers[n].mlp
            found.append({"fused": m.gate_up_proj, "down": m.down_proj, "act": m.activation_fn})
        elif name == "modernbert":
            m = core.layers[n].mlp
            found.append({"fused": m.Wi, "down": m.Wo, "act": m.act})
        elif name in GATED:
            m = core.layers[n].mlp
            found.append({"gate": m.gate_proj, "up": m.up_proj, "down": m.down_proj, "act": m.act_fn})
        elif name == "gpt2":
            m = core.h[n].mlp
            found.append({"up": m.c_fc, "down": m.c_proj, "act": m.act})
        elif name == "gpt_neox":
            m = core.layers[n].mlp
            found.append({"up": m.dense_h_to_4h, "down": m.dense_4h_to_h, "act": m.act})
        elif name == "opt":
            m = core.layers[n]
            found.append({"up": m.fc1, "down": m.fc2, "act": m.activation_fn})
        elif name == "bert":
            b = core.encoder.layer[n]
            act = b.intermediate.intermediate_act_fn
            found.append({"up": b.intermediate.dense, "down": b.output.dense, "act": act})
    return found


def affine(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    weight = linear.weight if isinstance(linear, nn.Linear) else linear.weight.T
    y = x @ weight.T
    return y if linear.bias is None else y + linear.bias


def by_hand(part: dict, x: torch.Tensor, sites: tuple[str, ...]) -> torch.Tensor:
    """Compute an FFN with masks on its sites, from its weights alone."""
    at = {site: masked if site in sites else (lambda value: value) for site in FIRES["gated"]}
    x = at["input"](x)
    if "fused" in part:
        gate, up = affine(part["fused"], x).chunk(2, -1)
    else:
        gate, up = affine(part["gate"], x) if "gate" in part else None, affine(part["up"], x)
    inner = part["act"](up) if gate is None else at["gate"](part["act"](gate)) * at["up"](up)
    return affine(part["down"], at["intermediate"](inner))


class Tap:
    """Record what enters and leaves an FFN's linears while a tracker is attached (hooks added after it see its work)."""

    def __init__(self, part: dict) -> None:
        self.raw, self.out = None, None
        first = next(part[key] for key in ("fused", "gate", "up") if key in part)
        self._handles = [
            first.register_forward_pre_hook(self._enter),
            part["down"].register_forward_hook(self._leave),
        ]

    def _enter(self, module: nn.Module, args: tuple) -> None:
        self.raw = args[0].detach().reshape(-1, args[0].shape[-1])

    def _leave(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        self.out = output.detach().reshape(-1, output.shape[-1])

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_claimed_site_is_found_on_every_layer(name: str) -> None:
    ffns = find_ffns(tiny_model(name))
    assert [ffn.layer for ffn in ffns] == list(range(LAYERS))
    for ffn in ffns:
        assert tuple(ffn.points) == sites_of(name)
        assert (ffn.d_model, ffn.d_ffn, ffn.gated) == (WIDTH, FFN, name in GATED)
        assert all(ffn.missing[site] for site in FIRES["gated"] if site not in ffn.points)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_claimed_site_fires_on_every_layer(name: str, ids: torch.Tensor) -> None:
    model = tiny_model(name)
    with sparsify(model, None, sites_of(name)) as tracker:
        logits(model, ids)
    reading = tracker.read()
    seen = {
        pair: n
        for *pair_, n in zip(reading["layer"], reading["site"], reading["rows"], strict=True)
        for pair in [tuple(pair_)]
    }
    assert seen == {(layer, site): ids.numel() for layer in range(LAYERS) for site in sites_of(name)}
    widths = {site: WIDTH if site == "input" else FFN for site in sites_of(name)}
    assert all(t == n * widths[s] for s, n, t in zip(reading["site"], reading["rows"], reading["total"], strict=True))
    assert not [note for note in tracker.notes if "dry run" in note]


CASES = [(name, (site,)) for name in FAMILIES for site in sites_of(name)] + [
    (name, ("input", "intermediate")) for name in FAMILIES
]


@pytest.mark.parametrize(("name", "sites"), CASES, ids=lambda case: case if isinstance(case, str) else "+".join(case))
def test_sites_are_what_the_definition_says(name: str, sites: tuple[str, ...], ids: torch.Tensor) -> None:
    model = tiny_model(name)
    described = parts(name, model)
    dense_taps = [Tap(part) for part in described]
    logits(model, ids)
    first_input = dense_taps[0].raw  # layer 0 sees the same input with and without the rule
    dense_out = dense_taps[0].out
    for tap in dense_taps:
        tap.remove()
    assert torch.allclose(by_hand(described[0], first_input, ()), dense_out, atol=1e-5)
    with sparsify(model, RULE, sites) as tracker:
        taps = [Tap(part) for part in described]
        logits(model, ids)
        for tap in taps:
            tap.remove()
    wanted = by_hand(described[0], first_input, sites)
    assert not torch.allclose(wanted, dense_out, atol=1e-5)
    assert torch.allclose(wanted, taps[0].out, atol=1e-5)
    for part, tap in zip(described, taps, strict=True):
        inner = tuple(site for site in sites if site != "input")  # the tap sees the input after its mask
        assert torch.allclose(by_hand(part, tap.raw, inner), tap.out, atol=1e-5)
        if "input" in sites:
            assert torch.equal(tap.raw, masked(tap.raw))
    asked = {site: int(0.4 * (WIDTH if site == "input" else FFN)) for site in sites}
    for layer in range(LAYERS):
        for site in sites:
            got = 1 - tracker.read().sparsity(site=site, layer=layer)
            width = WIDTH if site == "input" else FFN
            assert got <= asked[site] / width + 1e-9


@pytest.mark.parametrize("rule", registry.names("rules"))
@pytest.mark.parametrize("name", FAMILIES)
def test_dense_setting_is_bit_identical(name: str, rule: str, ids: torch.Tensor) -> None:
    model, cls = tiny_model(name), registry.get("rules", rule)
    before = logits(model, ids)
    with sparsify(model, cls(cls.dense), sites_of(name)) as tracker:
        assert torch.equal(logits(model, ids), before)
    assert tracker.read().sparsity() < 0.7  # OPT's ReLU zeros are counted


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_comes_back_bit_for_bit(name: str, ids: torch.Tensor) -> None:
    model = tiny_model(name)
    before, had = logits(model, ids), hooks(model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with sparsify(model, TopP(0.3), "all"):
        assert hooks(model) > had
        assert not torch.equal(logits(model, ids), before)

    def interrupt(module: nn.Module, args: tuple) -> None:
        raise KeyError("stop")

    handle = parts(name, model)[1]["down"].register_forward_pre_hook(interrupt)
    tracker = sparsify(model, TopP(0.3), "all")
    with pytest.raises(KeyError), tracker:
        logits(model, ids)
    handle.remove()
    assert hooks(model) == had
    assert torch.equal(logits(model, ids), before)
    after = model.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[key], value) for key, value in weights.items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "phi3"])
def test_layers(name: str, ids: torch.Tensor) -> None:
    model = tiny_model(name)
    taps = [Tap(part) for part in parts(name, model)]
    logits(model, ids)
    dense = [(tap.raw, tap.out) for tap in taps]
    with sparsify(model, TopP(0.3), "intermediate", layers=[1]) as tracker:
        logits(model, ids)
    for tap in taps:
        tap.remove()
    assert set(tracker.read()["layer"]) == {1}
    assert torch.equal(taps[0].out, dense[0][1])
    assert torch.equal(taps[1].raw, dense[1][0])
    assert not torch.equal(taps[1].out, dense[1][1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_a_site_knows_its_consumer(name: str) -> None:
    model = tiny_model(name)
    for ffn, part in zip(find_ffns(model), parts(name, model), strict=True):
        assert ffn.points["intermediate"].weight.shape == (WIDTH, FFN)
        assert torch.equal(ffn.points["intermediate"].weight, linear_weight(part["down"]))


# ---- refusals


class Ffnless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])


@pytest.mark.parametrize("name", PLAIN)
def test_refuses_a_site_that_is_not_there(name: str) -> None:
    with pytest.raises(UserError, match="has no site gate: a plain FFN has no gate"):
        sparsify(tiny_model(name), TopP(0.5), "gate")


def test_refuses_what_it_cannot_do(llama: nn.Module) -> None:
    cases = [
        (lambda: sparsify(Ffnless(), TopP(0.5)), "found no FFN in Ffnless"),
        (lambda: sparsify(llama, TopP(0.5), layers=[0, 2]), r"no such layers: \[2\]"),
        (lambda: sparsify(llama, TopP(0.5), layers=[-1]), "no such layers"),
        (lambda: sparsify(llama, TopP(0.5), layers=[]), "no such layers"),
        (lambda: sparsify(llama, TopP(0.5), "inptu"), "did you mean input"),
        (lambda: sparsify(llama, TopP(0.5), []), "no site given"),
        (lambda: sparsify(llama, 0.5), "not a rule"),
        (lambda: sparsify(llama, TopP(0.5), metrics="overlapp"), "did you mean overlap"),
    ]
    for call, words in cases:
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert caught.value.hint
    assert hooks(llama) == 0


def test_refuses_a_compiled_model(llama: nn.Module) -> None:
    compiled = torch.compile(llama, backend="eager")
    with pytest.raises(UserError, match="compiled"):
        sparsify(compiled, TopP(0.5))
    block = llama.model.layers[1]
    llama.model.layers[1] = torch.compile(block, backend="eager")
    try:
        with pytest.raises(UserError, match="compiled"):
            sparsify(llama, TopP(0.5))
    finally:
        llama.model.layers[1] = block


def test_dead_sites_are_named(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = llama.model.layers[1].mlp
    weights = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight

    def fused(x: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.silu(x @ weights[0].T) * (x @ weights[1].T)) @ weights[2].T

    monkeypatch.setattr(mlp, "forward", fused)
    with pytest.raises(UserError, match="layer 1 intermediate"), sparsify(llama, TopP(0.5), "all"):
        pass
    assert hooks(llama) == 0


def test_without_a_dry_run_the_check_is_made_at_exit() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2)])

        def forward(self, x: torch.Tensor, both: bool = True) -> torch.Tensor:
            return self.layers[1](self.layers[0](x)) if both else self.layers[0](x)

    model, x = Picky(), torch.randn(2, 3, 4)
    with sparsify(model, TopP(0.5), "all") as tracker:
        model(x)
    assert sum(tracker.read()["rows"]) == 2 * 2 * 6
    with (
        pytest.raises(UserError, match="never fired in the block: layer 1 input, layer 1 intermediate"),
        sparsify(model, None, "all"),
    ):
        model(x, both=False)


@pytest.mark.parametrize("name", ["llama", "opt", "llada"])
def test_gradients_flow_through_kept_entries(name: str, ids: torch.Tensor) -> None:
    model = tiny_model(name)
    with sparsify(model, TopP(0.5), "all"):
        model(input_ids=ids).logits.sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(bool(grad.isfinite().all()) for grad in grads)
    model.zero_grad(set_to_none=True)


def test_compile_inside_the_block(llama: nn.Module, ids: torch.Tensor) -> None:
    torch._dynamo.reset()
    with sparsify(llama, TopP(0.5), "all") as eager:
        wanted = logits(llama, ids)
    with sparsify(llama, TopP(0.5), "all") as tracker:
        got = logits(torch.compile(llama, backend="eager"), ids)
    torch._dynamo.reset()
    assert torch.allclose(got, wanted, atol=1e-6)
    assert tracker.read()["kept"] == eager.read()["kept"]
