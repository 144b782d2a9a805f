"""What is told of searches: on whichever quality, unfinished, with damaged cells, and why each ended."""

import io
import json
import shutil

import pyarrow.parquet as pq
import pytest
from material import make_study
from rich.console import Console

from dllm_sparsity import compare
from dllm_sparsity.analysis import headline, load, summary
from dllm_sparsity.analysis.joining import join
from dllm_sparsity.analysis.statistics import mcnemar_exact
from dllm_sparsity.errors import UserError
from dllm_sparsity.report import render, write_report
from dllm_sparsity.report.sections import quality


def make(material, **search):
    study = make_study(material)
    study["models"], study["tasks"] = study["models"][:1], [{"name": str(material / "choice.yaml")}]
    study["rules"] = [{"name": "top_p", "sites": ["input"]}]
    return {**study, "search": {"width": 0.3, **search}}


@pytest.fixture(scope="module")
def on_likelihood(material, tmp_path_factory):
    study = make(material, quality="nll", retentions=[0.9, 0.99])
    return study, compare(study, tmp_path_factory.mktemp("nll") / "run")


@pytest.fixture(scope="module")
def on_likelihood_by_layer(material, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    (folder / "items.jsonl").write_text(
        "\n".join(json.dumps({"q": f"question {n}", "a": ["yes", "no way"], "gold": n % 2}) for n in range(20))
    )
    (folder / "choice.yaml").write_text((material / "choice.yaml").read_text().replace(str(material), str(folder)))
    study = make(material, quality="nll", layerwise=True)
    study["tasks"] = [{"name": str(folder / "choice.yaml")}]
    return study, compare(study, folder / "run")


def on_terminal(found):
    text = io.StringIO()
    Console(file=text, width=80).print(render(found))
    return " ".join(text.getvalue().split())


def again(path):
    """Report a run directory anew; return its summary, page and terminal text."""
    page = write_report(path).read_text()
    found = json.loads((path / "summary.json").read_text())
    return found, page, on_terminal(found)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cells_of(path, chosen):
    plan = json.loads((path / "plan.json").read_text())
    return [path / "cells" / entry["fingerprint"] for entry in plan if chosen(entry["parts"])]


def test_the_quality_of_the_search_is_told_first(on_likelihood):
    _, result = on_likelihood
    assert [curve["quality"] for curve in result.summary["curves"] if curve["headline"]] == ["nll"]
    for row in result.table():
        assert (row["quality"], row["reason"], row["stands_in_for"]) == ("nll", None, None)
        assert row["critical"] is not None
    page = result.report.read_text()
    assert "No critical sparsity" not in page
    accuracy = next(curve for curve in result.summary["curves"] if curve["quality"] == "acc")
    at_chance = {own["reason"] for own in accuracy["critical"] if "above chance" in own["reason"]}
    assert {own["reason"] for own in accuracy["critical"]} <= {"the search was on nll", *at_chance}
    assert not any("no critical sparsity" in sentence for sentence in result.summary["findings"])


def test_why_a_search_ended_is_told(on_likelihood):
    _, result = on_likelihood
    answers = json.loads((result.path / "search.json").read_text())["curves"]
    words = {
        "width": "width of 30 reached",
        "items": "all items used, above 30",
        "budget": "budget spent, above 30",
    }
    told, page = on_terminal(result.summary), result.report.read_text()
    assert "How the searches ended" in page
    for own in answers:
        assert f"{100 * own['retention']:g} %: {words[own['stopped']]} {own['evaluations']:,}" in told
        assert words[own["stopped"]] in page


def test_a_spent_budget_is_told(material, tmp_path):
    result = compare(make(material, quality="nll", budget=12), tmp_path / "run")
    assert "budget spent 12" in on_terminal(result.summary)
    reason = "the budget of item-evaluations was spent before there was an answer"
    assert [(row["kind"], row["reason"], row["stands_in_for"]) for row in result.table()] == [("nll", reason, None)]
    assert "shown by NLL" not in on_terminal(result.summary)


def test_a_budget_for_dense_alone_is_told(material, tmp_path, monkeypatch):
    check = "dllm_sparsity.study.engines.planner.check_search"
    monkeypatch.setattr(check, lambda *_: None)  # it refuses such a budget, which runs of before may have had
    result = compare(make(material, quality="nll", budget=7), tmp_path / "run")
    assert "no curve yet" in on_terminal(result.summary)
    assert "budget spent 6" in on_terminal(result.summary)
    (answer,) = json.loads((tmp_path / "run" / "search.json").read_text())["curves"]
    assert (answer["rule"], answer["value"], answer["evaluations"]) == ("top_p", None, 6)


@pytest.fixture(scope="module")
def on_accuracy(material, tmp_path_factory):
    study = make(material)  # on accuracy, which the embedded model has
    study["models"] = [{"paradigm": "autoregressive", "model": "embedded:autoregressive", "batch_size": 32}]
    study["tasks"] = [{"name": "easy_endings", "limit": 100}]
    return compare(study, tmp_path_factory.mktemp("accuracy") / "run")


def test_every_strength_of_a_search_is_on_the_chart_with_its_items(on_accuracy):
    (answer,) = json.loads((on_accuracy.path / "search.json").read_text())["curves"]
    (curve,) = [curve for curve in on_accuracy.summary["curves"] if curve["headline"]]
    assert len(answer["path"]) > len(curve["points"]) - 1  # some were measured on fewer items than the others
    assert curve["dense"] == answer["dense"]
    assert answer["dense"]["value"] == pytest.approx(next(iter(on_accuracy.table()))["dense"])
    for step in answer["path"]:
        low, high = step["quality_interval"]
        assert low < step["quality"] < high
        assert step["retention"] == pytest.approx(step["quality"] / answer["dense"]["value"])
    counts = {step["items"] for step in answer["path"]}
    assert f"n={min(counts)} to {curve['items']}." in on_accuracy.report.read_text()
    joint = {point["strength"]: point for point in curve["points"]}
    whole = [step for step in answer["path"] if step["items"] == answer["items"] and step["strength"] in joint]
    for step in whole:
        assert step["quality"] == pytest.approx(joint[step["strength"]]["quality"])


def test_every_strength_of_a_search_is_set_against_dense_on_the_items_it_has(on_accuracy):
    (curve,) = [curve for curve in on_accuracy.summary["curves"] if curve["headline"]]
    points = {point["strength"] for point in curve["points"]}
    others = [step for step in curve["path"] if step["strength"] not in points]
    assert others
    (dense,) = [cell for cell in load(on_accuracy.path).cells if cell.record["dense"]]
    before = dict(zip(dense.samples["doc_id"].to_pylist(), dense.samples["correct"].to_pylist(), strict=True))
    for step in others:
        (cell,) = [own for own in dense.elsewhere if own.record["strength"] == step["strength"]]
        after = dict(zip(cell.samples["doc_id"].to_pylist(), cell.samples["correct"].to_pylist(), strict=True))
        lost = sum(before[doc] > right for doc, right in after.items())
        gained = sum(before[doc] < right for doc, right in after.items())
        assert (step["items"], step["changed"]) == (len(after), lost + gained)
        assert step["difference"] == pytest.approx((gained - lost) / len(after))
        assert step["p"] == mcnemar_exact(lost, gained)
        assert step["comparisons"] == len(points) - 1 + len(others)
    worse = [step for step in others if step["outcome"] == "worse"]
    assert worse
    first = min(worse, key=lambda step: step["sparsity"])
    assert f"{first['short'].removeprefix('worse ')} at {100 * first['sparsity']:.1f} %" in on_terminal(
        on_accuracy.summary
    )
    table = pq.read_table(on_accuracy.path / "tables" / "points.parquet").to_pylist()
    told = {row["strength"]: row["items"] for row in table if row["measure"] == curve["quality"]}
    assert {step["strength"]: step["items"] for step in others}.items() <= told.items()


@pytest.mark.parametrize("order", [1, -1])
def test_a_joined_run_keeps_the_answer_of_a_search_beside_a_grid(on_likelihood, material, tmp_path, order):
    study, result = on_likelihood
    grid = {name: own for name, own in study.items() if name != "search"}
    grid["rules"] = [{"name": "top_p", "sites": ["input", "up"], "strengths": [0.9, 0.5]}]  # its dense cell comes first
    runs = [load(result.path), load(compare(grid, tmp_path / "grid").path)]
    found = summary(join(runs[::order], tmp_path / "joined"), draws=50)
    answers = {own["retention"]: own["value"] for own in found["search"]["curves"]}
    curve = next(curve for curve in found["curves"] if (curve["quality"], curve["site"]) == ("nll", "input"))
    told = {own["retention"]: own["value"] for own in curve["critical"] if own["reading"] == "interpolated"}
    assert answers == {at: told[at] for at in answers}


def test_a_damaged_dense_block_is_left_out_with_all_that_was_paired_with_it(on_accuracy, tmp_path):
    path = shutil.copytree(on_accuracy.path, tmp_path / "run")
    first = cells_of(path, lambda parts: parts["rule"] is None and parts["block"][0] == 0)
    assert len(cells_of(path, lambda parts: parts["rule"] is None)) > len(first) == 1
    flip(first[0] / "samples.parquet")
    found, page, told = again(path)
    assert any(first[0].name in note for note in found["notes"])
    assert first[0].name in page
    assert "the answer of the search for" in told
    assert all(curve["items"] < 100 for curve in found["curves"])


@pytest.mark.parametrize("name", ["search.json", "plan.json"])
def test_a_damaged_file_beside_the_cells_is_written_anew_by_compare(on_accuracy, tmp_path, name):
    path = shutil.copytree(on_accuracy.path, tmp_path / "run")
    (path / name).write_text("{")
    with pytest.raises(UserError, match="cannot be used") as error:
        write_report(path)
    assert error.value.hint == "run dllm-sparsity compare again: it writes this file anew and keeps the cells"


def test_an_unfinished_search_says_so_and_shows_its_own_quality(on_accuracy, tmp_path):
    shutil.copytree(on_accuracy.path, tmp_path / "run")
    (tmp_path / "run" / "search.json").unlink()  # written when all searches are done
    found, page, told = again(tmp_path / "run")
    reason = "its search is not finished: dllm-sparsity compare goes on with it"
    assert {own["reason"] for curve in found["curves"] for own in curve["critical"]} == {reason}
    assert reason in page
    assert f"easy_endings, AR: {reason} note:" in told
    assert " right none" in told


@pytest.mark.parametrize("dense", [True, False])
def test_an_answer_whose_cells_are_damaged_is_left_out_until_compare_mends_it(on_likelihood, tmp_path, dense):
    study, result = on_likelihood
    path = shutil.copytree(result.path, tmp_path / "run")
    flip(cells_of(path, lambda parts: (parts["rule"] is None) == dense)[0] / "samples.parquet")
    found, page, told = again(path)
    (note,) = [note for note in found["notes"] if "the answer of the search for" in note]
    assert "made again by dllm-sparsity compare" in note
    assert "top_p at input, autoregressive (ar), 90 %" in note
    assert found["search"] == {"curves": [], "averages": []}
    assert "the answer of the search for" in page
    assert "the answer of the search for" in told
    assert all(row["critical"] is None for row in headline(found))
    mended = compare(study, path)
    assert mended.summary["search"] == result.summary["search"]
    assert not any("left out" in note for note in mended.summary["notes"])


def test_an_answer_without_its_dense_blocks_or_of_other_items_is_left_out(on_likelihood, tmp_path):
    _, result = on_likelihood
    path = shutil.copytree(result.path, tmp_path / "run")
    search = json.loads((path / "search.json").read_text())
    for answer in search["curves"]:  # of an earlier study on more items
        answer["items"] += 1
    (path / "search.json").write_text(json.dumps(search))
    assert len(load(path).unfounded) == 2


@pytest.mark.parametrize("probe", [True, False])
def test_an_allocation_whose_cells_are_damaged_is_left_out(on_likelihood_by_layer, tmp_path, probe):
    _, result = on_likelihood_by_layer
    assert any("strengths by layer" in sentence for sentence in result.summary["findings"])
    assert " rows" in result.report.read_text()
    path = shutil.copytree(result.path, tmp_path / "run")
    assert load(path).unfounded == ()

    def chosen(parts):
        return parts.get("probe") if probe else (parts["rule"] or {}).get("name") == "layerwise"

    flip(cells_of(path, chosen)[-1] / "cell.json")
    found = summary(load(path), draws=20)
    assert not any("strengths by layer reach" in sentence for sentence in found["findings"])
    note = next(note for note in found["notes"] if "rest on" in note)
    assert "the strengths by layer for tiny_choice, top_p at input" in note
    assert ("the answer of the search for tiny_choice, layerwise" in note) is not probe
    assert [own["rule"] for own in found["search"]["curves"]] == (["top_p", "layerwise"] if probe else ["top_p"])


def test_the_dashed_line_and_the_caption_are_of_the_retention_that_is_asked_for(on_likelihood):
    curves = [curve for curve in on_likelihood[1].summary["curves"] if curve["quality"] == "nll"]
    for kept in (0.9, 0.99):
        (chart,) = quality._charts(curves, quality._styles(curves), True, kept)
        (line,) = chart.figure["layout"]["shapes"]
        assert (line["y0"], line["y1"]) == (kept, kept)
        assert f"Critical sparsity at {100 * kept:g} %: autoregressive " in chart.caption
