"""What a planner puts into fingerprints: each change of what a study is made of is there, under its own name."""

import importlib.util
import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from material import OTHER_DIFFUSION

import dllm_sparsity
from dllm_sparsity import registry
from dllm_sparsity.errors import UserError
from dllm_sparsity.study import environment
from dllm_sparsity.study.changes import _different
from dllm_sparsity.study.config import build_config
from dllm_sparsity.study.engines.planner import Planner
from dllm_sparsity.study.engines.runner import _check_same

PACKAGES = ("torch", "transformers", "tokenizers", "lm-eval", "datasets", "numpy", "dllm-sparsity")
CODE_ROOMS = ("sparsity", "families", "lm", "diffusion", "study", "tasks")


@pytest.fixture
def own(material, tmp_path):
    """A study whose models and task are files of its own, by the folder that holds them."""
    for name in ("ar", "dm"):
        shutil.copytree(material / name, tmp_path / name)
    (tmp_path / "items.jsonl").write_text("\n".join(json.dumps({"q": text}) for text in ("hello", "other", "words")))
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}},
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{q}}",
        "generation_kwargs": {"until": [], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


def study(folder):
    return {
        "models": [
            {"paradigm": "autoregressive", "model": str(folder / "ar"), "label": "a model"},
            {"paradigm": "diffusion", "model": str(folder / "dm"), "label": "another model"},
        ],
        "tasks": [{"name": str(folder / "mine.yaml"), "limit": 2}],
        "rules": [{"name": "top_p", "strengths": [0.9], "sites": ["input"]}],
    }


def planned(given, device="cpu"):
    """Return fingerprints and parts: of each model the dense cell, then the sparse one."""
    jobs = Planner(build_config(given), device).all()
    return [job.fingerprint for job in jobs], [job.parts for job in jobs]


def compared(before, after):
    """Return the fields in which any two cells differ; exactly those cells have another fingerprint."""
    fields = [set(_different(old, new)) for old, new in zip(before[1], after[1], strict=True)]
    assert [old != new for old, new in zip(before[0], after[0], strict=True)] == [bool(each) for each in fields]
    return set().union(*fields)


def leaves(parts, prefix=""):
    if not isinstance(parts, dict) or not parts:
        return {prefix}
    return {leaf for name, value in parts.items() for leaf in leaves(value, f"{prefix}.{name}".strip("."))}


def of_models(**fields):
    return lambda given, folder: [model.update(fields) for model in given["models"]]


def of_diffusion(**fields):
    return lambda given, folder: given["models"][1].update(fields)


def of_task(**fields):
    return lambda given, folder: given["tasks"][0].update(fields)


def of_rule(**fields):
    return lambda given, folder: given["rules"][0].update(fields)


def in_yaml(**fields):
    def change(given, folder):
        path = folder / "mine.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **fields}))

    return change


def in_items(given, folder):
    (folder / "items.jsonl").write_text((folder / "items.jsonl").read_text().replace("hello", "hallo"))


def swapped(given, folder):
    for model, other in zip(given["models"], ("diffusion", "autoregressive"), strict=True):
        model["paradigm"] = other


BOTH = {"revision": "v2", "trust_remote_code": True, "dtype": "bfloat16", "batch_size": 3, "max_length": 77}
CHANGES = [
    *((of_diffusion(**{name: value}), {f"model.{name}"}) for name, value in OTHER_DIFFUSION.items()),
    (of_diffusion(sampler_options={"alg_temp": 0.1}), {"model.sampler_options.alg_temp"}),
    (of_diffusion(pipeline="llada2"), {"model.pipeline", "model.packages"}),
    *((of_models(**{name: value}), {f"model.{name}"}) for name, value in BOTH.items()),
    (lambda given, folder: given["models"][0].update(label="renamed"), {"name"}),
    (lambda given, folder: given.update(seed=7), {"seed"}),
    (of_task(limit=1), {"limit", "task.documents"}),
    (of_task(num_fewshot=1), {"num_fewshot", "task.config", "task.documents"}),
    (of_task(chat_template=True), {"chat_template"}),
    (of_rule(name="top_k"), {"rule.name"}),
    (of_rule(strengths=[0.8]), {"rule.strength"}),
    (of_rule(sites=["intermediate"]), {"rule.site", "sites"}),
    (of_rule(layers=[0]), {"rule.layers"}),
    (of_rule(parameters={"ties": "minimal"}), {"rule.parameters.ties"}),
    (in_yaml(metadata={"version": 2}), {"task.version", "task.config"}),
    (in_yaml(task="mine_too"), {"task.name", "task.config"}),
    (in_yaml(doc_to_text="Say {{q}}"), {"task.config"}),
    (in_items, {"task.documents"}),
]  # fmt: skip
"""How a study is changed, and the fields that then differ."""


@pytest.mark.parametrize(("change", "fields"), CHANGES)
def test_what_a_study_asks_for_is_in_the_fields_of_its_name(own, change, fields):
    given = study(own)
    before = planned(given)
    assert compared(before, planned(study(own))) == set()
    change(given, own)
    assert compared(before, planned(given)) == fields


def test_nothing_is_in_a_fingerprint_that_no_test_changes(own):
    tried = {name for _, fields in CHANGES for name in fields}
    tried |= {name.rpartition(".")[0] for name in tried}  # a mapping that is empty here
    tried |= {f"versions.{name}" for name in (*PACKAGES, "code", "device")} | {"model.paradigm"}  # below
    tried |= {"model.pipeline_options"}  # which the laws of plans change
    found = set().union(*(leaves(parts) for parts in planned(study(own))[1]))
    assert {name for name in found if not name.startswith("weights.")} <= tried
    assert {name for name in tried if name.startswith(("versions.", "task."))} <= found


@pytest.mark.parametrize("name", PACKAGES)
def test_versions_of_packages_that_compute(own, monkeypatch, name):
    before = planned(study(own))
    monkeypatch.setattr(environment, "version", lambda asked: "0.0.1" if asked == name else version(asked))
    assert compared(before, planned(study(own))) == {f"versions.{name}"}


def test_versions_of_packages_that_compute_for_some_models(own, monkeypatch):
    given = study(own)
    given["models"][1]["pipeline"] = "llada2"
    settings = own / "ar" / "config.json"
    settings.write_text(
        json.dumps({**json.loads(settings.read_text()), "quantization_config": {"quant_method": "fp8"}})
    )
    numbers = dict.fromkeys(("diffusers", "kernels", "accelerate"), "1")
    monkeypatch.setattr(environment, "version", lambda asked: numbers.get(asked) or version(asked))
    before = planned(given)
    changed = {
        "diffusers": [False, False, True, True],
        "kernels": [True, True, False, False],
        "accelerate": [False] * 4,
    }
    for name, where in changed.items():
        numbers[name] = "2"
        after = planned(given)
        assert compared(before, after) == ({f"model.packages.{name}"} if any(where) else set())
        assert [old != new for old, new in zip(before[0], after[0], strict=True)] == where
        numbers[name] = "1"


@pytest.mark.parametrize(
    ("name", "told"), [("torch", "torch is 1 on a worker and 2 here"), ("code", "runs other code")]
)
def test_a_worker_with_other_packages_or_code_is_refused(name, told):
    here = {"packages": {"torch": "2", "numpy": "2"}, "code": "2"}
    there = {"packages": {"torch": "2"}, "code": "2"}
    _check_same(there, here, ["diffusers", "torch"])  # missing on both, and numpy is not asked for
    (there if name == "code" else there["packages"])[name] = "1"
    with pytest.raises(UserError, match=told):
        _check_same(there, here, ["diffusers", "torch"])
    with pytest.raises(UserError, match="diffusers is not installed on a worker and 3 here"):
        _check_same(there, {**here, "packages": {"diffusers": "3"}}, ["diffusers"])


def test_the_kind_of_device(own):
    assert compared(planned(study(own), "cpu"), planned(study(own), "cuda")) == {"versions.device"}


def test_the_paradigm(own):
    given = study(own)
    before = planned(given)
    swapped(given, own)
    assert "model.paradigm" in compared(before, planned(given))


def test_every_file_of_a_model(own):
    files = sorted(path for path in (own / "ar").iterdir() if path.suffix in (".json", ".safetensors"))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in files}
    for path in files:
        before = planned(study(own))
        with path.open("ab") as stream:
            stream.write(b"\n")
        assert compared(before, planned(study(own))) == {f"weights.{path.name}"}


def test_code_of_every_room_that_computes(tmp_path):
    package = Path(dllm_sparsity.__file__).parent
    for folder in (package, package.parent / "autoregressive"):
        shutil.copytree(folder, tmp_path / folder.name, ignore=lambda path, names: {
            name for name in names if not (Path(path, name).is_dir() or name.endswith(".py"))})  # fmt: skip
    spec = importlib.util.spec_from_file_location("copied", tmp_path / "dllm_sparsity/study/environment.py")
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    marks = [environment.code_identity(), copied.code_identity()]
    assert marks[0] == marks[1]
    for room in (*(tmp_path / "dllm_sparsity" / name for name in CODE_ROOMS), tmp_path / "autoregressive"):
        for path in sorted(room.rglob("*.py")):
            with path.open("a") as stream:
                stream.write("\n")
            marks.append(copied.code_identity())
    assert len(set(marks)) == len(marks) - 1
    (tmp_path / "dllm_sparsity/report/html.py").write_text("")
    assert copied.code_identity() == marks[-1]


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """An installed package that adds to the registry; each of its modules imports one of its own."""
    package = tmp_path / "site-packages" / "plugged"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    for name in ("rule", "inner_rule", "idle_rule", "sampler", "family", "backend"):
        (package / f"{name}.py").write_text(f"from plugged import {name}_core\n\nclass Plugged: pass\n")
        (package / f"{name}_core.py").write_text("X = 1\n")
    info = package.parent / "plugged-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[dllm_sparsity.rules]\nplugged = plugged.rule:Plugged\ninner = plugged.inner_rule:Plugged\n"
        "idle = plugged.idle_rule:Plugged\n[dllm_sparsity.samplers]\nplugged = plugged.sampler:Plugged\n"
        "[dllm_sparsity.families]\nplugged = plugged.family:Plugged\n"
    )
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setitem(registry.FIXED["backends"], "diffusion", "plugged.backend:Plugged")
    registry._targets.cache_clear()
    yield package
    monkeypatch.undo()
    registry._targets.cache_clear()


def test_code_of_other_packages_that_computes_in_a_study(own, plugin):
    given = study(own)
    given["rules"] = [{"name": "plugged", "strengths": [0.5], "sites": ["input"], "parameters": {"like": "inner"}}]
    given["models"][1]["sampler"] = "plugged"
    for name in ("rule", "inner_rule", "sampler", "family", "backend", "idle_rule"):
        for module in (name, f"{name}_core"):
            before = planned(given)
            with (plugin / f"{module}.py").open("a") as stream:
                stream.write("Y = 2\n")
            assert compared(before, planned(given)) == (set() if name == "idle_rule" else {"versions.code"})
