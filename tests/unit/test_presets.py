"""Every study in configs/ can run: its names exist, and every site it asks for is on every layer of every model."""

import json
import re
from pathlib import Path

import pytest
import yaml

from dllm_sparsity.bench.shapes import SHAPES
from dllm_sparsity.families import find_ffns
from dllm_sparsity.study.architectures import build, descriptions, find_architecture
from dllm_sparsity.study.check import check_study, coverage
from dllm_sparsity.study.config import ModelConfig, RuleConfig, StudyConfig, TaskSpec, read_config

CONFIGS = Path(__file__).parents[2] / "configs"
STUDIES = sorted(CONFIGS.rglob("*.yaml"))
PAPER = CONFIGS / "paper"
GRID = (
    *(0.995, 0.99, 0.985, 0.98, 0.975, 0.97, 0.96, 0.95, 0.94, 0.93, 0.92, 0.91, 0.9),
    *(0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0),
)
NINE = ("arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande", "piqa", "sciq", "lambada_standard", "triviaqa")
FIVE = {"input", "up", "gate", "intermediate", "all"}
QWEN = [f"Qwen/Qwen2.5-{size}B" for size in ("0.5", "1.5", "3", "7", "14", "32")]
LLAMA = ["meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.1-8B"]
GEMMA = [f"google/gemma-3-{size}b-pt" for size in (1, 4, 12, 27)]
FAMILIES = {
    "qwen2.5": QWEN,
    "llama3": LLAMA,
    "gemma3": GEMMA,
    "large": ["meta-llama/Llama-3.1-70B", "Qwen/Qwen2.5-72B"],
    "qwen2.5_instruct": [f"{name}-Instruct" for name in QWEN],
    "llama3_instruct": [f"{name}-Instruct" for name in LLAMA],
    "gemma3_instruct": [f"{name[:-2]}it" for name in GEMMA],
    "qwen3_moe": ["Qwen/Qwen3-30B-A3B"],
    "olmoe": ["allenai/OLMoE-1B-7B-0125"],
}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))  # what someone cached decides nothing


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_preset_passes_its_check(path):
    found = check_study(read_config(path))
    assert found.problems == ()
    assert found.notes == ()
    assert all(model.ok and model.layers and model.parameters for model in found.models)
    assert {model.source for model in found.models} <= {"folder", "shipped description"}


def test_no_two_presets_share_a_run_directory():
    names = [read_config(path).name for path in STUDIES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", descriptions())
def test_a_description_builds_the_published_model(name):
    shipped = descriptions()[name]
    architecture = find_architecture(name)
    assert architecture.source == "shipped description"
    model = build(architecture)
    parameters = list(model.parameters())
    assert all(parameter.is_meta for parameter in parameters)
    count = sum(parameter.numel() for parameter in parameters)
    assert count == pytest.approx(shipped["parameters"], rel=0.003)
    rule = RuleConfig(name="top_p", strengths=(0.9,), sites=("all", "gate", "up"))
    assert coverage(find_ffns(model), architecture.layers, [rule]) == []


def test_a_wrong_width_misses_the_published_count():
    shipped = descriptions()["Qwen/Qwen2.5-7B"]
    architecture = find_architecture("Qwen/Qwen2.5-7B")
    wrong = type(architecture)(architecture.model, {**architecture.config, "intermediate_size": 18000}, "hub", False)
    count = sum(parameter.numel() for parameter in build(wrong).parameters())
    assert abs(count / shipped["parameters"] - 1) > 0.02


def test_every_model_is_described():
    named = {model.model for path in STUDIES for model in read_config(path).models}
    described = set(descriptions())
    assert {name for name in named if not name.startswith("embedded:")} <= described


@pytest.mark.parametrize("name", FAMILIES)
def test_the_paper_s_autoregressive_studies(name):
    study = read_config(PAPER / f"{name}.yaml")
    assert [model.model for model in study.models] == FAMILIES[name]
    assert {model.dtype for model in study.models} == {"bfloat16"}
    assert tuple(task.name for task in study.tasks) == NINE
    assert all(task.limit is None and task.num_fewshot is None for task in study.tasks)
    (rule,) = study.rules
    assert (rule.name, rule.parameters, rule.layers) == ("top_p", {}, None)
    assert set(rule.sites) == (FIVE - {"all"} if name.endswith("_instruct") else FIVE)
    if name in ("qwen3_moe", "olmoe"):
        assert rule.strengths == (0.99, 0.98, 0.97, 0.95, 0.92, 0.9, 0.75, 0.5)
    else:
        assert rule.strengths == GRID
        assert len({1.0, *rule.strengths}) == 26  # the dense cell is p = 1


def test_the_paper_s_single_layer_study_takes_each_layer_once():
    study = read_config(PAPER / "qwen2.5_single_layer.yaml")
    assert [rule.layers for rule in study.rules] == [(layer,) for layer in range(28)]
    assert {(rule.sites, rule.strengths) for rule in study.rules} == {
        (("intermediate", "all", "gate"), (0.99, 0.98, 0.97, 0.95, 0.9, 0.85, 0.75, 0.5, 0.25, 0.0))
    }


def test_the_paper_s_ten_diffusion_tasks():
    found = {}
    for name in ("llada_guided", "llada_unguided", "llada_generation"):
        study = read_config(PAPER / f"{name}.yaml")
        llada, llama = study.models
        assert (llada.model, llama.model) == ("GSAI-ML/LLaDA-8B-Base", "meta-llama/Llama-3.1-8B")
        assert (llada.mask_token, llada.logits_shift, llada.temperature) == (126336, False, 0.0)
        assert (llada.steps, llada.block_length, llada.sampler) == (None, None, "low_confidence")
        assert {site for rule in study.rules for site in rule.sites} == {"intermediate", "all"}
        for task in study.tasks:
            found[task.name] = (task.num_fewshot, llada.cfg_scale, task.mc or llada.mc, task.run_code)
    assert found == {
        "arc_challenge": (0, 0.5, 128, False),
        "piqa": (0, 0.5, 128, False),
        "hellaswag": (0, 0.5, 128, False),
        "gpqa_main_n_shot": (5, 0.5, 128, False),
        "winogrande": (5, 0.0, 128, False),
        "mmlu": (5, 0.0, 1, False),
        "cmmlu": (5, 0.0, 1, False),
        "ceval-valid": (5, 0.0, 1, False),
        "humaneval": (0, 0.0, 128, True),
        "mbpp": (3, 0.0, 128, True),
    }


def test_matched_pairs_have_the_same_widths():
    shape = {}
    for name in ("Qwen/Qwen2.5-7B", "Dream-org/Dream-v0-Base-7B", "google/gemma-4-26B-A4B-it"):
        shape[name] = find_ffns(build(find_architecture(name)))
    shape["google/diffusiongemma-26B-A4B-it"] = find_ffns(build(find_architecture("google/diffusiongemma-26B-A4B-it")))
    kinds = {name: {(f.d_model, f.d_ffn, f.experts) for f in ffns} for name, ffns in shape.items()}
    assert kinds["Qwen/Qwen2.5-7B"] == kinds["Dream-org/Dream-v0-Base-7B"] == {(3584, 18944, 0)}
    gemma = {(2816, 2112, 0), (2816, 704, 128)}
    assert kinds["google/gemma-4-26B-A4B-it"] == kinds["google/diffusiongemma-26B-A4B-it"] == gemma


def test_every_field_is_explained_where_it_is_used():
    text = "\n".join(path.read_text() for path in STUDIES)
    fields = {*StudyConfig.model_fields, *ModelConfig.model_fields, *TaskSpec.model_fields, *RuleConfig.model_fields}
    told = set(re.findall(r"^\s*(?:- )?(?:- )?(\w+):[^\n]*#", text, re.MULTILINE))
    told |= {"text"} if "`text: FILE`" in text else set()
    assert fields - told - {"models"} == set()


def test_the_bench_has_the_published_shapes():
    published = {
        "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
        "llada-8b": "GSAI-ML/LLaDA-8B-Base",
        "qwen2.5-7b": "Qwen/Qwen2.5-7B",
        "dream-7b": "Dream-org/Dream-v0-Base-7B",
    }
    for name, model in published.items():
        shape, config = SHAPES[name], descriptions()[model]["config"]
        hidden = config.get("hidden_size") or config["d_model"]
        heads = config.get("num_attention_heads") or config["n_heads"]
        assert (shape.hidden, shape.heads, shape.vocabulary) == (hidden, heads, config["vocab_size"])
        assert shape.ffn == (config.get("intermediate_size") or config["mlp_hidden_size"])
        assert shape.layers == (config.get("num_hidden_layers") or config["n_layers"])
        assert shape.kv_heads == (config.get("num_key_value_heads") or config["n_kv_heads"])
    config = json.loads((CONFIGS.parent / "dllm_sparsity/pair/diffusion/config.json").read_text())
    own = SHAPES["embedded"]
    assert (own.hidden, own.ffn, own.layers) == tuple(
        config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    assert (own.heads, own.head_dim, own.vocabulary) == tuple(
        config[key] for key in ("num_attention_heads", "head_dim", "vocab_size")
    )


def test_the_yaml_files_are_plain():
    for path in STUDIES:
        assert isinstance(yaml.safe_load(path.read_text()), dict)
        assert max(map(len, path.read_text().splitlines())) <= 122
