"""A search on the average over tasks: in search.json, in the summary, the table and the report; resumed; damaged."""

import io
import json
import shutil

import pytest
from rich.console import Console

from dllm_sparsity import compare
from dllm_sparsity.analysis import load, summary
from dllm_sparsity.analysis.joining import join
from dllm_sparsity.analysis.searched import ends
from dllm_sparsity.comparison import as_config
from dllm_sparsity.report.terminal import render
from dllm_sparsity.study.engines import runner
from dllm_sparsity.study.engines.planner import Planner

STUDY = {
    "name": "averaged",
    "models": [{"paradigm": "autoregressive", "model": "embedded:autoregressive", "batch_size": 64}],
    "tasks": [{"name": "heldout_text", "limit": 30}, {"name": "easy_endings", "limit": 50}],
    "rules": [{"name": "top_p", "sites": ["intermediate"]}],
    "search": {"quality": "nll", "width": 0.1},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return compare(STUDY, tmp_path_factory.mktemp("average") / "run")


def read(path, name="search.json"):
    return json.loads((path / name).read_text())


def parts_of(path):
    """Folders of the cells that belong to the average, with their records."""
    found = [(own.parent, json.loads(own.read_text())) for own in path.glob("cells/*/cell.json")]
    return [(folder, record) for folder, record in found if record["parts"].get("average")]


def test_the_average_is_told_everywhere(finished):
    (answer,) = read(finished.path)["averages"]
    assert (answer["task"], answer["tasks"]) == ("average of 2 tasks", ["heldout_text", "easy_endings"])
    assert answer["interval"][0] <= answer["value"] <= answer["interval"][1]
    alone = [own["value"] for own in read(finished.path)["curves"]]
    assert len(alone) == 2
    assert min(alone) - 0.1 < answer["value"] < max(alone) + 0.1
    (row,) = [row for row in finished.table() if row["task"] == "average of 2 tasks"]
    assert (row["critical"], row["interval"], row["kind"]) == (answer["value"], answer["interval"], "nll")
    assert row["dense"] == answer["dense"]["value"] > 0
    assert row["items"] == answer["items"] >= 64
    (sentence,) = [own for own in finished.summary["findings"] if own.startswith("average of 2 tasks")]
    assert sentence.endswith(f"(n={answer['items']}).")
    assert finished.table()[-1] == row
    text = io.StringIO()
    Console(file=text, width=80).print(render(finished.summary))
    assert text.getvalue().count("average of 2 tasks") == 2  # its answer, and how the search ended
    assert f"{answer['evaluations']:,}" in text.getvalue()
    assert "average of 2 tasks" in finished.report.read_text()


def test_what_was_measured_is_what_is_said(finished):
    (answer,) = read(finished.path)["averages"]
    items = {}
    for _, record in parts_of(finished.path):
        key = "dense" if record["dense"] else repr(record["strength"])
        counts = items.setdefault(key, [0, 0])
        counts[answer["tasks"].index(record["task"])] += record["items"]
    assert items == answer["measured"]
    assert sum(map(sum, items.values())) == answer["evaluations"]
    dense = [record for _, record in parts_of(finished.path) if record["dense"]]
    losses = {}
    for folder, record in parts_of(finished.path):
        if record["dense"]:
            import pyarrow.parquet as pq

            rows = pq.read_table(folder / "samples.parquet").to_pylist()
            sums = losses.setdefault(record["task"], [0.0, 0])
            for row in rows:
                target = row["target"] or 0
                sums[0] -= row["loglikelihoods"][target]
                sums[1] += row["target_tokens"][target]
    assert dense
    assert answer["dense"]["value"] == pytest.approx(sum(total / tokens for total, tokens in losses.values()) / 2)


def test_the_tasks_own_curves_know_nothing_of_it(finished, tmp_path):
    path = shutil.copytree(finished.path, tmp_path / "run")  # the same cells, but another search
    alone = compare({**STUDY, "search": {**STUDY["search"], "average": False}}, path)
    assert read(alone.path)["averages"] == []
    assert read(alone.path)["curves"] == read(finished.path)["curves"]
    ours = [curve for curve in finished.summary["curves"] if curve["task"] in ("heldout_text", "easy_endings")]
    assert [own["critical"] for own in ours] == [own["critical"] for own in alone.summary["curves"]]
    assert [own["items"] for own in ours] == [own["items"] for own in alone.summary["curves"]]


def test_a_run_that_goes_on_ends_with_the_same_answer(finished, tmp_path, monkeypatch):
    path = shutil.copytree(finished.path, tmp_path / "run")
    (path / "search.json").unlink()
    lost = sorted(folder for folder, _ in parts_of(path))[::5]
    for folder in lost:
        shutil.rmtree(folder)
    ran, before = [], runner._Runner.run
    monkeypatch.setattr(runner._Runner, "run", lambda self, job: (ran.append(job.fingerprint), before(self, job)))
    again = compare(STUDY, path)
    assert sorted(ran) == [folder.name for folder in lost]
    assert read(again.path) == read(finished.path)


@pytest.mark.parametrize("dense", [True, False])
def test_an_average_whose_cells_are_damaged_is_left_out(finished, tmp_path, dense):
    path = shutil.copytree(finished.path, tmp_path / "run")
    folder = next(folder for folder, record in parts_of(path) if record["dense"] == dense)
    data = bytearray((folder / "samples.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "samples.parquet").write_bytes(data)
    found = summary(load(path), draws=20)
    assert found["averages"] == found["search"]["averages"] == []
    assert len(found["search"]["curves"]) == 2
    (note,) = [note for note in found["notes"] if "rest on" in note]
    assert "the answer of the search for average of 2 tasks, top_p at intermediate, autoregressive" in note


def test_means_of_critical_sparsities_as_an_earlier_version_wrote_them_are_passed_over(finished, tmp_path):
    path = shutil.copytree(finished.path, tmp_path / "run")
    search = read(path)
    earlier = {"paradigm": "autoregressive", "model": "autoregressive", "rule": "top_p", "rule_parameters": {}}
    earlier |= {"site": "intermediate", "retention": 0.99, "tasks": 2, "value": 0.6, "interval": [0.5, 0.7]}
    (path / "search.json").write_text(json.dumps({**search, "averages": [earlier]}))
    found = summary(load(path), draws=20)
    assert found["averages"] == found["search"]["averages"] == []
    assert found["search"]["curves"] == search["curves"]
    assert ends(found["search"])


def test_runs_that_are_joined_keep_what_was_searched(finished, tmp_path):
    run = load(finished.path)
    joined = join([run, run], tmp_path)
    assert joined.search == run.search
    found = summary(joined, draws=20)
    assert [own["critical"] for own in found["averages"]] == [own["critical"] for own in summary(run, 20)["averages"]]
    assert found["averages"]


def test_a_task_that_is_also_in_a_group_counts_once():
    planner = Planner(as_config(STUDY), "cpu")
    alone, group = planner.tasks
    planner.tasks[group] = [*planner.tasks[alone], *planner.tasks[group]]  # as a name that stands for both
    *_, (_, averaged) = planner.searched()
    assert [task.name for _, task in averaged] == ["heldout_text", "easy_endings"]
