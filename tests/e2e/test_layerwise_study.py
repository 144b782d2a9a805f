"""An allocation by layer on a model two of whose FFNs do nothing: it finds them, beats one strength, and is resumed."""

import html
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dllm_sparsity import Layerwise, compare, sparsify
from dllm_sparsity.analysis import load
from dllm_sparsity.errors import UserError
from dllm_sparsity.study.engines import runner
from dllm_sparsity.study.models import make_rule, resolve

IDLE = (1, 3)
ENDS = ((max, -1), (min, 1))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("idle") / "model"
    shutil.copytree(resolve("embedded:autoregressive"), folder)
    weights = load_file(folder / "model.safetensors")
    for layer in IDLE:
        weights[f"model.layers.{layer}.mlp.down_proj.weight"].zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return {
        "name": "allocated",
        "models": [{"paradigm": "autoregressive", "model": str(folder), "label": "two idle layers", "batch_size": 64}],
        "tasks": [{"name": "heldout_text", "limit": 70}],
        "rules": [{"name": "top_p", "sites": ["intermediate"]}],
        "search": {"quality": "nll", "width": 0.05, "budget": 900, "layerwise": True, "layerwise_items": 32},
    }


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory):
    return compare(study, tmp_path_factory.mktemp("layerwise") / "run")


def searched(finished):
    return json.loads((finished.path / "search.json").read_text())["curves"]


def test_both_answers_are_told(finished):
    uniform, along = searched(finished)
    own = uniform["allocation"]
    assert (uniform["rule"], along["rule"]) == ("top_p", "layerwise")
    assert {name: own[name] for name in ("value", "interval", "items")} == {
        name: along[name] for name in ("value", "interval", "items")
    }
    assert along["rule_parameters"] == own["rule"]["parameters"]
    assert {row["rule"]: row["critical"] for row in finished.table()} == {
        "top_p": uniform["value"],
        "layerwise": along["value"],
    }
    (sentence,) = [words for words in finished.summary["findings"] if "strengths by layer" in words]
    assert own["difference"]["words"] in sentence
    page = finished.report.read_text()
    assert "Sparsity allocated to layers" in page
    assert "paired on" in page


def test_idle_layers_take_the_zeros(finished):
    uniform, _ = searched(finished)
    own = uniform["allocation"]
    low, _ = own["difference"]["interval"]
    assert low > 0
    assert own["difference"]["words"].startswith("better than uniform")
    assert own["value"] > uniform["value"] + 0.02
    layers = own["by_layer"]["allocated"]["layers"]
    idle = min(layers[str(layer)] for layer in IDLE)
    assert idle > max(value for layer, value in layers.items() if int(layer) not in IDLE)
    assert all(loss == 0 for layer in IDLE for loss in own["sensitivities"][layer]["losses"])


def test_it_says_on_which_items_it_was_chosen(finished):
    own = searched(finished)[0]["allocation"]
    assert own["sensitivity_items"] == 32
    assert own["shared_items"] == max(0, own["items"] - (70 - 32))
    assert own["evaluations"]["layers_alone"] <= 900
    assert own["evaluations"]["search"] <= 900
    probes = [record for record in records(finished) if record["parts"].get("probe")]
    assert {tuple(record["parts"]["block"]) for record in probes} == {(38, 70)}
    assert sum(record["items"] for record in probes) == own["evaluations"]["layers_alone"]


def records(finished):
    return [json.loads(path.read_text()) for path in finished.path.glob("cells/*/cell.json")]


def test_layers_alone_are_no_curves(finished):
    assert {cell.record["rule"] for cell in load(finished.path).cells} == {None, "top_p", "layerwise"}
    assert all(cell.record["layers"] is None for cell in load(finished.path).cells)
    assert len(finished.summary["curves"]) == 2


def test_what_was_found_is_a_rule_for_ones_own_code(finished):
    own = searched(finished)[0]["allocation"]
    at = own["by_layer"]["allocated"]
    rule = make_rule(own["rule"]["name"], at["strength"], own["rule"]["parameters"])
    assert {str(layer): rule.at(layer).strength for layer in range(5)} == at["strengths"]


def test_its_strength_lies_between_those_measured_beside_the_answer(finished):
    own = searched(finished)[0]["allocation"]
    path = {each["strength"]: each["sparsity"] for each in searched(finished)[1]["path"]}
    nearest = [f(at for at, place in path.items() if (place - own["value"]) * sign >= 0) for f, sign in ENDS]
    assert nearest[0] <= own["strength"] <= nearest[1]


def test_the_line_of_the_report_can_be_pasted(finished, study):
    own = finished.summary["search"]["curves"][0]["allocation"]
    lines = re.findall("<pre[^>]*>(.*?)</pre>", finished.report.read_text(), re.DOTALL)
    (line,) = [html.unescape(text) for text in lines if text.startswith("sparsify(")]
    model = AutoModelForCausalLM.from_pretrained(study["models"][0]["model"])
    with eval(line, {"sparsify": sparsify, "Layerwise": Layerwise, "model": model}) as tracker, torch.no_grad():
        model(torch.arange(40)[None] % 30)
    read = tracker.read()
    assert read.sparsity() == pytest.approx(own["value"], abs=0.1)
    given = {}
    eval(
        line,
        {"sparsify": lambda model, rule, **more: given.update(more, rule=rule), "Layerwise": Layerwise, "model": 0},
    )
    assert given == {"rule": Layerwise(own["strength"], **own["rule"]["parameters"]), "sites": "intermediate"}


def test_a_resumed_run_gives_the_same(study, finished, monkeypatch, tmp_path):
    before = (finished.path / "search.json").read_text()
    shutil.copytree(finished.path, tmp_path / "run")
    (tmp_path / "run" / "search.json").unlink()
    lost = [record for record in records(finished) if record["rule"] == "layerwise" or record["parts"].get("probe")]
    for record in lost[::9]:
        shutil.rmtree(tmp_path / "run" / "cells" / record["fingerprint"])
    compare(study, tmp_path / "run")
    assert (tmp_path / "run" / "search.json").read_text() == before
    monkeypatch.setattr(runner, "open_backend", lambda *_: pytest.fail("a model was loaded"))
    compare(study, finished.path)
    assert (finished.path / "search.json").read_text() == before


@pytest.fixture(scope="module")
def of_all_kinds(material, tmp_path_factory):
    """Both paradigms on a choice and on a generation task, at two retentions."""
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "items.jsonl").write_text(
        "\n".join(json.dumps({"q": f"question {n}", "a": ["yes", "no way"], "gold": n % 2}) for n in range(24))
    )
    for name in ("choice", "write"):
        text = (material / f"{name}.yaml").read_text().replace(str(material), str(folder))
        (folder / f"{name}.yaml").write_text(text)
    study = {
        "name": "kinds",
        "models": [
            {"paradigm": "autoregressive", "model": str(material / "ar"), "batch_size": 8},
            {"paradigm": "diffusion", "model": str(material / "dm"), "batch_size": 8, "mc": 2, "block_length": 3},
        ],
        "tasks": [{"name": str(folder / f"{name}.yaml")} for name in ("choice", "write")],
        "rules": [{"name": "top_p", "sites": ["all"], "parameters": {"power": 2.0}}],
        "search": {"retentions": [0.9, 0.99], "width": 0.2, "layerwise": True, "layerwise_items": 20},
    }
    return compare(study, folder / "run")


def test_every_kind_of_task_has_an_allocation(of_all_kinds):
    uniform = [own for own in searched(of_all_kinds) if own["rule"] == "top_p"]
    assert len(uniform) == 2 * 2 * 2
    for own in uniform:
        found = own["allocation"]
        assert (found["sensitivity_quality"], own["kind"]) in (("nll", "accuracy"), ("agreement", "accuracy"))
        assert found["rule"]["parameters"]["parameters"] == {"power": 2.0}
        assert found["rule"]["parameters"]["groups"] == [[0], [1]]
        assert found["sensitivity_items"] == 20
        assert found["difference"]["words"]


def test_models_with_tables_of_their_own_share_a_label(of_all_kinds):
    assert {curve["rule"] for curve in of_all_kinds.summary["curves"]} == {"top_p", "layerwise"}
    assert {(row["paradigm"], row["rule"]) for row in of_all_kinds.table()} == {
        (paradigm, rule) for paradigm in ("autoregressive", "diffusion") for rule in ("top_p", "layerwise")
    }


def test_few_items_are_refused_before_anything_runs(study, tmp_path):
    few = {**study, "tasks": [{"name": "heldout_text", "limit": 8}]}
    with pytest.raises(
        UserError, match="each layer alone on 16 items or more, and heldout_text is limited to 8"
    ) as told:
        compare(few, tmp_path / "run")
    assert "leave layerwise out" in told.value.hint
    assert not (tmp_path / "run").exists()


def test_a_budget_that_is_too_small_is_told_with_the_one_that_is_not(study, tmp_path):
    few = {**study, "tasks": [{"name": "heldout_text", "limit": 40}]}
    few["search"] = {"quality": "nll", "width": 0.5, "budget": 300, "layerwise": True, "layerwise_items": 32}
    found = compare(few, tmp_path / "run")
    reason = searched(found)[0]["allocation"]["reason"]
    assert "items for each layer, and 16 are the fewest: raise it to" in reason
    assert any("no strengths by layer" in words for words in found.summary["findings"])
