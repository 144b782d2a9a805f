"""What a run remembers of where it ran: enough to run it again, and nothing about who ran it."""

import getpass
import json
import subprocess
from importlib.metadata import distributions
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


@pytest.fixture
def repositories(tmp_path):
    """A clone with a package in it, an unrelated repository, and its commits."""
    commits = {}
    for name in ("clone", "unrelated"):
        (tmp_path / name / "package").mkdir(parents=True)
        (tmp_path / name / "package" / "__init__.py").write_text(name)
        git(tmp_path / name, "init")
        git(tmp_path / name, "add", ".")
        git(tmp_path / name, "commit", "-m", name)
        commits[name] = environment.git_state(tmp_path / name)["commit"]
    (tmp_path / "nowhere").mkdir()
    return tmp_path, commits["clone"], commits["unrelated"]


def test_the_clone_of_the_package_is_not_taken_for_the_current_folder(repositories):
    path, ours, other = repositories
    package = path / "clone" / "package"
    for here in (path / "nowhere", path / "clone", package):
        found = environment.git_states(package, here)
        assert {name: state["commit"] for name, state in found.items()} == {"package": ours}
    found = environment.git_states(package, path / "unrelated")
    assert {name: state["commit"] for name, state in found.items()} == {"package": ours, "current_folder": other}
    (package / "__init__.py").write_text("changed")
    found = environment.git_states(package, path / "unrelated")
    assert [state["changed"] for state in found.values()] == [True, False]


def test_a_package_that_is_installed_into_a_repository_is_none_of_its_files(repositories):
    path, _, other = repositories
    installed = path / "unrelated" / ".venv" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert environment.git_states(installed, path / "nowhere") == {}
    found = environment.git_states(installed, path / "unrelated")
    assert {name: state["commit"] for name, state in found.items()} == {"current_folder": other}


def test_a_run_elsewhere_knows_the_clone_of_this_package(repositories, monkeypatch):
    monkeypatch.chdir(repositories[0] / "unrelated")
    package = Path(environment.__file__).parents[1]
    tracked = subprocess.run(["git", "-C", package, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True)
    states = environment.describe()["git"]
    assert ("package" in states) == (tracked.returncode == 0)
    assert states.get("package") == (environment.git_state(package) if tracked.returncode == 0 else None)
    assert states["current_folder"]["commit"] == repositories[2]


def test_packages_that_may_be_missing_and_plugins_are_known_where_installed(tmp_path, monkeypatch):
    info = tmp_path / "plugged_rules-3.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged-rules\nVersion: 3.1\n")
    (info / "entry_points.txt").write_text("[dllm_sparsity.rules]\nplugged = plugged:Plugged\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = environment.describe()["packages"]
    assert found["plugged-rules"] == "3.1"
    there = {each.name.lower(): each.version for each in distributions()}
    for name in ("peft", "bitsandbytes", "kernels", "ray", "submitit"):
        assert found.get(name) == there.get(name)


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
    assert found["weights"].split(maxsplit=1)[1] == ("of the hub's commit" if known else "of the files")
    assert found["dtype"] == "bfloat16"
