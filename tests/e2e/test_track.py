"""A study told to trackers: the real trackio and wandb, offline, read back; objects of one's own; trackers that fail."""

import json
import logging
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from material import make_study

from dllm_sparsity import compare
from dllm_sparsity.analysis.loading import load
from dllm_sparsity.errors import UserError
from dllm_sparsity.study import run as study_run


@pytest.fixture(scope="module")
def small(material):
    study = make_study(material)
    study["models"], study["tasks"] = study["models"][:1], study["tasks"][:2]
    study["rules"] = [{"name": "top_p", "strengths": [0.9, 0.5], "sites": ["input"]}]
    return study


class Mine:
    """A tracker of one's own."""

    def __init__(self):
        self.told, self.finished = [], 0

    def log(self, numbers):
        self.told.append(numbers)

    def finish(self):
        self.finished += 1


@pytest.fixture(scope="module")
def told(small, tmp_path_factory):
    mine, path = Mine(), tmp_path_factory.mktemp("told") / "run"
    result = compare(small, path, track=mine)
    return mine, result


def test_each_cell_is_told_once_and_the_study_at_the_end(told):
    mine, result = told
    assert mine.finished == 1
    assert len(mine.told) == 6 + 1
    cells = load(result.path).cells
    dense = next(numbers for numbers in mine.told if any("tiny_choice/ar/dense/acc" in name for name in numbers))
    (own,) = [cell for cell in cells if cell.record["dense"] and cell.record["task"] == "tiny_choice"]
    right = own.samples["correct"].to_pylist()
    assert dense["tiny_choice/ar/dense/acc"] == sum(right) / len(right)
    gold = [
        (-values[target], tokens[target])
        for values, tokens, target in zip(
            *(own.samples[name].to_pylist() for name in ("loglikelihoods", "target_tokens", "target")), strict=True
        )
    ]
    assert dense["tiny_choice/ar/dense/nll"] == pytest.approx(sum(t for t, _ in gold) / sum(n for _, n in gold))
    assert dense["tiny_choice/ar/dense/items"] == 4
    assert dense["tiny_choice/ar/dense/seconds"] > 0
    sparse = [numbers for numbers in mine.told if "tiny_choice/ar/top_p, input/strength" in numbers]
    assert sorted(numbers["tiny_choice/ar/top_p, input/strength"] for numbers in sparse) == [0.5, 0.9]
    achieved = {cell["strength"]: cell["achieved"]["input"] for cell in result.summary["cells"] if cell["site"]}
    for numbers in sparse:
        at = numbers["tiny_choice/ar/top_p, input/strength"]
        assert numbers["tiny_choice/ar/top_p, input/sparsity_input"] == pytest.approx(achieved[at], abs=0.1)
    assert not any("agreement" in name for numbers in mine.told[:-1] for name in numbers)
    row = next(row for row in result.table() if row["task"] == "tiny_choice")
    assert mine.told[-1]["tiny_choice/ar/top_p, input/dense"] == row["dense"]
    assert all(isinstance(value, int | float) for numbers in mine.told for value in numbers.values())


def test_cells_are_told_as_they_are_sealed_and_again_by_a_run_that_goes_on(small, tmp_path, monkeypatch):
    real, calls, mine = study_run.run_cell, [], Mine()

    def dies(*arguments, **keywords):
        calls.append(len(mine.told))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr("dllm_sparsity.study.engines.runner.run_cell", dies)
        with pytest.raises(KeyboardInterrupt):
            compare(small, tmp_path / "run", track=mine)
    assert calls == [0, 1, 2, 3]
    assert (len(mine.told), mine.finished) == (3, 1)
    other = Mine()
    compare(small, tmp_path / "run", track=other)
    assert other.told[:3] == mine.told
    assert len(other.told) == 7


@pytest.mark.parametrize("where", ["log", "finish"])
def test_a_tracker_that_fails_is_told_of_and_the_study_goes_on(small, tmp_path, caplog, where):
    mine = Mine()
    calls = []

    def fails(*numbers):
        calls.append(1)
        raise RuntimeError("no space\nleft")

    setattr(mine, where, fails)
    with caplog.at_level(logging.WARNING):
        result = compare(small, tmp_path / "run", track=mine)
    assert result.report.exists()
    assert calls == [1]
    said = [message for message in caplog.messages if "goes on without it" in message]
    assert said == ["Mine failed, the study goes on without it: RuntimeError: no space left"]


def test_a_package_that_is_missing_or_unknown_is_said_before_anything_runs(small, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="unknown tracker 'wandbb'; did you mean wandb"):
        compare(small, tmp_path / "run", track="wandbb")
    monkeypatch.setattr("dllm_sparsity.study.track.find_spec", lambda name: None)
    with pytest.raises(UserError, match="trackio is not installed") as error:
        compare(small, tmp_path / "run", track="trackio")
    assert error.value.hint == "pip install '.[trackio]'"
    assert not (tmp_path / "run").exists()


def test_a_package_that_cannot_be_imported_is_said_before_anything_runs(small, tmp_path, monkeypatch):
    (tmp_path / "trackio.py").write_text("raise ImportError('it wants another numpy')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(UserError, match="trackio cannot be imported: ImportError: it wants another numpy"):
        compare(small, tmp_path / "run", track="trackio")
    assert not (tmp_path / "run").exists()


def test_offline_trackio_must_not_send(small, tmp_path, monkeypatch):
    monkeypatch.setattr("dllm_sparsity.study.track.find_spec", lambda name: name)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/space")
    with pytest.raises(UserError, match="would send to someone/space") as error:
        compare(small, tmp_path / "run", track="trackio")
    assert error.value.hint == "unset TRACKIO_SPACE_ID"


def test_a_package_that_was_told_all_is_not_opened_again(small, told, tmp_path, monkeypatch, caplog):
    """The package is a stand-in, for trackio need not be installed: what it is asked to do is what is looked at."""
    import shutil
    from types import SimpleNamespace

    calls = []
    fake = SimpleNamespace(
        init=lambda **_: calls.append("init"), log=lambda numbers: calls.append("log"), finish=lambda: calls.append("x")
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.setattr("dllm_sparsity.study.track.find_spec", lambda name: name)
    path = shutil.copytree(told[1].path, tmp_path / "run")
    compare(small, path, track="trackio")  # finished, but the package was never told
    assert calls == ["init", *["log"] * 7, "x"]
    calls.clear()
    with caplog.at_level(logging.WARNING):
        compare(small, path, track="trackio")
    assert calls == []
    assert any("trackio was told of this study before" in message for message in caplog.messages)
    more = {**small, "rules": [{"name": "top_p", "strengths": [0.9, 0.5, 0.7], "sites": ["input"]}]}
    compare(more, path, track="trackio")
    assert calls == ["init", *["log"] * 9, "x"]
    calls.clear()
    kept = json.loads((path / "tracked.json").read_text())
    kept["trackio"]["study"]["other"] = 1.0
    (path / "tracked.json").write_text(json.dumps(kept))
    compare(more, path, track="trackio")  # no new cell, but other findings
    assert calls == ["init", *["log"] * 9, "x"]
    calls.clear()
    (path / "tracked.json").write_text("{")
    compare(more, path, track="trackio")
    assert calls == ["init", *["log"] * 9, "x"]


def test_what_one_package_was_told_is_not_forgotten_for_another(small, told, tmp_path, monkeypatch):
    """Stand-ins, as above."""
    import shutil
    from types import SimpleNamespace

    calls = []
    for name in ("trackio", "wandb"):
        fake = SimpleNamespace(
            init=lambda name=name, **_: calls.append(name), log=lambda _: None, finish=lambda: None, Settings=dict
        )
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr("dllm_sparsity.study.track.find_spec", lambda name: name)
    path = shutil.copytree(told[1].path, tmp_path / "run")
    for name in ("trackio", "wandb", "trackio", "wandb"):
        compare(small, path, track=name)
    assert calls == ["trackio", "wandb"]


def on_command_line(small, tmp_path, name, environment):
    import yaml

    (tmp_path / "study.yaml").write_text(yaml.safe_dump(small))
    command = [sys.executable, "-m", "dllm_sparsity.cli", "compare", "study.yaml", "--out", "run", "--offline"]
    ran = subprocess.run(
        [*command, "--json", "--track", name],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env=environment,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "goes on without it" not in ran.stderr
    return json.loads(ran.stdout)  # nothing else may stand there


@pytest.fixture
def environment(tmp_path):
    import os

    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def test_trackio_keeps_the_study(small, told, tmp_path, environment):
    pytest.importorskip("trackio", reason="trackio is not installed")
    for _ in range(2):  # finished, it is not told again
        on_command_line(small, tmp_path, "trackio", {**environment, "TRACKIO_DIR": str(tmp_path / "kept")})
    (database,) = (tmp_path / "kept").glob("dllm-sparsity*.db")
    with sqlite3.connect(database) as connection:
        rows = [json.loads(text) for (text,) in connection.execute("select metrics from metrics order by id")]
        (config,) = connection.execute("select config from configs").fetchone()
    compared(rows, told[0].told)
    assert json.loads(config)["rules"][0]["strengths"] == [0.9, 0.5]


def records_of(data, block=32768):
    """Give the records of a log in the format of LevelDB: blocks of parts, each with checksum, length and kind."""
    place, parts = 7, b""  # behind the file's own head
    while place + 7 <= len(data):
        if block - place % block < 7:  # no part begins at the end of a block
            place += block - place % block
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_keeps_the_study_offline(small, told, tmp_path, environment):
    pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto import wandb_internal_pb2

    on_command_line(small, tmp_path, "wandb", environment)
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    rows, config = [], {}
    for data in records_of(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
        for part in (record.run.config, record.config):
            config |= {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in part.update}
    compared(rows, told[0].told)
    assert config["rules"][0]["strengths"] == [0.9, 0.5]


def compared(rows, wanted):
    """Rows of a tracker have what ours were told, but for seconds, and names of their own."""
    assert len(rows) == len(wanted)
    for row, numbers in zip(rows, wanted, strict=True):
        for name, value in numbers.items():
            assert name in row
            assert name.endswith("/seconds") or row[name] == pytest.approx(value)


def test_cells_that_an_engine_seals_meanwhile_are_told_too(small, told, monkeypatch):
    """Where several machines work, only the number of answered requests is heard of until the end."""
    from dllm_sparsity.study.config import build_config
    from dllm_sparsity.study.engines.runner import Silent
    from dllm_sparsity.study.track import Tracking

    mine, place = Mine(), told[1].path
    sealed = sorted(folder.name for folder in (place / "cells").iterdir())
    hidden = place / "cells" / sealed[0] / "DONE"
    done = hidden.read_bytes()
    hidden.unlink()
    now = iter([0.0, 10.0, 31.0, 31.0, 32.0])
    monkeypatch.setattr("dllm_sparsity.study.track.time.monotonic", lambda: next(now))
    tracking = Tracking(mine, build_config(small), place, Silent(), lambda folder: {folder.name: 1.0})
    tracking.start(1, 0)
    assert len(mine.told) == 5
    hidden.write_bytes(done)
    tracking.share(1, 2)  # ten seconds later
    assert len(mine.told) == 5
    tracking.share(2, 2)
    assert mine.told[5:] == [{sealed[0]: 1.0}]
