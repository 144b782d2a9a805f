"""A rule with a strength for each layer: what acts in a layer is the base rule itself, and dense layers are left alone."""

from __future__ import annotations

from contextlib import ExitStack
from typing import cast

import pytest
import torch
from tiny_families import LAYERS, hooks, logits
from torch import nn

from dllm_sparsity import Layerwise, MaxP, Random, Threshold, TopK, TopP, UserError, registry, sparsify
from dllm_sparsity.sparsity.rule import Rule, Where, acting
from dllm_sparsity.study.models import make_rule

PATH = ((1.0, 1.0), (0.5, 1.0), (0.5, 0.25), (0.0, 0.0))


def test_straight_lines_between_rows() -> None:
    assert Layerwise(1 / 3, path=PATH).at(0) == TopP(0.5)
    assert Layerwise(0.5, path=PATH).at(1).strength == pytest.approx(0.625)
    assert Layerwise(1.0, path=PATH).at(1) == TopP(0.0)
    for t in (0.0, 0.07, 0.2, 0.333):
        assert Layerwise(t, path=PATH).at(1).strength == 1.0  # dense to the last bit, not nearly
        assert acting(Layerwise(t, path=PATH), 1) is None


def test_groups_share_a_column() -> None:
    rule = Layerwise(0.5, path=((1.0, 1.0), (0.0, 0.5)), groups=((0, 3), (5,)))
    assert [rule.at(layer).strength for layer in (0, 3, 5)] == [0.5, 0.5, 0.75]
    with pytest.raises(UserError, match="no column for layer 1"):
        rule.at(1)


def test_without_a_path_all_layers_are_alike() -> None:
    for name in registry.names("rules"):
        if name not in ("layerwise", "threshold"):
            kind = registry.get("rules", name)
            rule = Layerwise(1.0, base=name).at(9)
            assert rule.strength == (pytest.approx(0.01) if kind.open_low else kind.low if kind.denser_upwards else 1.0)
            assert Layerwise(0.0, base=name).at(9).is_dense


def test_a_study_gives_plain_data() -> None:
    plain = {
        "base": "top_p",
        "path": [[1, 1], [0, 0.5]],
        "groups": [[0], [1]],
        "parameters": {"power": 2, "ties": "minimal"},
    }
    rule = make_rule("layerwise", 0.5, plain)
    assert rule.at(1) == TopP(0.75, power=2, ties="minimal")
    assert hash(rule) == hash(make_rule("layerwise", 0.5, plain))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"base": "layerwise"}, "cannot act through"),
        ({"base": "tops"}, "unknown rule"),
        ({"base": "threshold"}, "no upper end"),
        ({"path": [[1.0, 1.0]]}, "no table"),
        ({"path": [[1.0, 1.0], [0.5]]}, "no table"),
        ({"path": [[1.0, "a"], [0.5, 0.5]]}, "no table"),
        ({"path": [[0.9, 1.0], [0.5, 0.5]]}, "does not begin dense"),
        ({"path": [[1.0, 1.0], [0.5, -0.5]]}, "out of range"),
        ({"path": [[1.0, 1.0], [0.5, 0.5]], "groups": [[0, 1]]}, "do not fit"),
        ({"path": [[1.0, 1.0], [0.5, 0.5]], "groups": [[0], [0, 1]]}, "do not fit"),
        ({"groups": [[0]]}, "without a path"),
        ({"path": [[1.0], [0.5]], "parameters": {"force": 2}}, "no such parameters"),
        ({"parameters": 3}, "no names"),
    ],
    ids=str,
)
def test_refuses(wrong: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Layerwise(0.5, **wrong)


def outputs(model: nn.Module, ids: torch.Tensor, rule: Rule, sites: str = "all", **options) -> tuple:
    with sparsify(model, rule, sites, **options) as tracker:
        got = logits(model, ids)
    return got, tracker.read()


@pytest.mark.parametrize("sites", ["intermediate", "input", "all"])
def test_equals_the_base_rule_layer_by_layer(llama: nn.Module, ids: torch.Tensor, sites: str) -> None:
    path = ((1.0,) * LAYERS, tuple(0.9 - 0.3 * layer for layer in range(LAYERS)))
    got, reading = outputs(llama, ids, Layerwise(1.0, path=path), sites)
    with ExitStack() as stack:
        alone = [stack.enter_context(sparsify(llama, TopP(p), sites, layers=[n])) for n, p in enumerate(path[1])]
        wanted = logits(llama, ids)
    assert torch.equal(got, wanted)
    assert [reading.sparsity(layer=n) for n in range(LAYERS)] == [own.read().sparsity() for own in alone]
    assert reading.sparsity(layer=0) < reading.sparsity(layer=LAYERS - 1)
    assert hooks(llama) == 0


def test_dense_layers_are_left_alone(llama: nn.Module, ids: torch.Tensor) -> None:
    wanted = logits(llama, ids)
    assert torch.equal(outputs(llama, ids, Layerwise(0.0, path=((1.0,) * LAYERS, (0.0,) * LAYERS)))[0], wanted)
    path = ((1.0,) * LAYERS, (*(1.0,) * (LAYERS - 1), 0.3))
    got, reading = outputs(llama, ids, Layerwise(1.0, path=path))
    assert torch.equal(got, outputs(llama, ids, TopP(0.3), layers=[LAYERS - 1])[0])
    assert reading.sparsity(layer=range(LAYERS - 1)) == 0
    assert reading.sparsity(layer=LAYERS - 1) > 0.5


@pytest.mark.parametrize("base", ["top_p", "top_k", "max_p", "random"])
def test_uniform_is_the_base_rule(llama: nn.Module, ids: torch.Tensor, base: str) -> None:
    wanted, told = outputs(llama, ids, registry.get("rules", base)(0.5))
    got, reading = outputs(
        llama, ids, Layerwise(0.5, base=base) if base != "top_k" else Layerwise(0.5 / 0.99, base=base)
    )
    assert torch.equal(got, wanted)
    assert reading.columns == told.columns


def test_a_layer_that_the_path_lacks_is_refused_at_once(llama: nn.Module) -> None:
    with pytest.raises(UserError, match=f"no column for layer {LAYERS - 1}"):
        sparsify(llama, Layerwise(0.5, path=((1.0,) * (LAYERS - 1), (0.0,) * (LAYERS - 1))))


@pytest.mark.parametrize("base", [Threshold, MaxP, TopK, TopP], ids=lambda kind: kind.__name__)
def test_it_compiles_inside_the_block(llama: nn.Module, ids: torch.Tensor, base: type) -> None:
    torch._dynamo.reset()
    name, dense = registry.name_of("rules", base), base.dense
    rule = Layerwise(1.0, base=name, path=((dense,) * LAYERS, (*(dense,) * (LAYERS - 1), 0.3)))
    wanted, told = outputs(llama, ids, rule)
    with sparsify(llama, rule, "all") as tracker:
        got = logits(cast("nn.Module", torch.compile(llama, backend="eager", fullgraph=True)), ids)
    torch._dynamo.reset()
    assert torch.allclose(got, wanted, atol=1e-6)
    assert tracker.read()["kept"] == told["kept"]


def test_random_can_be_like_it() -> None:
    rows = torch.randn(5, 64)
    like = Layerwise(1.0, path=((1.0, 1.0), (0.8, 0.2)))
    for layer, p in enumerate((0.8, 0.2)):
        where = Where(layer, "input", None, torch.zeros(5, dtype=torch.long), None)
        counts = [rule.keep(rows, where).sum(-1) for rule in (Random(like=like), TopP(p))]
        assert torch.equal(*counts)
