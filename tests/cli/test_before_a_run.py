"""compare --dry-run and --offline: what is printed, and that nothing is run, written, loaded or looked up."""

import json
import shutil
import socket
import subprocess
import sys

import pytest
import torch
import yaml

from dllm_sparsity.cli.dry_run_table import duration
from dllm_sparsity.errors import UserError
from dllm_sparsity.study.engines.ray import check_reachable

REFUSE_NETWORK = """
import socket, sys
asked = []
def refuse(*arguments, **keys):
    asked.append(arguments)
    raise OSError("no network")
socket.getaddrinfo = refuse
socket.socket.connect = refuse
from dllm_sparsity.cli.main import main
sys.argv = ["dllm-sparsity", *sys.argv[1:]]
try:
    main()
finally:
    print("lookups", len(asked), file=sys.stderr)
"""


@pytest.fixture
def path(study, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({**study, "tasks": study["tasks"][:2]}))
    return file


def test_a_dry_run_ends_with_the_command_and_writes_nothing(run, path, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run("compare", path, "--limit", "2", "--dry-run")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"nothing was run or written; to run it: dllm-sparsity compare {path} --limit 2"
    for part in ("cells: 20", "dense FLOPs", "estimated disk", "without pairing", "FLOPs a token", "three timed steps"):
        assert part in " ".join(out.split())
    assert max(len(line) for line in out.splitlines()[:-1]) <= 80
    assert [file.name for file in tmp_path.iterdir()] == ["study.yaml"]


def test_a_dry_run_as_json_and_with_a_problem(run, path):
    fields = yaml.safe_load(path.read_text())
    fields["rules"][0]["strengths"] = [1.0]
    path.write_text(yaml.safe_dump(fields))
    code, out, _ = run("compare", path, "--dry-run", "--json")
    found = json.loads(out)
    assert code == 1
    assert any("dense setting" in problem for problem in found["problems"])
    saved = next(row for row in found["saved"] if row["site"] == "all" and row["sparsity"] == 0.5)
    assert saved["ffn"] == pytest.approx(0.5)
    assert 0 < saved["whole_model"] < 0.5


def test_a_dry_run_says_a_problem_once_and_gives_no_command_for_it(run, path, monkeypatch):
    fields = yaml.safe_load(path.read_text())
    fields["models"][0]["model"] = "nobody/nothing"
    path.write_text(yaml.safe_dump({**fields, "models": fields["models"][:1]}))
    code, out, _ = run("compare", path, "--dry-run")
    assert code == 1
    assert out.count("nobody/nothing") == 1
    assert "to run it" not in out
    assert json.loads(run("compare", path, "--dry-run", "--json")[1])["command"] is None


def test_a_dry_run_of_a_search_knows_its_cells_and_disk_and_breaks_no_word(run, path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    fields = yaml.safe_load(path.read_text())
    fields["rules"], fields["search"] = [{"name": "top_p", "sites": ["input"]}], {"layerwise": False}
    fields["models"] = [{**fields["models"][0], "label": "a long name of a model"}]
    fields["tasks"] = [{"name": "heldout_continuation", "limit": 3}, {"name": "heldout_text", "limit": 70}]
    path.write_text(yaml.safe_dump(fields))
    code, out, _ = run("compare", path, "--dry-run")
    assert code == 0
    assert "cells: about" in out
    assert "estimated disk: not known" not in out
    assert any(word.endswith("continuation") for word in out.split())
    assert "heldout_text" in out.split()
    parts = json.loads(run("compare", path, "--dry-run", "--json")[1])["parts"]
    assert all(5 < part["runs"] < 9 for part in parts)


@pytest.mark.parametrize(("seconds", "written"), [(0.01, "<0.1 s"), (1.26, "1.3 s"), (90, "1.5 min"), (36e4, "100 h")])
def test_times_are_in_units_that_people_read(seconds, written):
    assert duration(seconds) == written


def test_what_is_missing_offline_is_named_before_a_weight_is_read(run, path, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def refuse(*arguments, **keys):
        raise AssertionError("weights were asked for")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    fields = yaml.safe_load(path.read_text())
    fields["models"][0]["model"] = "nobody/nothing"
    fields["tasks"].append({"name": "piqa"})
    path.write_text(yaml.safe_dump(fields))
    code, _, err = run("compare", path, "--offline")
    assert code == 1
    assert "nobody/nothing is not on this machine: config.json, model.safetensors, its tokenizer" in err
    assert "the data of task piqa is not on this machine" in err
    assert f"dllm-sparsity fetch {path}" in err
    assert not (tmp_path / "runs").exists()
    code, out, _ = run("check", path, "--offline")
    assert code == 1
    assert "problem: the data of task piqa is not on this machine" in out
    assert run("fetch", path, "--offline")[0] == 1


def test_a_dry_run_offline_refuses_what_the_run_refuses(run, path, material, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    fields = yaml.safe_load(path.read_text())
    fields["models"] = fields["models"][:1]
    fields["tasks"] = [fields["tasks"][0], {"name": "piqa"}]
    path.write_text(yaml.safe_dump(fields))
    code, out, _ = run("compare", path, "--dry-run", "--offline")
    assert code == 1
    assert out.count("piqa is not on this machine") == 1
    assert "problem: the data of task piqa is not on this machine; with a network, first: dllm-sparsity fetch" in out
    assert f"fetch {path}" in out
    assert "cannot be loaded" not in out
    assert "to run it" not in out
    code, out, _ = run("compare", path, "--dry-run")
    assert code == 1
    assert "problem: task piqa cannot be loaded" in out


def test_a_folder_of_pickles_is_refused_alike_everywhere(run, path, material, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(material / "ar", folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    fields = yaml.safe_load(path.read_text())
    fields["models"].append({"paradigm": "autoregressive", "model": str(folder)})
    path.write_text(yaml.safe_dump(fields))
    refusal = f"{folder} has no safetensors weights; pickles are never loaded"
    for arguments in (["check", path], ["compare", path, "--dry-run"], ["compare", path]):
        code, out, err = run(*arguments)
        assert code == 1
        assert (out + err).count(refusal) == 1
        assert "to run it" not in out
    assert not (tmp_path / "runs").exists()
    (folder / "pytorch_model.bin").unlink()
    for arguments in (["compare", path, "--dry-run"], ["compare", path]):
        code, out, err = run(*arguments)
        assert code == 1
        assert "lacks model.safetensors" in out + err


@pytest.mark.parametrize(
    "arguments",
    [
        ["fetch", "{path}", "--offline"],
        ["compare", "{path}", "--offline", "--out", "{out}"],
        ["eval", "--offline", "--model", "sparse-ar", "--tasks", "piqa", "--model_args", "pretrained={ar}"],
    ],
    ids=["fetch", "compare", "eval"],
)
def test_nothing_is_looked_up(path, material, tmp_path, monkeypatch, arguments):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    fields = yaml.safe_load(path.read_text())
    small = {
        "models": fields["models"][:1],
        "tasks": fields["tasks"][:1],
        "rules": [{"name": "top_p", "strengths": [0.9]}],
    }
    path.write_text(yaml.safe_dump(small))
    given = [part.format(path=path, out=tmp_path / "out", ar=material / "ar") for part in arguments]
    done = subprocess.run(
        [sys.executable, "-c", REFUSE_NETWORK, *given], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert "lookups 0" in done.stderr
    assert done.returncode == (1 if given[0] == "eval" else 0), done.stderr
    if given[0] == "eval":
        assert "piqa cannot be loaded" in done.stderr
        assert "Loading weights" not in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--track", "wandv"], "unknown tracker 'wandv'; did you mean wandb?"),
        (["--engine", "rai"], "unknown engine 'rai'"),
        (["--engine", "ray", "--device", "cuda:0"], "device cuda:0 for a cluster"),
        (["--engine", "slurm", "--engine-option", "cluster=slurm"], "SLURM cannot be used"),
        (["--device", "cuda:77"], "cuda:77"),
        (["--fail-if", "critical.x"], "compares nothing"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(run, path, monkeypatch, options, message):
    monkeypatch.setattr("dllm_sparsity.study.dry_run.dry_run", lambda *_: pytest.fail("it came to the work"))
    code, out, err = run("compare", path, "--dry-run", *options)
    assert (code, out) == (1, "")
    assert message in err
    assert len(err.splitlines()) == 2


@pytest.mark.parametrize("extra", ["ray", "submitit", "trackio"])
def test_a_dry_run_wants_the_extras_that_the_run_wants(run, path, monkeypatch, extra):
    monkeypatch.setitem(sys.modules, extra, None)
    options = ["--track", "trackio"] if extra == "trackio" else ["--engine", "ray" if extra == "ray" else "slurm"]
    code, _, err = run("compare", path, "--dry-run", *options)
    assert code == 1
    assert f"{extra} is not installed" in err
    assert "pip install '.[" in err


def test_a_dry_run_names_the_conditions_that_cannot_be_asked(run, path):
    good = "critical.tiny_choice.input.diffusion.low < 0.1 or difference.tiny_choice.all > 0.5 or counts.cells > 1"
    code, out, _ = run("compare", path, "--dry-run", "--fail-if", good)
    assert code == 0, out
    code, out, _ = run("compare", path, "--dry-run", "--fail-if", f"{good} or critical.tiny_choice.input.difusion < 1")
    assert code == 1
    out = " ".join(out.split())
    assert (
        "the summary will have no critical.tiny_choice.input.difusion; did you mean critical.tiny_choice.input" in out
    )
    assert out.count("will have no") == 1


def test_a_name_of_several_is_refused_and_the_long_one_is_not(run, path):
    fields = yaml.safe_load(path.read_text())
    fields["rules"].append({"name": "top_k", "strengths": [0.5], "sites": ["input"]})
    path.write_text(yaml.safe_dump(fields))
    code, out, _ = run("compare", path, "--dry-run", "--fail-if", "difference.tiny_choice.input < 0")
    assert code == 1
    told = "several share that name; write difference.tiny_choice.input.RULE.QUALITY.AUTOREGRESSIVE.DIFFUSION"
    assert f"will have no difference.tiny_choice.input: {told}" in " ".join(out.split())
    long = "difference.tiny_choice.input.top_k.acc.ar.dm.high < 0 or critical.tiny_choice.input.diffusion.dm.top_k < 1"
    assert run("compare", path, "--dry-run", "--fail-if", long)[0] == 0
    for wrong in ("difference.tiny_choice.input.top_k.acc < 0", "difference.tiny_choice.all.hgih < 0"):
        assert run("compare", path, "--dry-run", "--fail-if", wrong)[0] == 1


def test_a_rule_in_two_entries_is_one_curve_to_ask_about(run, path):
    fields = yaml.safe_load(path.read_text())
    fields["rules"].append({"name": "top_p", "strengths": [0.25], "sites": ["input"]})
    path.write_text(yaml.safe_dump(fields))
    assert run("compare", path, "--dry-run", "--fail-if", "difference.tiny_choice.input < 0")[0] == 0


def test_a_run_refuses_a_condition_that_cannot_be_asked(run, path, tmp_path):
    code, out, err = run("compare", path, "--fail-if", "critical.tiny_choice.input.difusion < 1")
    assert (code, out) == (1, "")
    assert "will have no critical.tiny_choice.input.difusion; did you mean critical.tiny_choice.input" in err
    assert len(err.splitlines()) == 2
    assert not (tmp_path / "runs").exists()


def test_the_estimated_time_is_divided_over_workers(run, path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    pytest.importorskip("submitit")
    jobs = ["--engine", "slurm", "--engine-option", "cluster=local", "--workers", "5", "--gpus-per-worker", "2"]
    code, out, _ = run("compare", path, "--dry-run", *jobs)
    assert code == 0
    assert "on 5 workers like this machine" in out
    assert out.splitlines()[-1].endswith(f"dllm-sparsity compare {path} {' '.join(jobs)}")
    found = json.loads(run("compare", path, "--dry-run", "--json", *jobs)[1])
    assert found["workers"] == 5
    assert found["totals"]["wall_seconds"] == pytest.approx(found["totals"]["seconds"] / 5)
    if not torch.cuda.is_available():
        assert "on 3 workers, which share these threads" in run("compare", path, "--dry-run", "--workers", "3")[1]


def test_offline_names_the_model_and_a_command_where_no_file_was_given(run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    code, _, err = run("compare", "--ar", "nobody/x", "--text", __file__, "--strength", "0.9", "--offline")
    assert code == 1
    assert "nobody/x is not on this machine" in err
    assert "hf download nobody/x" in err


def test_a_dead_cluster_is_named_soon(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        check_reachable(None)
    with pytest.raises(UserError, match="answers at ray://127"):
        check_reachable("ray://127.0.0.1:1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_reachable(f"127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    check_reachable(None)
