"""A run directory with what no run writes, in part or in place of files: named, made good, and of one study at a time."""

import json
import shutil

import pytest
from material import make_study
from test_resume import numbers

from dllm_sparsity import compare
from dllm_sparsity.analysis import load
from dllm_sparsity.errors import UserError
from dllm_sparsity.study.engines import Engine
from dllm_sparsity.study.records import checksums


@pytest.fixture(scope="module")
def small(material):
    study = make_study(material)
    study["models"], study["tasks"] = study["models"][:1], study["tasks"][:1]
    study["rules"] = [{"name": "top_p", "strengths": [0.5], "sites": ["all"]}]
    return study


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run"
    compare(small, path)
    return path


@pytest.fixture
def path(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def sparse(path):
    """Return the folder of the cell with a rule."""
    plan = json.loads((path / "plan.json").read_text())
    return next(path / "cells" / entry["fingerprint"] for entry in plan if entry["parts"]["rule"])


ODD_PLANS = {
    "a list as fingerprint": '[{"fingerprint": [1], "title": "x"}]',
    "an object as title": '[{"fingerprint": "a", "title": {"x": 1}, "parts": 3}]',
    "nested": "[" * 200_000,
    "cut": '[{"finger',
    "an object": "{}",
}


@pytest.mark.parametrize("odd", ODD_PLANS)
def test_a_damaged_plan_is_named_and_written_anew(small, finished, path, caplog, odd):
    (path / "plan.json").write_text(ODD_PLANS[odd])
    compare(small, path)
    assert f"{path / 'plan.json'} is damaged; it is written anew" in caplog.messages
    assert (path / "plan.json").read_bytes() == (finished / "plan.json").read_bytes()
    assert numbers(path) == numbers(finished)


@pytest.mark.parametrize(("name", "text"), [("environment.json", "{"), ("config.yaml", "a: [1"), ("config.yaml", None)])
def test_what_describes_a_study_is_named_where_it_is_damaged(small, finished, path, caplog, name, text):
    (path / name).unlink()
    if text is not None:
        (path / name).write_text(text)
    compare(small, path)
    state = "missing" if text is None else "damaged"
    assert f"{path / name} is {state}; it is written anew" in caplog.messages
    assert (path / name).read_bytes() == (finished / name).read_bytes()
    assert numbers(path) == numbers(finished)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"strength": 10**400}, "cell.json does not hold: not JSON"),
        ({"items": "x"}, "cell.json does not hold: items is missing or of the wrong type"),
        ({"schema": 2}, "cell.json does not hold: schema 2"),
    ],
)
def test_a_cell_whose_record_does_not_hold_is_computed_again(small, finished, path, caplog, change, told):
    cell = sparse(path)
    (cell / "cell.json").write_text(json.dumps(json.loads((cell / "cell.json").read_text()) | change))
    (cell / "DONE").write_text(json.dumps(checksums(cell)))
    assert told in load(path).damaged[0]
    compare(small, path)
    assert any(told in message and "computed again" in message for message in caplog.messages)
    assert numbers(path) == numbers(finished)


def to_folder(place):
    place.unlink()
    place.mkdir()
    (place / "x").write_text("1")


def to_link(place):
    shutil.rmtree(place)
    place.symlink_to(place.parent / "gone")


HARMS = {
    "a folder for DONE": lambda path: to_folder(sparse(path) / "DONE"),
    "a folder for samples.parquet": lambda path: to_folder(sparse(path) / "samples.parquet"),
    "a file for a cell": lambda path: (shutil.rmtree(cell := sparse(path)), cell.write_text("x")),
    "a broken link for a cell": lambda path: to_link(sparse(path)),
    "a folder for a journal": lambda path: (path / "journals" / f"{sparse(path).name}.journal").mkdir(parents=True),
}


@pytest.mark.parametrize("harm", HARMS)
def test_what_stands_in_the_way_of_a_cell_is_removed(small, finished, path, harm):
    HARMS[harm](path)
    compare(small, path)
    assert numbers(path) == numbers(finished)


@pytest.mark.parametrize("name", ["plan.json", "environment.json", "config.yaml", ".lock", ".lock.owner", "log.txt"])
def test_a_folder_where_a_file_belongs_is_named(small, path, name):
    to_folder(path / name)
    with pytest.raises(UserError, match=f"Is a directory: .*{name}") as caught:
        compare(small, path)
    assert caught.value.hint == "move that away, or give another folder with --out"
    assert not list(path.glob(".*.[0-9]*"))


def test_drafts_of_a_killed_run_are_removed_and_nothing_else(small, path):
    drafts = [".plan.json.4194305", ".lock.owner.4194305", ".search.json", ".summary.json.ao6y4hq1"]
    drafts += [".report.html._34inrtq", "tables/.points.csv.ao6y4hq1", "tables/.points.parquet.6vmz4hfj"]
    others = [".notes", ".my.file.12", "cells/.keep", "cells/.abc.12", "tables/.hidden.csv", ".summary.json.bak"]
    for name in [*drafts, *others]:
        (path / name).write_text("x")
    (draft := path / "cells" / f".{sparse(path).name}.4194305").mkdir()
    compare(small, path)
    assert not draft.exists()
    assert not [name for name in drafts if (path / name).exists()]
    assert not [name for name in others if not (path / name).exists()]


def test_of_another_study_nothing_stays_beside_the_new_one(small, finished, path, caplog, monkeypatch):
    other = {**small, "rules": [{"name": "top_k", "strengths": [0.5], "sites": ["all"]}]}
    with monkeypatch.context() as patch:
        patch.setattr(
            "dllm_sparsity.study.engines.runner.run_cell", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            compare(other, path)
    assert (
        "1 cells of the run before are not in this study; they stay in cells/, and are not reported" in caplog.messages
    )
    assert f"report.html, summary.json of the study before removed from {path}; its cells stay" in caplog.messages
    assert "top_k" in (path / "config.yaml").read_text()
    assert not (path / "summary.json").exists()
    assert not (path / "report.html").exists()
    caplog.clear()
    compare(small, path)  # back again: nothing is computed, nothing is lost
    assert numbers(path) == numbers(finished)


def test_a_label_is_named_where_it_is_what_differs(small, path, caplog):
    compare({**small, "models": [{**small["models"][0], "label": "other"}]}, path)
    line = "2 cells of the run before are of no use to this one; they differ in: label"
    assert [message for message in caplog.messages if "run before" in message] == [line]


def test_a_search_of_another_study_is_removed(small, path):
    (path / "search.json").write_text('{"curves": "x"}')
    compare(small, path)
    assert not (path / "search.json").exists()


REFUSED = {
    "no srun": (Engine("slurm"), "SLURM cannot be used"),
    "no cluster": (Engine("ray", address="ray://127.0.0.1:9"), "no Ray cluster answers"),
    "no GPUs": (Engine(gpus_per_worker=2), "has none to share out"),
    "no GPUs for Ray": (Engine("ray", gpus_per_worker=2), "has none to share out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_engine_that_is_refused_leaves_no_trace(small, path, tmp_path, monkeypatch, name):
    engine, told = REFUSED[name]
    if engine.kind != "local":
        pytest.importorskip({"slurm": "submitit", "ray": "ray"}[engine.kind])
    monkeypatch.setenv("PATH", str(tmp_path))
    other = {**small, "device": "cpu", "rules": [{"name": "top_k", "strengths": [0.5], "sites": ["all"]}]}
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    for place in (path, tmp_path / "new"):
        with pytest.raises(UserError, match=told):
            compare(other, place, engine=engine)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert not (tmp_path / "new").exists()
