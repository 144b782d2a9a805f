"""A whole study on tiny models: cells, records, report, and what an interrupt leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
import yaml
from material import make_study

from dllm_sparsity import compare
from dllm_sparsity.cli.gate import Gate
from dllm_sparsity.cli.gate_names import names, unknown_ahead
from dllm_sparsity.errors import UserError
from dllm_sparsity.study import run as study_run
from dllm_sparsity.study.config import build_config
from dllm_sparsity.study.records import samples_schema, steps_schema


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory):
    study = make_study(material)
    return study, compare(study, tmp_path_factory.mktemp("run") / "run")


def cells(path):
    return {p.parent.name: json.loads(p.read_text()) for p in path.glob("cells/*/cell.json")}


def test_every_cell_is_sealed_in_the_schema(finished):
    _, result = finished
    records = cells(result.path)
    assert len(records) == 2 * 3 * (1 + 2 * 2)
    for name, record in records.items():
        folder = result.path / "cells" / name
        assert (folder / "DONE").exists()
        assert pq.read_schema(folder / "samples.parquet").equals(samples_schema())
        assert pq.read_schema(folder / "steps.parquet").equals(steps_schema(True))
        assert record["fingerprint"] == name
    assert (result.path / "config.yaml").exists()
    assert (result.path / "plan.json").exists()
    assert result.report.exists()


def test_a_condition_can_ask_for_every_number_before_the_run(finished):
    study, result = finished
    found = names(result.summary)
    assert any(name.startswith("difference.") for name in found)
    conditions = [Gate(f"{name} < 1 and not {name}x > -2") for name in found]
    told = [unknown_ahead(gate, build_config(study), result.summary["counts"]["tasks"]) for gate in conditions]
    assert not [own for own in told if len(own) > 1]
    short = [own for name, own in zip(found, told, strict=True) if name.count(".") < 5]  # any model, rule or quality
    assert len(short) > 10  # may follow in the others
    assert all(short)


def test_records_agree_with_each_other(finished):
    """Kept and total of the items are those of the steps, without padding and what follows the end."""
    _, result = finished
    for name in cells(result.path):
        folder = result.path / "cells" / name
        samples, steps = pq.read_table(folder / "samples.parquet"), pq.read_table(folder / "steps.parquet").to_pylist()
        for site in ("input", "intermediate"):
            counted = [
                row
                for row in steps
                if row["site"] == site and row["branch"] == "cond" and row["token_state"] not in ("pad", "after_eos")
            ]
            for column in ("kept", "total"):
                values = [value for value in samples[f"{column}_{site}"].to_pylist() if value is not None]
                assert sum(values) == sum(row[column] for row in counted)


def test_strengths_order_sparsity_and_dense_has_none(finished):
    _, result = finished
    for curve in result.summary["curves"]:
        points = curve["points"]
        achieved = [
            point["sparsity"]["value"] if isinstance(point["sparsity"], dict) else point["sparsity"] for point in points
        ]
        assert achieved == sorted(achieved)


def test_summary_and_table(finished):
    _, result = finished
    table = result.table()
    assert {row["paradigm"] for row in table} == {"autoregressive", "diffusion"}
    assert {row["site"] for row in table} == {"input", "all"}
    assert "<table>" in result._repr_html_()


def test_the_same_command_runs_nothing_again(finished, monkeypatch):
    study, result = finished
    before = {path: path.stat().st_mtime_ns for path in result.path.glob("cells/*/DONE")}
    monkeypatch.setattr(
        "dllm_sparsity.study.engines.runner.open_backend", None
    )  # a model would be loaded to run a cell
    again = compare(study, result.path)
    assert {path: path.stat().st_mtime_ns for path in result.path.glob("cells/*/DONE")} == before
    assert again.summary["findings"] == result.summary["findings"]


def test_resuming_gives_the_same_records(finished, tmp_path, monkeypatch):
    """A run that dies in the middle and goes on is a run that did not die."""
    study, whole = finished
    real, calls = study_run.run_cell, []

    def dies(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    monkeypatch.setattr("dllm_sparsity.study.engines.runner.run_cell", dies)
    with pytest.raises(KeyboardInterrupt):
        compare(study, tmp_path / "run")
    assert len(list(tmp_path.glob("run/cells/[!.]*/DONE"))) == 7
    monkeypatch.setattr("dllm_sparsity.study.engines.runner.run_cell", real)
    resumed = compare(study, tmp_path / "run")
    assert cells(resumed.path).keys() == cells(whole.path).keys()
    for name in cells(whole.path):
        first, second = (
            pq.read_table(p.path / "cells" / name / "samples.parquet").drop(["seconds"]) for p in (whole, resumed)
        )
        assert first.equals(second)
        first, second = (pq.read_table(p.path / "cells" / name / "steps.parquet") for p in (whole, resumed))
        assert first.equals(second)


def test_a_full_disk_loses_nothing(finished, tmp_path, monkeypatch):
    study, _ = finished
    real, written = pq.write_table, []

    def full(table, where, **keywords):
        written.append(where)
        if len(written) == 5:  # in the middle of the third cell
            raise OSError(28, "No space left on device")
        return real(table, where, **keywords)

    monkeypatch.setattr("dllm_sparsity.study.rundir.pq.write_table", full)
    with pytest.raises(UserError, match="no space left"):
        compare(study, tmp_path / "run")
    assert len(list(tmp_path.glob("run/cells/[!.]*/DONE"))) == 2
    assert not list(tmp_path.glob("run/cells/.*"))


def test_sigint_and_sigterm_leave_sealed_cells(material, tmp_path, study):
    (tmp_path / "study.yaml").write_text(
        yaml.safe_dump({**study, "rules": [{"name": "top_p", "strengths": [n / 100 for n in range(20, 99)]}]})
    )
    command = [sys.executable, "-m", "dllm_sparsity.cli", "compare", "study.yaml", "--out", "run"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")])),
    }
    for number in (signal.SIGINT, signal.SIGTERM):
        sealed = len(list(tmp_path.glob("run/cells/[!.]*/DONE")))
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )
        deadline = time.monotonic() + 120
        while (
            len(list(tmp_path.glob("run/cells/[!.]*/DONE"))) <= sealed
            and time.monotonic() < deadline
            and process.poll() is None
        ):
            time.sleep(0.02)
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 130, errors
        assert errors.strip().splitlines()[-2:] == [
            "error: interrupted; finished cells are sealed",
            "hint:  the same command continues where this one stopped",
        ]
        assert len(list(tmp_path.glob("run/cells/[!.]*/DONE"))) > sealed
        assert not list(tmp_path.glob("run/cells/.*"))


def test_python_objects_and_yaml_are_one_study(study, tmp_path):
    from dllm_sparsity.comparison import as_config

    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    assert as_config(tmp_path / "study.yaml") == as_config(study) == as_config(as_config(study))


def test_cells_of_a_task_see_the_same_examples(material, tmp_path):
    """lm-eval's draw of few-shot examples goes on from cell to cell unless it is put back."""
    lines = (material / "choice.yaml").read_text() + "training_split: test\nnum_fewshot: 2\n"
    (tmp_path / "shots.yaml").write_text(lines.replace("tiny_choice", "tiny_shots"))
    study = {
        "models": [{"paradigm": "autoregressive", "model": str(material / "ar")}],
        "tasks": [{"name": str(tmp_path / "shots.yaml"), "limit": 3}],
        "rules": [{"name": "top_p", "strengths": [0.9, 0.5], "sites": ["input"]}],
    }
    result = compare(study, tmp_path / "run")
    prompts = {tuple(pq.read_table(p)["prompt_hash"].to_pylist()) for p in result.path.glob("cells/*/samples.parquet")}
    assert len(prompts) == 1


def test_changed_code_is_another_cell(finished, tmp_path, monkeypatch):
    from dllm_sparsity.study import environment

    study, _ = finished
    small = {**study, "tasks": study["tasks"][2:], "models": study["models"][:1]}
    first = set(cells(compare(small, tmp_path / "run").path))
    monkeypatch.setattr(environment, "code_identity", lambda modules=(): "other code")
    assert not first & {
        entry["fingerprint"] for entry in json.loads((compare(small, tmp_path / "run").path / "plan.json").read_text())
    }
