"""Several runs in one report: what is joined, and what is refused by the name of the field."""

import json

import pytest
from click.testing import CliRunner
from test_analysis_run import seal

from dllm_sparsity import compare
from dllm_sparsity.analysis.joining import join
from dllm_sparsity.analysis.loading import load
from dllm_sparsity.cli.report import report
from dllm_sparsity.errors import UserError


@pytest.fixture(scope="module")
def runs(tmp_path_factory, material):
    from material import make_study

    folder = tmp_path_factory.mktemp("joined")
    study = make_study(material)
    rules = [{"name": "top_p", "strengths": [0.9, 0.5], "sites": ["input"]}]
    few = {**study, "tasks": study["tasks"][:1]}
    for name, model, site in (("one", 0, "input"), ("two", 1, "input"), ("three", 0, "intermediate")):
        own = [{**rules[0], "sites": [site]}]
        compare({**few, "models": [few["models"][model]], "rules": own}, folder / name)
    return folder


def changed(runs, tmp_path, change):
    """Copy the first run with a change to what its cells were made of."""
    import shutil

    copy = tmp_path / "changed"
    shutil.copytree(runs / "one", copy)
    for path in copy.glob("cells/*/cell.json"):
        record = json.loads(path.read_text())
        change(record["parts"])
        path.write_text(json.dumps(record))
        seal(path.parent)
    return copy


def test_two_models_become_one_study(runs, tmp_path):
    joined = join([load(runs / "one"), load(runs / "two")], tmp_path)
    assert len(joined.cells) == 6
    assert {cell.record["paradigm"] for cell in joined.cells} == {"autoregressive", "diffusion"}
    assert "# one" in joined.config
    assert "# two" in joined.config


def test_a_cell_that_both_have_is_there_once(runs, tmp_path):
    assert len(join([load(runs / "one"), load(runs / "one")], tmp_path).cells) == 3


def test_the_report_of_both_has_the_curves_of_both(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(report, [str(runs / name) for name in ("one", "two", "three")], catch_exceptions=False)
    assert done.exit_code == 0
    assert "report: runs/one+two+three/report.html" in done.stdout
    summary = json.loads((tmp_path / "runs/one+two+three/summary.json").read_text())
    curves = {(curve["paradigm"], curve["site"]) for curve in summary["curves"]}
    assert curves == {("autoregressive", "input"), ("autoregressive", "intermediate"), ("diffusion", "input")}
    alone = json.loads((runs / "one" / "summary.json").read_text())
    ours = [curve for curve in summary["curves"] if (curve["paradigm"], curve["site"]) == ("autoregressive", "input")]
    assert [curve["critical"] for curve in ours] == [curve["critical"] for curve in alone["curves"]]
    assert not list((runs / "one").glob("*+*"))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda parts: parts["versions"].update(torch="1.0"), "version of torch is"),
        (lambda parts: parts.update(seed=7), "seed is 0 and 7"),
        (lambda parts: parts["task"].update(documents="0"), "task tiny_choice: task.documents differs"),
        (lambda parts: parts.update(num_fewshot=5), "task tiny_choice: num_fewshot is not given and 5"),
        (lambda parts: parts["model"].update(dtype="bfloat16"), "model ar: model.dtype is float32 and bfloat16"),
        (
            lambda parts: parts["weights"].update({"model.safetensors": "0"}),
            "model ar: weights.model.safetensors differs",
        ),
        (
            lambda parts: (parts["task"].update(documents="0" * 16), parts.update(limit=30, seed=7)),
            "comparable: seed is 0 and 7; task tiny_choice: limit is 4 and 30; task tiny_choice: task.documents"
            " differs",
        ),
    ],
)
def test_what_is_not_comparable_is_named(runs, tmp_path, change, field):
    other = changed(runs, tmp_path, change)
    with pytest.raises(UserError) as error:
        join([load(runs / "one"), load(other)], tmp_path)
    assert field in error.value.message
    assert error.value.message.startswith("one and changed are not comparable: ")


def test_where_the_runs_were_on_other_machines_both_are_told(runs, tmp_path, monkeypatch):
    other = changed(runs, tmp_path, lambda parts: None)
    path = other / "environment.json"
    environment = json.loads(path.read_text())
    own = environment | {"cpus": 1, "gpu": [{"name": "some GPU", "driver": "1.2"}]}
    own["packages"] = environment["packages"] | {"plotly": "0.0"}
    path.write_text(json.dumps(own))
    (tmp_path / "again").mkdir()
    other = other.rename(tmp_path / "again" / "one")
    found = join([load(runs / "one"), load(other)], tmp_path).environment
    assert found["python"] == environment["python"]
    assert found["cpus"] == {"one": environment["cpus"], "one, no. 2": 1}
    assert found["gpu"] == {"one": None, "one, no. 2": own["gpu"]}
    assert found["packages"]["torch"] == environment["packages"]["torch"]
    assert found["packages"]["plotly"] == {"one": environment["packages"]["plotly"], "one, no. 2": "0.0"}
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(report, [str(runs / "one"), str(other)], catch_exceptions=False)
    assert done.exit_code == 0
    page = (tmp_path / "runs/one/report.html").read_text()
    assert "some GPU" in page
    assert "packages.plotly.one, no. 2" in page


def test_a_report_of_several_is_not_written_into_a_run(runs):
    done = CliRunner().invoke(report, [str(runs / "one"), str(runs / "two"), "--out", str(runs / "three")])
    assert isinstance(done.exception, UserError)
    assert "is a run of its own" in done.exception.message


def test_the_report_of_one_run_goes_elsewhere(runs, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (runs / "one").rglob("*")}
    done = CliRunner().invoke(report, [str(runs / "one"), "--out", str(tmp_path / "page")])
    assert done.exit_code == 0, done.output
    assert {path: path.stat().st_mtime_ns for path in (runs / "one").rglob("*")} == before
    assert sorted(path.name for path in (tmp_path / "page").iterdir()) == ["report.html", "summary.json", "tables"]
    assert (tmp_path / "page" / "report.html").read_text() == (runs / "one" / "report.html").read_text()
    assert f"report: {tmp_path / 'page' / 'report.html'}" in done.output
    done = CliRunner().invoke(report, [str(runs / "one"), "--out", str(runs / "two")])
    assert "is a run of its own" in done.exception.message


def test_a_run_that_is_given_twice_is_named(runs):
    done = CliRunner().invoke(report, [str(runs / "one"), str(runs / "two" / ".." / "one"), "--out", str(runs / "new")])
    assert isinstance(done.exception, UserError)
    assert done.exception.message.endswith("one is given twice")
