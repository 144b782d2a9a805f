"""dllm-sparsity check: what it shows, what it finds wrong, and that it reads no weight."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dllm_sparsity.errors import UserError
from dllm_sparsity.study import architectures, check, check_tasks
from dllm_sparsity.study.check_search import check_search
from dllm_sparsity.study.config import RuleConfig, SearchConfig, TaskSpec, build_config, read_config
from dllm_sparsity.study.tasks import load_tasks

ROOT = Path(__file__).parents[2]
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_inner": 64, "n_layer": 3, "n_head": 4, "vocab_size": 100}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def study(**changes):
    fields = {
        "models": [{"paradigm": "autoregressive", "model": "embedded:autoregressive"}],
        "tasks": [{"name": "easy_endings"}],
        "rules": [{"name": "top_p", "strengths": [0.9]}],
    }
    return {**fields, **changes}


def problems(**changes):
    return check.check_study(build_config(study(**changes))).problems


def ar(model, **more):
    return {"models": [{"paradigm": "autoregressive", "model": str(model), **more}]}


def dm(model, **more):
    return {"models": [{"paradigm": "diffusion", "model": str(model), **more}]}


def rules(**more):
    return {"rules": [{"name": "top_p", "strengths": [0.9], **more}]}


def write(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_good_study_is_shown_in_eighty_columns(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    files = [ROOT / "configs/llada_vs_llama.yaml", ROOT / "configs/paper/qwen3_moe.yaml"]
    code, out, _ = run("check", *files)
    assert code == 0
    for part in (
        "LLaDA-8B-Base",
        "4096 x 12288",
        "16.0 GB bf16",
        "126336",
        "128 of 2048 x 768",
        "configuration: shipped description",
        "sites on every layer: input, gate, up, intermediate",
        "76 cells",
        "OK",
    ):
        assert part in out
    paths = [str(path) for path in files]
    assert max(len(line) for line in out.splitlines() if line not in paths) <= 80


def test_no_weight_is_read(run, monkeypatch, tmp_path):
    def refuse(*arguments, **keys):
        raise AssertionError("weights were asked for")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    monkeypatch.setattr("safetensors.safe_open", refuse)
    code, _, _ = run("check", ROOT / "dllm_sparsity/pair/study.yaml")
    assert code == 0


def test_json_has_everything(run):
    path = ROOT / "configs/dream_vs_qwen2.5.yaml"
    code, out, _ = run("check", path, "--json")
    found = json.loads(out)[str(path)]
    assert code == 0
    assert found["problems"] == []
    qwen, dream = found["models"]
    assert (dream["layers"], dream["mask_token"], dream["widths"]) == (28, "151666", [[3584, 18944, 0]])
    assert qwen["gigabytes"]["float32"] == pytest.approx(2 * qwen["gigabytes"]["bfloat16"])


def test_each_problem_is_one_line_and_the_exit_code_is_one(run, tmp_path):
    folder = write(tmp_path / "gpt2", GPT2)
    path = tmp_path / "bad.yaml"
    path.write_text(
        yaml.safe_dump(study(**ar(folder), tasks=[{"name": "easy_ending"}], **rules(sites=["gate"], layers=[0, 9])))
    )
    code, out, _ = run("check", path)
    assert code == 1
    lines = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert len(lines) == 3
    assert any("did you mean easy_endings?; list them with: dllm-sparsity ls tasks" in line for line in lines)
    assert out.splitlines()[-3:] == lines
    assert "OK" not in out.splitlines()


def test_problems_are_wrapped_on_a_terminal_alone(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(study(tasks=[{"name": "easy_ending"}])))
    assert max(map(len, run("check", path)[1].splitlines())) > 80
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = re.sub(r"\x1b\[[0-9;]*m", "", run("check", path)[1])
    assert "problem: " in out
    assert max(len(line) for line in out.splitlines() if line != str(path)) <= 80


def test_a_study_that_cannot_be_read_is_two_lines(run, tmp_path):
    (tmp_path / "typo.yaml").write_text("modles: []")
    code, out, err = run("check", tmp_path / "typo.yaml")
    assert (code, out) == (1, "")
    assert len(err.strip().splitlines()) == 2
    assert "did you mean models?" in err


def test_one_broken_file_does_not_hide_the_others(run, tmp_path):
    (tmp_path / "typo.yaml").write_text("modles: []")
    code, out, _ = run("check", tmp_path / "typo.yaml", ROOT / "dllm_sparsity/pair/study.yaml")
    assert code == 1
    assert "did you mean models?" in out
    assert "OK" in out


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom dllm_sparsity.cli.main import cli\n"
        "assert CliRunner().invoke(cli, ['check', '-h']).exit_code == 0\n"
        "print([name for name in ('torch', 'transformers', 'lm_eval', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_plain_ffn_has_no_gate(tmp_path):
    folder = write(tmp_path / "gpt2", GPT2)
    assert problems(**ar(folder)) == ()
    (line,) = problems(**ar(folder), **rules(sites=["gate"]))
    assert "no site gate in layers 0-2: a plain FFN has no gate" in line


def test_layers_without_ffn_are_named():
    architecture = architectures.find_architecture("Qwen/Qwen3-30B-A3B")
    from dllm_sparsity.families import find_ffns

    ffns = find_ffns(architectures.build(architecture))
    rule = RuleConfig(name="top_p", strengths=(0.9,), sites=("all",))
    assert check.coverage(ffns, 48, [rule]) == []
    assert check.coverage(ffns[:36], 48, [rule]) == ["12 of 48 layers have no FFN that is known: 36-47"]
    assert check.coverage([*ffns[:3], *ffns[4:]], 48, [rule]) == ["1 of 48 layers have no FFN that is known: 3"]
    assert check.coverage(ffns, 47, [rule]) == ["layers beyond the 47 that the configuration promises: 47"]


def test_a_layer_whose_ffn_is_of_no_known_form_is_named(monkeypatch):
    from torch import nn

    build = architectures.build

    def broken(*arguments):
        model = build(*arguments)
        model.get_submodule("model.layers.2").mlp = nn.Linear(8, 8, device="meta")
        return model

    monkeypatch.setattr(check, "build", broken)
    (line,) = problems(**ar("Qwen/Qwen2.5-0.5B"))
    assert "layers 2 of model.layers have no FFN of a known form" in line


def test_a_rule_on_some_layers_says_which_stay_dense():
    found = check.check_study(
        build_config(study(**ar("Qwen/Qwen3-30B-A3B"), **rules(layers=list(range(36)), sites=["all"])))
    )
    assert found.problems == ()
    assert found.notes == ("Qwen3-30B-A3B: rule top_p acts on 36 of 48 layers and leaves 36-47 dense",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (rules(layers=[4, 5, 6]), "no such layers: 5-6; it has 0-4"),
        (rules(layers=[]), "its list of layers is empty"),
        ({"rules": [{"name": "top_p", "strengths": [1.0]}]}, "strength 1 is its dense setting"),
        ({"rules": [{"name": "top_p", "strengths": [1.5]}]}, "strength 1.5 is out of range"),
        (rules(parameters={"powr": 2}), "has no parameter 'powr'"),
        ({"tasks": [{"name": "arc_esy"}]}, "unknown task 'arc_esy'; did you mean arc_easy?"),
        ({"tasks": [{"name": "no.yaml"}]}, "no such task file"),
        ({"tasks": [{"name": "humaneval"}]}, "task humaneval runs code that the model wrote"),
        (dm("embedded:diffusion", confidence_threshold=0.5), "has no confidence threshold"),
        (dm("embedded:diffusion", sampler_options={"x": 1}), "has no option 'x'"),
        (dm("embedded:diffusion", mask_token="<nope>"), "mask token '<nope>' is not in the vocabulary"),
        (dm("embedded:diffusion", mask_token=8192), "mask token 8192 is not in the vocabulary"),
        (
            {"tasks": [{"name": "triviaqa"}], **dm("embedded:diffusion", block_length=48)},
            "task triviaqa: 256 new tokens do not divide into blocks of 48",
        ),
        (
            {"tasks": [{"name": "humaneval", "run_code": True}], **dm("embedded:diffusion", block_length=32, steps=40)},
            "task humaneval: 40 steps do not divide over 32 blocks",
        ),
        (dm("embedded:autoregressive"), "causal, not a diffusion model"),
        (ar("embedded:diffusion"), "bidirectional, not autoregressive"),
        (ar("/no/such/folder"), "no such folder"),
        (ar("nobody/nothing"), "is not on this machine and HF_HUB_OFFLINE is set"),
        (dm("GSAI-ML/LLaDA-8B-Base"), "its code comes with its weights; read it, then set trust_remote_code"),
        (dm("GSAI-ML/LLaDA-8B-Base", trust_remote_code=True, mask_token=200000), "not in the vocabulary"),
        (dm("google/diffusiongemma-26B-A4B-it"), "no mask token is known"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_found_wrong(changes, message):
    found = problems(**changes)
    assert any(message in line for line in found), found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": [{"paradigm": "diffusion", "model": "embedded:diffusion", "sampler": "entropi"}]}, "mean entropy?"),
        (rules(sites=["intermediat"]), "did you mean intermediate?"),
        ({"rules": [{"name": "topp", "strengths": [0.9]}]}, "did you mean top_p?"),
    ],
    ids=["sampler", "site", "rule"],
)
def test_wrong_names_are_two_lines(run, tmp_path, changes, message):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(study(**changes)))
    code, out, err = run("check", tmp_path / "bad.yaml")
    assert (code, out) == (1, "")
    assert message in err
    assert len(err.strip().splitlines()) == 2


def test_diffusion_gemma_is_covered_in_both_stacks_and_needs_its_pipeline():
    found = check.check_study(build_config(study(**dm("google/diffusiongemma-26B-A4B-it"))))
    (model,) = found.models
    assert (model.layers, model.stacks, model.ok) == (30, 2, False)
    assert model.widths == ((2816, 2112, 0), (2816, 704, 128))
    assert len(found.problems) == 2
    assert all("pipeline: diffusion_gemma" in line for line in found.problems)
    with_pipeline = dm("google/diffusiongemma-26B-A4B-it")
    with_pipeline["models"][0]["pipeline"] = "diffusion_gemma"
    found = check.check_study(build_config(study(**{**with_pipeline, "tasks": [{"name": "gsm8k"}]})))
    assert found.problems == ()
    assert found.models[0].ok
    found = check.check_study(build_config(study(**{**with_pipeline, "tasks": [{"name": "piqa"}, {"name": "gsm8k"}]})))
    assert found.problems == (f"{found.models[0].name}: task piqa scores likelihoods, which this model has none of",)


def test_a_chat_template_is_looked_up_where_a_task_asks_for_one(tmp_path, material):
    chat = [{"name": "easy_endings", "chat_template": True}]
    found = check.check_study(build_config(study(tasks=chat)), here=True)
    assert found.problems == ("autoregressive: its tokenizer has no chat template; turn chat_template off",)
    folder = tmp_path / "ar"
    shutil.copytree(material / "ar", folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert check.check_study(build_config(study(tasks=chat, **ar(folder))), here=True).problems == ()
    (away,) = dm("GSAI-ML/LLaDA-8B-Base", trust_remote_code=True).values()
    found = check.check_study(build_config(study(tasks=chat, models=away)), here=True)
    assert any("chat template was not looked up" in note for note in found.notes)


def test_a_folder_that_is_not_whole_is_noted(tmp_path, material):
    folder = tmp_path / "ar"
    shutil.copytree(material / "ar", folder)
    (folder / "model.safetensors").unlink()
    found = check.check_study(build_config(study(**ar(folder))), here=True)
    assert found.notes == ("ar: its folder lacks model.safetensors",)
    assert found.models[0].lacking is None


def test_data_that_is_not_here_is_noted(run, tmp_path, monkeypatch):
    from datasets import DatasetInfo

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "data"))
    path = tmp_path / "study.yaml"
    names = ("piqa", "arc_easy", "squadv2", "easy_endings")
    path.write_text(yaml.safe_dump(study(tasks=[{"name": name} for name in names])))
    code, out, _ = run("check", path)
    said = " ".join(out.split())
    assert code == 0
    assert "files of models: on this machine" in said
    assert "note: the data of task piqa, arc_easy is not on this machine, and the hub is not asked offline" in said
    assert "note: the data of task squadv2 was not looked for: code of its own gets it" in said
    for place, name in (("baber___piqa", "default"), ("allenai___ai2_arc", "ARC-Easy")):
        folder = tmp_path / "data" / place / name / "0.0.0" / "0123"
        folder.mkdir(parents=True)
        DatasetInfo(config_name=name).write_to_directory(str(folder))
    assert "is not on this machine" not in run("check", path)[1]


def test_offline_data_that_is_not_here_is_a_problem_of_its_task(run, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "data"))
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study(tasks=[{"name": "piqa"}, {"name": "arc_esy"}])))
    code, out, _ = run("check", path, "--offline")
    assert code == 1
    assert "problem: the data of task piqa is not on this machine" in out
    assert out.count("arc_esy") == 2  # what is wrong with it, once as typed and once suggested


def test_weights_that_do_not_fit_are_noted(monkeypatch):
    found = check.check_study(build_config(study()), here=True)
    assert (found.notes, found.models[0].lacking) == ((), 0)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"total": 10**7}))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (note,) = check.check_study(build_config(study()), here=True).notes
    assert "the memory of cpu here is 0.0 GB; use a smaller dtype" in note


@pytest.mark.parametrize("device", ["cuda:7", "cuda:x", "cuda"])
def test_memory_of_a_device_that_is_not_here_is_not_asked_for(device, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: device != "cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert check.check_study(build_config(study(device=device)), here=True).notes == ()


def test_an_index_that_cannot_be_read_hides_nothing_else(tmp_path, material):
    folder = tmp_path / "ar"
    shutil.copytree(material / "ar", folder)
    (folder / "model.safetensors.index.json").write_text("{")
    models = [*ar(folder)["models"], *dm("embedded:nothing")["models"]]
    found = check.check_study(build_config(study(models=models)), here=True)
    assert [line.partition(":")[0] for line in found.problems] == ["nothing", "ar"]


def test_a_configuration_from_the_hub_comes_before_the_shipped_one(monkeypatch, tmp_path):
    config = {**architectures.descriptions()["Qwen/Qwen2.5-0.5B"]["config"], "num_hidden_layers": 3}
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: str(tmp_path / "config.json"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = architectures.find_architecture("Qwen/Qwen2.5-0.5B")
    assert (found.source, found.layers) == ("hub", 3)


def test_the_length_of_a_generation_is_the_backends(material):
    from dllm_sparsity.study.config import ModelConfig
    from dllm_sparsity.study.models import open_backend

    lm = open_backend(ModelConfig(paradigm="autoregressive", model=str(material / "ar")), "cpu", 0)
    assert lm.max_gen_toks == check_tasks.MAX_NEW_TOKENS


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    asked = []

    def unreachable(url, **keys):
        asked.append(url)
        raise ConnectionError("no route")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("dllm_sparsity.lm.hub._answers", {})
    for name in ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B"):
        assert architectures.find_architecture(name).source == "shipped description"
    assert len(asked) == 1


def test_a_gated_model_is_described_by_what_is_shipped(monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    def gated(*arguments, **keys):
        raise GatedRepoError.__new__(GatedRepoError)  # made without the response that it would describe

    monkeypatch.setattr("huggingface_hub.hf_hub_download", gated)
    assert architectures.find_architecture("meta-llama/Llama-3.1-8B").source == "shipped description"


def test_code_of_a_folder_is_run_only_where_it_is_trusted(tmp_path):
    llada = {**architectures.descriptions()["GSAI-ML/LLaDA-8B-Base"]["config"], "auto_map": {"AutoModel": "m.M"}}
    folder = write(tmp_path / "llada", llada)
    found = architectures.find_architecture(str(folder))
    assert (found.source, found.remote_code, found.bidirectional) == ("folder", True, True)
    assert isinstance(architectures.build(found), architectures.LladaSkeleton)
    other = write(tmp_path / "other", {"model_type": "nobody_knows", "num_hidden_layers": 2, "auto_map": {}})
    (line,) = problems(**ar(other))
    assert "transformers does not know" in line


@pytest.mark.parametrize(("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2], "0-2"), ([0, 2, 3, 9], "0, 2-3, 9")])
def test_ranges(numbers, text):
    assert check.ranges(numbers) == text


def test_a_quality_that_no_task_has_and_an_unknown_device_are_refused():
    (found,) = problems(search={"quality": "foo"})
    assert found == "task easy_endings has no quality 'foo' to search on; it has: acc_token, acc, nll"
    assert not problems(search={"quality": "accuracy"})
    assert not problems(search={"quality": "acc_token"})
    assert problems(tasks=[{"name": "heldout_text"}], search={"quality": "acc"})
    assert problems(device="tpu") == ("unknown device 'tpu'; give cpu, cuda or cuda:0",)


def test_a_budget_that_ends_before_an_answer_is_refused():
    (task,) = load_tasks(TaskSpec(name="easy_endings", limit=40), 0)
    with pytest.raises(UserError, match="takes 80 item-evaluations: its first 40 items"):
        check_search(SearchConfig(budget=79), [task])
    check_search(SearchConfig(budget=80), [task])
    (task,) = load_tasks(TaskSpec(name="easy_endings"), 0)
    with pytest.raises(UserError, match="takes 128"):
        check_search(SearchConfig(budget=3), [task])
    with pytest.raises(UserError, match="no quality 'foo'"):
        check_search(SearchConfig(quality="foo"), [task])


def test_check_refuses_a_budget_as_the_run_does_and_leaves_the_cells_to_the_search(run, tmp_path):
    path = tmp_path / "study.yaml"
    fields = study(tasks=[{"name": "easy_endings", "limit": 100}], search={"budget": 60}, rules=[{"name": "top_p"}])
    path.write_text(yaml.safe_dump(fields))
    code, out, _ = run("check", path)
    assert code == 1
    assert "problem: search.budget is 60, and the smallest search on easy_endings takes 128" in out
    assert "; the search chooses its cells" in out
    assert "0 cells" not in out
    assert run("compare", path, "--dry-run")[1].count("the smallest search on easy_endings takes 128") == 1
    fields["tasks"][0]["limit"] = 30
    path.write_text(yaml.safe_dump(fields))
    assert run("check", path)[0] == 0
    fields["tasks"][0]["name"] = "piqa"
    path.write_text(yaml.safe_dump(fields))
    code, out, _ = run("check", path)
    assert code == 0
    assert "whether search.budget is enough for task piqa was not looked at" in " ".join(out.split())


def test_keys_that_an_anchor_brings_along_are_not_given_twice(tmp_path):
    (tmp_path / "study.yaml").write_text(
        "name: a\nrules:\n- &one {name: top_p, sites: [up], strengths: [0.9]}\n- &two {<<: *one, strengths: [0.8]}\n"
        "- {<<: *two, sites: [gate]}\n"
        "models: [{paradigm: autoregressive, model: 'embedded:autoregressive'}]\ntasks: [{name: easy_endings}]\n"
    )
    rules = read_config(tmp_path / "study.yaml").rules
    assert [(rule.sites, rule.strengths) for rule in rules] == [
        (("up",), (0.9,)),
        (("up",), (0.8,)),
        (("gate",), (0.8,)),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nseed: 1\nname: b\n", "name is given twice, again in line 3"),
        ("models: [{model: m, model: n}]\n", "model is given twice, again in line 1"),
        ("models: []\n", "models: give at least 1"),
        ("search: true\n", "search: give fields, each as name: value"),
        ("search: {retentions: [99]}\n", "between 0 and 1; for 99 % give 0.99"),
        ("rules: top_p\n", "rules: give a list, such as [a, b]"),
        ("rules: [{name: top_p}]\n", "study.yaml: give each rule at least one of strengths"),
        ("rules: [{name: top_p, sites: [up, up]}]\nsearch: {}\n", "rule top_p would be searched twice at up; give it"),
        ("seed: 9223372036854775808\n", "seed: should be less than 9223372036854775808"),
        ("name: ..\n", "name: take letters, digits, and . _ - behind"),
    ],
)
def test_wrong_fields_are_told_in_plain_words(tmp_path, text, message):
    fields = study()
    name = text.partition(":")[0]
    rest = "".join(yaml.safe_dump({key: own}) for key, own in fields.items() if key != name)
    path = tmp_path / "study.yaml"
    path.write_text(text + rest)
    with pytest.raises(UserError) as caught:
        read_config(path)
    assert message in caught.value.message
    assert "Input" not in caught.value.message
