"""A study that is killed, runs out of disk, finds its files damaged or its folder taken: it goes on, with the same numbers."""

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from material import make_study

import dllm_sparsity.lm.base as base
from dllm_sparsity import compare
from dllm_sparsity.errors import UserError
from dllm_sparsity.study.config import build_config
from dllm_sparsity.study.rundir import RunDir

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))}


@pytest.fixture(scope="module")
def small(material):
    study = make_study(material)
    for model in study["models"]:
        model["batch_size"] = 2
    for task in study["tasks"][:2]:
        task["limit"] = 6
    study["rules"] = [{"name": "top_p", "strengths": [0.5], "sites": ["all"]}]
    return study


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run"
    compare(small, path)
    return path


def without_seconds(value):
    if isinstance(value, dict):
        left_out = ("study", "environment", "speed")  # the folder's name, and the machine
        return {k: without_seconds(v) for k, v in value.items() if "seconds" not in k and k not in left_out}
    return [without_seconds(part) for part in value] if isinstance(value, list) else value


def numbers(path):
    """Everything that a run computed, apart from times."""
    found = {"summary": without_seconds(json.loads((path / "summary.json").read_text()))}
    for folder in sorted((path / "cells").iterdir()):
        found[folder.name] = (
            without_seconds(json.loads((folder / "cell.json").read_text())),
            pq.read_table(folder / "samples.parquet").drop(["seconds"]).to_pylist(),
            pq.read_table(folder / "steps.parquet").to_pylist(),
        )
    return found


def killed(study, out, kills, workers=None):
    """Run a study in children of one process, killed where `kills` says; return what it reports."""
    task = {"study": study, "out": str(out), "begun": str(out.with_suffix(".begun")), "kills": kills}
    task["workers"] = workers
    command = [sys.executable, str(TESTS / "killed.py")]
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1", "KILLED": str(out)}
    ran = subprocess.run(
        command, input=json.dumps(task), text=True, capture_output=True, env=environment, timeout=600, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def unbroken(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("unbroken") / "run"
    return path, killed(small, path, [])


def moments(count, seed):
    """Random moments: so many batches begun, so many seconds later; half of them within a batch or behind the last."""
    draw = random.Random(seed)
    return [(draw.randint(1, 6), draw.choice([0.0, draw.uniform(0, 0.02), draw.uniform(0, 0.2)])) for _ in range(count)]


def check_kills(small, unbroken, path, kills):
    whole, ran = unbroken
    broken = killed(small, path, kills)
    assert broken["kills"] >= len(kills) // 2  # the study may end before the last of them
    assert broken["inside"]
    assert broken["begun"] <= ran["begun"] + broken["kills"]  # each kill costs one batch at most
    assert numbers(path) == numbers(whole)
    assert not (path / "journals").exists()


def test_killed_at_random_moments_it_ends_with_the_same_numbers(small, unbroken, tmp_path):
    check_kills(small, unbroken, tmp_path / "run", moments(6, seed=0))


@pytest.mark.slow
def test_killed_twenty_times_it_ends_with_the_same_numbers(small, unbroken, tmp_path):
    kills = [(1 + number % 3, seconds) for number, (_, seconds) in enumerate(moments(20, seed=1))]
    check_kills(small, unbroken, tmp_path / "run", kills)


@pytest.mark.slow
def test_killed_with_workers_it_ends_with_the_same_numbers(small, unbroken, tmp_path):
    path, (whole, ran) = tmp_path / "run", unbroken
    broken = killed(small, path, [(2, 0.0), (5, 0.05), (3, 0.01)], workers=2)
    assert broken["kills"] == 3
    assert broken["inside"]
    assert broken["begun"] <= ran["begun"]  # no batch is written down twice
    assert numbers(path) == numbers(whole)
    assert not (path / "journals").exists()
    assert not list(processes_with(f"KILLED={path}"))


def processes_with(variable):
    """Yield the numbers of processes that have a variable in their environment."""
    for each in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if variable.encode() in each.read_bytes().split(b"\0"):
                yield int(each.parent.name)


class Stop(BaseException):
    """Stands for a crash."""


def stop_at(monkeypatch, number):
    """Crash in the batch of this number, counted over the run; 0 counts alone."""
    real, begun = base.SparsityLM.compute, []

    def counted(self, work):
        begun.append(1)
        if len(begun) == number:
            raise Stop
        return real(self, work)

    monkeypatch.setattr(base.SparsityLM, "compute", counted)
    return begun


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_journal_is_named_and_made_good(small, finished, tmp_path, monkeypatch, caplog, damage):
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(Stop):
            compare(small, path)
    (journal,) = (path / "journals").iterdir()
    data = bytearray(journal.read_bytes())
    data[len(data) // 2] ^= 4
    journal.write_bytes(data if damage == "flipped" else data[: len(data) * 2 // 3])
    compare(small, path)
    told = rf"{re.escape(str(journal))}: cut short, or damaged: \d+ bytes behind record"
    assert re.search(told, (path / "log.txt").read_text())
    assert any(re.search(told, message) for message in caplog.messages)  # on the terminal as well
    assert numbers(path) == numbers(finished)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damaged_cells_are_named_and_computed_again(small, finished, tmp_path, caplog):
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    cells, damaged = sorted((path / "cells").iterdir()), {}
    for harm in (cut, flip):
        for name in ("cell.json", "samples.parquet", "steps.parquet", "DONE"):
            cell = cells[len(damaged)]
            harm(cell / name)
            damaged[cell.name] = name
    missing, renamed = cells[len(damaged)], cells[len(damaged) + 1]
    (missing / "steps.parquet").unlink()
    shutil.rmtree(renamed)
    shutil.copytree(cells[-1], renamed)  # a cell under another's name
    compare(small, path)
    told = (path / "log.txt").read_text()
    for name, file in damaged.items():
        (line,) = re.findall(f"cell {name}: .* is damaged; it is computed again", told)
        assert file in line or file == "DONE"  # whose checksums may be what was damaged
        assert line in caplog.messages
    assert f"cell {missing.name}: steps.parquet cannot be read" in told
    assert f"cell {renamed.name}: cell.json is of another cell" in told
    assert numbers(path) == numbers(finished)


def test_the_field_is_named_in_which_another_study_differs(small, finished, tmp_path, caplog):
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    changed = {**small, "models": [{**small["models"][0], "batch_size": 3}], "tasks": small["tasks"][:1]}
    compare(changed, path)
    line = "2 cells of the run before are of no use to this one; they differ in: model.batch_size"
    assert line in caplog.messages
    assert line in (path / "log.txt").read_text()
    summary = json.loads((path / "summary.json").read_text())
    planned = {entry["fingerprint"] for entry in json.loads((path / "plan.json").read_text())}
    assert len(summary["cells"]) == len(planned) == 2
    assert not planned & {folder.name for folder in (finished / "cells").iterdir()}


def test_what_the_first_moments_leave_is_no_foreign_folder(small, tmp_path):
    path, config = tmp_path / "run", build_config(small)
    (path / "cells").mkdir(parents=True)
    for name in (".lock", ".lock.owner", ".lock.owner.4194305", ".config.yaml.4194305", "log.txt"):
        (path / name).write_text("")
        RunDir(path, config).release()
    assert not list(path.glob(".*4194305"))
    (path / "cells" / "kept").mkdir()
    with pytest.raises(UserError, match="is not empty and holds no study"):
        RunDir(path, config)
    assert not (path / "config.yaml").exists()


def test_two_processes_do_not_share_a_folder(small, tmp_path):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(small))
    holder = RunDir(tmp_path / "run", build_config(small))
    command = [sys.executable, "-m", "dllm_sparsity.cli", "compare", "study.yaml", "--out", "run"]
    ran = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr.strip().splitlines()[-2:] == [
        f"error: run is in use by process {os.getpid()} on {os.uname().nodename}",
        "hint:  wait until it has ended, or give another folder with --out",
    ]
    take = "import sys; from dllm_sparsity.study.rundir import RunDir; from dllm_sparsity.study.config import read_config\n"
    take += "RunDir(__import__('pathlib').Path('run'), read_config('study.yaml'))"
    again = [sys.executable, "-c", take]
    assert subprocess.run(again, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, check=False).returncode == 1
    with RunDir(tmp_path / "run", build_config(small)):  # the same process may come in twice
        pass
    holder.release()
    holder.release()
    assert subprocess.run(again, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, check=False).returncode == 0
    assert subprocess.run(again, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own, and a function that mounts it anew with other options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, check=False)

    if shutil.which("mount") is None or mount("size=160k").returncode:
        pytest.skip("mounting a small disk takes a privilege that this user lacks")
    try:
        yield place, lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", place], check=False)


def test_a_full_disk_loses_nothing_that_is_sealed(small, finished, disk):
    place, remount = disk
    study, path, sealed, messages = {**small, "models": small["models"][:1]}, place / "run", [], []
    for size in (64, 96, 128, 160, 8000):  # kibibytes
        remount(f"size={size}k")
        try:
            compare(study, path)
        except UserError as error:
            messages.append(error.message)
        sealed.append(len(list(path.glob("cells/[!.]*/DONE"))))
        assert not list(path.glob("cells/.*"))
    assert all("no space left" in message.lower() for message in messages), messages
    assert len(messages) == 4
    assert sealed == sorted(sealed)
    assert any(0 < count < sealed[-1] for count in sealed), sealed
    mine, whole = numbers(path), numbers(finished)
    assert all(mine[cell] == whole[cell] for cell in mine if cell != "summary")


def test_a_disk_that_cannot_be_written_to_is_two_lines(small, disk, tmp_path):
    place, remount = disk
    remount("ro")
    with pytest.raises(UserError, match="cannot write to") as caught:
        compare(small, place / "run")
    assert caught.value.hint == "give another folder with --out"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        compare(small, tmp_path / "file" / "run")
