"""`dllm-sparsity report` on cells whose files are not those that were sealed: named, left out, and never half used."""

import json
import shutil

import pytest
from material import make_study

from dllm_sparsity import compare
from dllm_sparsity.analysis.loading import load

FILES = ("cell.json", "samples.parquet", "steps.parquet")


@pytest.fixture(scope="module")
def sealed(material, tmp_path_factory):
    study = make_study(material)
    study["models"], study["tasks"] = study["models"][:1], study["tasks"][:1]
    path = tmp_path_factory.mktemp("sealed") / "own"
    compare(study, path)
    return study, path


@pytest.fixture
def copy(sealed, tmp_path):
    return shutil.copytree(sealed[1], tmp_path / "own")


def flip(path):
    """Turn one bit in the middle, so that Parquet and JSON may read on as if nothing were."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


HARMS = {"flipped": flip, "cut": cut, "empty": lambda path: path.write_bytes(b""), "gone": lambda path: path.unlink()}


def cell_of(path, dense):
    plan = json.loads((path / "plan.json").read_text())
    return next(
        (path / "cells" / entry["fingerprint"], entry["title"])
        for entry in plan
        if (entry["parts"]["rule"] is None) == dense
    )


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_cell_is_named_and_the_others_are_reported(copy, run, name, harm):
    folder, title = cell_of(copy, dense=False)
    whole = len(load(copy).cells)
    HARMS[harm](folder / name)
    code, out, error = run("report", copy)
    assert (code, error) == (0, "")
    told = f"cell {folder.name} ({title}): {name} "
    told += "cannot be read: No such file or directory" if harm == "gone" else "is damaged"
    # 80 columns break lines anywhere in a long path
    assert f"note: left out, and computed again by dllm-sparsity compare: {told}".replace(" ", "") in "".join(
        out.split()
    )
    summary = json.loads((copy / "summary.json").read_text())
    assert summary["counts"]["damaged"] == 1
    assert summary["notes"][0].endswith(told)
    assert len(summary["cells"]) == whole - 1
    assert folder.name not in {cell["fingerprint"] for cell in summary["cells"]}
    page = (copy / "report.html").read_text()
    assert told.replace("/", "&#x2F;") in page or told in page


@pytest.mark.parametrize("harm", ["flipped", "cut"])
def test_damaged_checksums_are_damage(copy, run, harm):
    folder, _ = cell_of(copy, dense=False)
    HARMS[harm](folder / "DONE")
    assert run("report", copy)[0] == 0
    assert json.loads((copy / "summary.json").read_text())["counts"]["damaged"] == 1


def test_without_its_dense_cell_nothing_is_compared(copy, run):
    flip(cell_of(copy, dense=True)[0] / "samples.parquet")
    code, out, _ = run("report", copy)
    assert code == 0
    assert "no curve yet" in out
    notes = json.loads((copy / "summary.json").read_text())["notes"]
    assert any("has no finished dense cell" in note for note in notes)


def test_nothing_left_is_an_error_of_two_lines(copy, run):
    before = (copy / "report.html").read_bytes()
    for folder in (copy / "cells").iterdir():
        flip(folder / "steps.parquet")
    code, out, error = run("report", copy)
    assert (code, out) == (1, "")
    first, second = error.strip().splitlines()
    assert first.startswith("error: the files of all 5 finished cells of ")
    assert "steps.parquet is damaged" in first
    assert second == "hint:  run dllm-sparsity compare again: it computes damaged cells anew"
    assert (copy / "report.html").read_bytes() == before


def test_several_runs_say_whose_cell_it_is(copy, run, tmp_path):
    other = shutil.copytree(copy, tmp_path / "other")
    folder, _ = cell_of(other, dense=False)
    cut(folder / "samples.parquet")
    assert run("report", copy, other, "--out", tmp_path / "both")[0] == 0
    summary = json.loads((tmp_path / "both" / "summary.json").read_text())
    assert f"compare: other, cell {folder.name}" in summary["notes"][0]
    assert folder.name in {cell["fingerprint"] for cell in summary["cells"]}  # the other run has it whole


def test_compare_makes_it_good(sealed, copy, run):
    folder, _ = cell_of(copy, dense=False)
    flip(folder / "samples.parquet")
    result = compare(sealed[0], copy)
    assert result.summary["counts"]["damaged"] == 0
    assert not any("left out" in note for note in result.summary["notes"])


def test_many_damaged_cells_do_not_flood_the_page(copy):
    from dataclasses import replace

    from dllm_sparsity.analysis import summary

    run = replace(load(copy), damaged=tuple(f"cell {n}: DONE is damaged" for n in range(50)))
    notes = summary(run, draws=20)["notes"]
    assert sum("left out" in note for note in notes) == 21
    assert "30 more cells are damaged and left out" in notes
