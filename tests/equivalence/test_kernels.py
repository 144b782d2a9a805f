"""The fused kernel against naive.py: on a GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch._dynamo.testing import CompileCounterWithBackend

from dllm_sparsity.sparsity import fusing
from dllm_sparsity.sparsity.clock import Clock, Compare, Phase, Slot, TokenState
from dllm_sparsity.sparsity.kernels import fused, naive
from dllm_sparsity.sparsity.rule import Rule, Where
from dllm_sparsity.sparsity.rules.layerwise import Layerwise
from dllm_sparsity.sparsity.rules.max_p import MaxP
from dllm_sparsity.sparsity.rules.random import Random
from dllm_sparsity.sparsity.rules.threshold import Threshold
from dllm_sparsity.sparsity.rules.top_k import TopK
from dllm_sparsity.sparsity.rules.top_p import TopP
from dllm_sparsity.sparsity.sparsifier import sparsify

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RULES = (TopP(0.9), TopP(0.5), TopP(0.0), TopP(0.999), TopP(0.7, power=2.0), TopP(0.6, power=0.5), TopK(0.3), MaxP(0.2))
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, inside the interpreter


def rows_of_every_kind(width: int, dtype: torch.dtype) -> torch.Tensor:
    g = torch.Generator().manual_seed(width)
    normal = torch.randn(9, width, generator=g)
    large = 2e4 if dtype == torch.float16 else 1e38
    one_hot = torch.zeros(width)
    one_hot[width // 2] = -3
    kinds = [
        normal[0],
        torch.nn.functional.silu(normal[1]) * normal[2],
        normal[3] * torch.exp(2 * normal[4]),  # heavy-tailed
        torch.randint(0, 4, (width,), generator=g).float(),  # tied
        torch.full((width,), -0.37),
        torch.zeros(width),
        one_hot,
        normal[5] * 1e-39,  # subnormal
        normal[6] * large,
        normal[7].index_fill(0, torch.tensor([width // 3]), float("nan")),
        normal[8].index_fill(0, torch.tensor([0]), -float("inf")),
    ]
    return torch.stack(kinds).to(dtype)


def by_definition(rule: Rule, rows: torch.Tensor) -> torch.Tensor:
    where = Where(0, "input", None, torch.zeros(len(rows), dtype=torch.long), None)
    return torch.where(rule.keep(rows, where) | naive.nonfinite_rows(rows), rows, 0)


def poisoned(rows: torch.Tensor) -> torch.Tensor:
    return torch.full(rows.shape, float("nan"), dtype=rows.dtype, device=DEVICE)


def launched(rule: Rule, rows: torch.Tensor) -> torch.Tensor:
    there = rows.to(DEVICE)
    return fused.launch(there, rule.fused(rows.shape[-1]), out=poisoned(rows)).cpu()


def assert_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    different = ~((got == wanted) | (got.isnan() & wanted.isnan())).all(-1)
    assert not different.any(), f"rows {different.nonzero().flatten().tolist()} differ"


@pytest.mark.parametrize("rule", [*RULES, Threshold(0.1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 63, 1000])
def test_equals_the_definition(rule: Rule, dtype: torch.dtype, width: int) -> None:
    rows = rows_of_every_kind(width, dtype)
    assert_same(launched(rule, rows), by_definition(rule, rows))


@pytest.mark.parametrize("width", [4096, 14336, 40000, 65536])
@pytest.mark.parametrize("rule", [TopP(0.9), TopK(0.3), MaxP(0.2)], ids=str)
def test_equals_the_definition_on_wide_rows(rule: Rule, width: int) -> None:
    rows = rows_of_every_kind(width, torch.bfloat16)[[1, 2, 3, 9]]
    assert_same(launched(rule, rows), by_definition(rule, rows))


def test_any_stride_and_no_rows() -> None:
    rows, rule = torch.randn(50, 8).t(), TopP(0.7)
    assert_same(launched(rule, rows), by_definition(rule, rows))
    part = torch.randn(6, 100)[:, 30:80]
    assert_same(launched(rule, part), by_definition(rule, part))
    assert launched(rule, torch.zeros(0, 5)).shape == (0, 5)


def test_equal_rows_give_equal_results_in_any_batch() -> None:
    rows = torch.nn.functional.silu(torch.randn(6, 1000)).bfloat16()
    whole = launched(TopP(0.8), rows)
    for size in (1, 4):
        parts = [launched(TopP(0.8), part) for part in rows.split(size)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(launched(TopP(0.8), rows.flip(0)).flip(0), whole)


def test_a_given_mask_and_the_kept_mass() -> None:
    rows, mask = torch.randn(5, 77), torch.rand(5, 77) < 0.3
    mass = torch.full((5,), float("nan"), device=DEVICE)
    got = fused.launch(rows.to(DEVICE), mask=mask.to(DEVICE), mass=mass).cpu()
    assert_same(got, torch.where(mask, rows, 0))
    assert torch.allclose(mass.cpu(), got.abs().sum(-1))


ENTRIES = st.floats(-1000, 1000, width=32, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-6)
ROWS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12), elements=ENTRIES)
FEW = settings(max_examples=10, deadline=None)


@FEW
@given(ROWS, st.floats(0, 1), st.randoms(use_true_random=False))
def test_laws(rows: np.ndarray, p: float, random: object) -> None:
    tensor = torch.from_numpy(rows.copy())
    kept = launched(TopP(p), tensor)
    for row, got in zip(tensor.double().abs(), kept != 0, strict=True):
        assert row[got].sum() >= p * row.sum() * (1 - 1e-12)  # the mass
        if got.any():  # no smaller set has it: without the ties at the cutoff it falls short
            assert row[row > row[got].min()].sum() < max(p * row.sum() * (1 + 1e-12), 1e-300)
    weaker = launched(TopP(p / 2), tensor)
    assert ((weaker == 0) | (kept != 0)).all()  # monotone in p
    order = list(range(rows.shape[1]))
    random.shuffle(order)
    assert torch.equal(launched(TopP(p), tensor[:, order]), kept[:, order])


def run(rule: Rule | None, sites: str, compiled: object = None, dtype: torch.dtype = torch.float32) -> tuple:
    """Drive a tiny model through two request batches; return the reading, the logits and the kernels."""
    model = tiny.llama(causal=False).to(DEVICE, dtype).eval()
    clock, ids = Clock(), torch.randint(5, 99, (2, 3), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    states = torch.full((2, 3), int(TokenState.MASKED), device=DEVICE)
    states[0, :1] = TokenState.PAD
    outputs = []
    with sparsify(model, rule, sites, clock=clock) as tracker, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forward = torch.compile(model, backend=compiled, fullgraph=True) if compiled else model
        for _ in range(2):
            with clock.batch(["a", "b"], 3):
                for step in range(3 if DEVICE == "cuda" else 2):
                    compare = Compare.PREVIOUS if step else Compare.START
                    clock.tick(Slot(Phase.DENOISE, step=step), states, compare)
                    outputs.append(forward(input_ids=(ids + step) % 99 + 1, use_cache=False).logits)
                clock.tick(Slot(Phase.LIKELIHOOD), states)
                forward(input_ids=ids, use_cache=False)
    return dict(tracker.read()), outputs, tracker.kernels


@pytest.fixture
def kernels_on(monkeypatch: pytest.MonkeyPatch) -> object:
    """Return a function that switches the fused path on (interpreted here) or off."""
    takes = fused.takes

    def switch(on: bool) -> None:
        possible = lambda rows: rows.dtype in DTYPES and not (rows.requires_grad and torch.is_grad_enabled())  # noqa: E731
        monkeypatch.setattr(fused, "takes", possible if on else (lambda rows: False))

    yield switch
    monkeypatch.setattr(fused, "takes", takes)


@pytest.mark.parametrize(
    ("rule", "sites"),
    [
        (MaxP(0.2), "all"),
        (TopP(0.8, ties="minimal"), "intermediate"),
        (Random(0.7), ("gate", "up")),
        (None, "input"),
        (Layerwise(1.0, path=((1.0, 1.0), (1.0, 0.4))), "all"),
    ],
    ids=str,
)
def test_a_model_counts_the_same(rule: Rule | None, sites: str, kernels_on: object) -> None:
    kernels_on(False)
    plain, outputs, _ = run(rule, sites)
    kernels_on(True)
    reading, others, _ = run(rule, sites)
    assert reading == plain
    assert all(torch.equal(one, other) for one, other in zip(outputs, others, strict=True))


@pytest.mark.parametrize("on", [False, True], ids=["by hand", "kernel"])
def test_one_compiled_graph_serves_all_steps(on: bool, kernels_on: object) -> None:
    kernels_on(on)
    plain, outputs, _ = run(MaxP(0.2), "all")
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    reading, others, _ = run(MaxP(0.2), "all", backend)
    assert backend.frame_count == 2  # one for all denoising steps, one for likelihood, where nothing is compared
    assert reading == plain
    assert all(torch.equal(one, other) for one, other in zip(outputs, others, strict=True))


def test_a_norm_is_taken_over_and_given_back(kernels_on: object) -> None:
    kernels_on(True)
    model = tiny.llama(causal=False).to(DEVICE).eval()
    with sparsify(model, TopP(0.8), "input") as tracker:
        assert tracker.kernels == {"made by the kernel": 2, "hooked": 0}
        assert "forward" in vars(model.model.layers[0].post_attention_layernorm)
    assert not any("forward" in vars(module) for module in model.modules())


def test_no_norm_is_taken_over_where_one_layer_needs_the_rows(kernels_on: object) -> None:
    kernels_on(True)
    model = tiny.llama(causal=False).to(DEVICE).eval()
    ids = torch.arange(5, 12, device=DEVICE)[None]
    rule = Layerwise(1.0, path=((1.0, 1.0), (1.0, 0.4)), parameters={"ties": "minimal"})  # the kernel keeps ties
    with sparsify(model, rule, "input") as tracker, torch.no_grad():
        assert tracker.kernels == {"made by the kernel": 0, "hooked": 2}
        got = model(input_ids=ids).logits
    with sparsify(model, TopP(0.4, ties="minimal"), "input", layers=[1]), torch.no_grad():
        assert torch.equal(got, model(input_ids=ids).logits)


class NormFeedsTwo(torch.nn.Module):
    """Wrap a decoder layer so that its norm's output is added to the residual too."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.mlp, self.post_attention_layernorm = layer.mlp, layer.post_attention_layernorm

    def forward(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
        normed = self.post_attention_layernorm(hidden_states)
        return normed + self.mlp(normed)


def test_a_norm_that_feeds_more_than_the_ffn_is_left_alone(kernels_on: object) -> None:
    kernels_on(True)
    model = tiny.llama(causal=False).to(DEVICE).eval()
    model.model.layers[1] = NormFeedsTwo(model.model.layers[1])
    with sparsify(model, TopP(0.8), "input") as tracker:
        assert tracker.kernels == {"made by the kernel": 0, "hooked": 2}
        assert any("the FFN alone" in note for note in tracker.notes)


@pytest.mark.parametrize("kind", fusing._MULTIPLIED)
def test_producers_round_as_the_modules_do(kind: str) -> None:
    gate, up = torch.randn(20, 300).bfloat16(), torch.randn(20, 300).bfloat16()
    approximate = {"approximate": "tanh"} if "tanh" in kind else {}
    act = torch.nn.functional.gelu if "gelu" in kind else torch.nn.functional.silu
    wanted = act(gate.to(DEVICE), **approximate) * up.to(DEVICE)
    made = fused.launch(gate.to(DEVICE), producer=fused.Producer(kind, up.to(DEVICE)))
    if DEVICE == "cuda" and kind != "gelu_mul":  # torch's erf and Triton's differ where their CUDA versions do
        assert torch.equal(made, wanted)
    else:  # numpy's exp is not torch's: the last bit of bfloat16 may differ
        assert torch.allclose(made.float(), wanted.float(), rtol=2**-6, atol=1e-6)


def test_views_that_repeat_or_turn_are_read_right() -> None:
    rows = torch.randn(6, 50).to(DEVICE)
    mask = (torch.arange(6, device=DEVICE) % 2 == 0).unsqueeze(-1).expand(6, 50)
    assert torch.equal(fused.launch(rows, mask=mask), torch.where(mask, rows, 0))
    turned = torch.randn(50, 6).to(DEVICE).t()
    made = [fused.launch(rows, producer=fused.Producer("silu_mul", up)) for up in (turned, turned.contiguous())]
    assert torch.equal(*made)


@pytest.mark.parametrize("on", [False, True], ids=["by hand", "kernel"])
def test_a_compiled_model_keeps_its_gradient(on: bool, kernels_on: object, ids: torch.Tensor) -> None:
    kernels_on(on)
    model, found = tiny.llama(causal=False).to(DEVICE), []
    for compiled in (False, True):
        torch._dynamo.reset()
        model.zero_grad()
        with sparsify(model, MaxP(0.2), "all"):
            forward = torch.compile(model, backend="aot_eager") if compiled else model
            forward(input_ids=ids.to(DEVICE) % 90, use_cache=False).logits.square().sum().backward()
        found.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
    assert found[0].abs().sum() > 0
    assert torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-5)


def test_attaching_one_tracker_is_not_counted_by_another(kernels_on: object, ids: torch.Tensor) -> None:
    kernels_on(True)
    model = tiny.llama(causal=False).to(DEVICE).eval()
    with sparsify(model, None, "up") as outer, sparsify(model, MaxP(0.2), "all"), torch.no_grad():
        model(input_ids=ids.to(DEVICE) % 90, use_cache=False)
    assert sum(outer.read()["rows"]) == ids.numel() * 2


def test_without_a_dry_run_nothing_is_taken_over(kernels_on: object, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_on(True)
    model = tiny.llama(causal=False).to(DEVICE).eval()
    monkeypatch.setattr(model, "get_input_embeddings", lambda: None)
    with sparsify(model, MaxP(0.2), "all") as tracker:
        assert tracker.kernels == {"made by the kernel": 0, "hooked": 4}
        model(input_ids=torch.ones(1, 2, dtype=torch.long, device=DEVICE), use_cache=False)
