"""What a run remembers of where it ran: enough to run it again, and nothing about who ran it."""

import getpass
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from dllm_sparsity import compare
from dllm_sparsity.study import environment


def git(folder, *arguments):
    who = ["-c", "user.name=x", "-c", "user.email=x@y.z"]
    subprocess.run(["git", *who, "-C", folder, *arguments], check=True, capture_output=True)


def test_a_repository_by_its_commit_and_its_changes(tmp_path):
    assert environment.git_state(tmp_path) is None
    git(tmp_path, "init")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    clean = environment.git_state(tmp_path)
    assert not clean["changed"]
    assert len(clean["commit"]) == 40
    assert set(clean) == {"commit", "changed"}
    states = set()
    for text in ("2", "3", "2"):
        (tmp_path / "code.py").write_text(text)
        state = environment.git_state(tmp_path)
        assert state["changed"]
        states.add(state["difference"])
    assert len(states) == 2


def test_a_run_knows_its_model_its_data_and_its_machine(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {**study, "tasks": study["tasks"][:1], "seed": 5, "rules": [{"name": "top_p", "strengths": [0.9]}]}
    run = compare(small)
    cells = [json.loads(path.read_text()) for path in run.path.glob("cells/*/cell.json")]
    assert len(cells) == 6
    by = {}
    for cell in cells:
        found = cell["environment"]
        assert found["model"]["dtype"] == "float32"
        assert found["model"]["attention"] == "sdpa"
        assert found["seed"] == 5
        assert found["packages"]["torch"]
        assert found["torch"]["threads"] > 0
        by.setdefault(cell["paradigm"], set()).add((found["model"]["weights"], found["data"]["prompts"]))
    assert [len(own) for own in by.values()] == [1, 1]
    (ar,), (dm,) = by.values()
    assert ar[0] != dm[0]
    assert ar[1] == dm[1]


def test_neither_paths_nor_users_are_in_it():
    text = json.dumps(environment.describe("cpu", 0))
    home = Path.home()
    for private in (str(home), str(Path.cwd()), f"/{getpass.getuser()}/"):
        assert private not in text


def test_the_commit_of_a_data_set_is_read_from_its_files():
    commit = "b" * 40
    url = f"hf://datasets/org/data@{commit}/plain/test.parquet"
    info = SimpleNamespace(download_checksums={url: {"num_bytes": 1}, "/home/me/own.jsonl": {}})
    task = SimpleNamespace(dataset={"test": SimpleNamespace(info=info)})
    found = environment.describe_data(task, ["one", "two"])
    assert found["revisions"] == [f"org/data@{commit}"]
    assert found["prompts"] != environment.describe_data(task, ["two", "one"])["prompts"]


@pytest.mark.parametrize("known", [True, False])
def test_the_revision_is_the_commit_of_the_hub_where_known(known):
    import torch

    lm = SimpleNamespace(model=torch.nn.Linear(1, 1).bfloat16())
    weights = {"hub": "org/name", "commit": "c" * 40} if known else {"model.safetensors": "1"}
    found = environment.describe_model(environment.model_settings(lm), SimpleNamespace(revision="main"), weights)
    assert found["revision"] == ("c" * 40 if known else "main")
    assert found["dtype"] == "bfloat16"
