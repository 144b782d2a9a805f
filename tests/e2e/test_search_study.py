"""A search on the embedded pair: cells by blocks, sealed and resumed, and its answer in the summary, the table and the report."""

import io
import json

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from dllm_sparsity import compare
from dllm_sparsity.analysis import load
from dllm_sparsity.report.terminal import render
from dllm_sparsity.study.engines import runner

STUDY = {
    "name": "searched",
    "models": [
        {"paradigm": "autoregressive", "model": "embedded:autoregressive", "label": "AR twin", "batch_size": 64}
    ],
    "tasks": [{"name": "heldout_text", "limit": 70}],
    "rules": [{"name": "top_p", "sites": ["intermediate"]}],
    "search": {"retentions": [0.9, 0.99], "quality": "nll", "width": 0.05, "budget": 700},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return compare(STUDY, tmp_path_factory.mktemp("search") / "run")


def test_the_answer_is_told_everywhere(finished):
    answers = json.loads((finished.path / "search.json").read_text())["curves"]
    assert [answer["retention"] for answer in answers] == [0.9, 0.99]
    for answer in answers:
        assert answer["interval"][0] <= answer["value"] <= answer["interval"][1]
        assert answer["evaluations"] <= 700
        assert answer["stopped"] in ("width", "items", "budget")
    assert finished.summary["search"]["curves"] == answers
    rows = finished.table()
    assert [row["retention"] for row in rows] == finished.summary["retentions_asked"] == [0.99, 0.9]
    for row, answer in zip(rows, reversed(answers), strict=True):
        assert (row["critical"], row["interval"]) == (answer["value"], answer["interval"])
        assert row["quality"] == "nll"
    text = io.StringIO()
    Console(file=text, width=80).print(render(finished.summary))
    assert "99 %: " in text.getvalue()
    assert "90 %: " in text.getvalue()
    assert "keeping 90 % of the dense" in " ".join(finished.summary["findings"])
    assert "AR twin" in finished.report.read_text()


def test_two_models_of_one_paradigm_are_told_by_name(finished):
    def shown(summary):
        text = io.StringIO()
        Console(file=text, width=80).print(render(summary))
        return text.getvalue()

    summary = json.loads(json.dumps(finished.summary))
    assert "AR twin" not in shown(summary)  # it is called AR
    for curves in (summary["curves"], summary["search"]["curves"]):
        curves += [own | {"model": "AR other"} for own in curves]
    told = shown(summary).splitlines()
    for name in ("AR twin", "AR other"):
        assert sum(name in line for line in told) == 4  # its answers, how the search ended for each, and against dense


def test_every_block_is_a_sealed_cell_of_its_own_items(finished):
    blocks = {}
    for path in finished.path.glob("cells/*/cell.json"):
        record = json.loads(path.read_text())
        documents = pq.read_table(path.parent / "samples.parquet")["doc_id"].to_pylist()
        start, stop = record["parts"]["block"]
        assert len(documents) == len(set(documents)) == stop - start
        assert blocks.setdefault((start, stop), documents) == documents
    assert sorted(document for own in blocks.values() for document in own) == list(range(70))
    run = load(finished.path)
    assert {cell.record["items"] for cell in run.cells if cell.record["dense"]} == {70}


def test_a_second_run_computes_nothing(finished, monkeypatch):
    monkeypatch.setattr(runner, "open_backend", lambda *_: pytest.fail("a model was loaded"))
    again = compare(STUDY, finished.path)
    assert again.summary["search"] == finished.summary["search"]
