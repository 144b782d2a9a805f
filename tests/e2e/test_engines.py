"""Every engine ends with the numbers of one process, also where a worker is killed in the middle of the study."""

import contextlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from material import make_study
from test_resume import Stop, numbers, stop_at

from dllm_sparsity import compare
from dllm_sparsity.errors import UserError
from dllm_sparsity.study.config import build_config
from dllm_sparsity.study.engines import Engine, Share
from dllm_sparsity.study.engines.slurm import Part
from dllm_sparsity.study.journal import CellJournal

ROOT = Path(__file__).parents[2]
KILL_AT = 9  # batches answered: inside of the first model's second cell


@pytest.fixture(scope="module")
def study(material):
    found = make_study(material)
    for model in found["models"]:
        model["batch_size"] = 2
    for task in found["tasks"]:
        task["limit"] = 6
    found["rules"] = [{"name": "top_p", "strengths": [0.5], "sites": ["all"]}]
    return found


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as a worker of two has on two cores; sums are rounded alike
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def expected(study, tmp_path_factory, _one_thread):
    path = tmp_path_factory.mktemp("one") / "run"
    compare(study, path)
    return numbers(path)


@pytest.fixture
def killing(monkeypatch):
    """Kill something in the middle of the study, a process when not told how; return what was killed."""

    def arm(find, kill=lambda number: os.kill(number, signal.SIGKILL)):
        real, written, gone = CellJournal._write, [], []

        def write(self, *arguments):
            real(self, *arguments)
            written.append(1)
            if len(written) == KILL_AT:
                gone.append(find())
                kill(gone[0])

        monkeypatch.setattr(CellJournal, "_write", write)
        return gone

    return arm


def actor():
    """Return the number of an actor's process; Ray titles it so."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if command.read_bytes().startswith(b"ray::_Actor"):
                return int(command.parent.name)
    raise LookupError("no actor runs")


def test_processes_of_which_one_is_killed(study, expected, tmp_path, killing, caplog):
    gone = killing(lambda: min(each.pid for each in multiprocessing.active_children()))
    compare(study, tmp_path / "run", engine=Engine(workers=2))
    assert gone
    assert "worker" in (log := (tmp_path / "run" / "log.txt").read_text())
    assert "died and is replaced" in log
    assert "workers that died and were replaced: 1; log.txt says how" in caplog.messages
    assert numbers(tmp_path / "run") == expected


def test_ray_actors_of_which_one_is_killed(study, expected, tmp_path, killing, monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        gone = killing(actor)
        compare(study, tmp_path / "run", engine=Engine("ray"))
        assert not ray.is_initialized()  # it left the cluster it joined
    finally:
        cluster.shutdown()
    assert gone
    assert "died and is replaced" in (tmp_path / "run" / "log.txt").read_text()
    assert numbers(tmp_path / "run") == expected


@pytest.mark.slow
def test_a_ray_node_that_dies(study, expected, tmp_path, killing, monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        gone = killing(lambda: node, lambda own: cluster.remove_node(own, allow_graceful=False))
        compare(study, tmp_path / "run", engine=Engine("ray"))
    finally:
        cluster.shutdown()
    assert gone
    assert numbers(tmp_path / "run") == expected
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["workers"] == 2


@pytest.mark.parametrize(
    ("nodes", "engine", "device", "found"),
    [
        ([{"CPU": 1}, {"CPU": 1}], {}, "auto", (2, 0, 1, "cpu")),
        ([{"CPU": 8}, {"CPU": 2}], {}, "auto", (2, 0, 2, "cpu")),
        ([{"CPU": 3}, {"CPU": 3}], {"workers": 3}, "auto", (3, 0, 1, "cpu")),  # with two CPUs each, one finds no room
        ([{"CPU": 8}], {"workers": 3}, "auto", (3, 0, 2, "cpu")),
        ([{"CPU": 8, "GPU": 3}, {"CPU": 8, "GPU": 3}], {"gpus_per_worker": 2}, "auto", (2, 2, 1, "cuda")),
        ([{"CPU": 1}, {"CPU": 1}], {"workers": 9}, "auto", "9 workers with a CPU each, but the cluster has 2"),
        ([{"CPU": 1}], {"gpus_per_worker": 2}, "auto", "2 GPUs for each worker, but the cluster has none"),
        ([{"CPU": 1}], {"gpus_per_worker": 2}, "cpu", "2 GPUs for each worker, but the cluster has none"),
        ([{"CPU": 1}], {}, "cuda", "1 workers with 1 GPUs each, but the cluster's nodes have none"),
        ([{"CPU": 9, "GPU": 1}, {"GPU": 1}], {"gpus_per_worker": 2}, "auto", "1 workers with 2 GPUs each"),
    ],
)
def test_what_a_cluster_has_room_for(nodes, engine, device, found):
    from dllm_sparsity.study.engines.ray import _resources

    alive = [{"Alive": True, "Resources": own} for own in nodes]
    cluster = SimpleNamespace(nodes=lambda: [*alive, {"Alive": False, "Resources": {"CPU": 64, "GPU": 8}}])
    if isinstance(found, str):
        with pytest.raises(UserError, match=found):
            _resources(cluster, Engine("ray", **engine), device)
        return
    size, gpus, cpus, kind = found
    assert _resources(cluster, Engine("ray", **engine), device) == (size, {"num_gpus": gpus, "num_cpus": cpus}, kind)


def test_a_job_waits_for_one_of_an_earlier_run_and_that_is_said(study, expected, tmp_path, caplog):
    pytest.importorskip("submitit", reason="submitit is not installed")
    part = tmp_path / "run" / "parts" / "1-of-2"
    part.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("name: x")
    hold = "import json, time; from pathlib import Path; from dllm_sparsity.study.config import build_config\n"
    hold += f"from dllm_sparsity.study.rundir import RunDir; part = Path({str(part)!r})\n"
    hold += f"held = RunDir(part, build_config(json.loads({json.dumps(study)!r}))); print('held', flush=True)\n"
    hold += (
        "while not any('in use' in path.read_text() for path in part.parents[1].glob('slurm/*.err')): time.sleep(0.1)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", hold], env=environment, stdout=subprocess.PIPE, text=True) as orphan:
        assert orphan.stdout.readline() == "held\n"
        engine = Engine("slurm", workers=2, options={"cluster": "local", "timeout_min": 10})
        compare(study, tmp_path / "run", engine=engine)
    assert any("jobs of an earlier run still work on 1-of-2 of parts/" in message for message in caplog.messages)
    logs = "".join(path.read_text() for path in (tmp_path / "run" / "slurm").glob("*.err"))
    assert f"1-of-2 is in use by process {orphan.pid} on " in logs
    assert numbers(tmp_path / "run") == expected


def test_a_preempted_job_goes_on_where_it_was(study, expected, tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="submitit is not installed")
    (tmp_path / "cells").mkdir()
    part = Part(build_config(study), tmp_path / "run", None, Share(0, 1, tmp_path / "cells"))
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(Stop):
            part()
    (journal,) = (tmp_path / "run" / "journals").iterdir()
    assert journal.stat().st_size > 1000  # more than its head
    again = pickle.loads(pickle.dumps(part.checkpoint()))  # what submitit queues, as the next job gets it
    begun = stop_at(monkeypatch, 0)
    assert again.function(*again.args, **again.kwargs) is None
    mine = len(begun)
    compare(study, tmp_path / "run")  # writes the report
    assert len(begun) == mine
    assert numbers(tmp_path / "run") == expected
    compare(study, tmp_path / "whole")
    left = len(begun) - mine - 5
    assert mine in (left, left + 1)  # one may be looked at again, to see every site at work


def test_cells_of_parts_are_taken_over_by_every_engine(study, expected, tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="submitit is not installed")
    engine = Engine("slurm", workers=2, options={"cluster": "local", "timeout_min": 10})
    compare(study, tmp_path / "run", engine=engine)
    shutil.rmtree(tmp_path / "run" / "cells")  # a head that was killed before it took them over
    begun = stop_at(monkeypatch, 0)
    compare(study, tmp_path / "run")
    assert not begun
    assert numbers(tmp_path / "run") == expected


def test_jobs_of_an_array(study, expected, tmp_path):
    """Submitit's own local cluster stands in for SLURM: the same array, jobs and pickles, without the queue."""
    pytest.importorskip("submitit", reason="submitit is not installed")
    engine = Engine("slurm", workers=2, options={"cluster": "local", "timeout_min": 10})
    compare(study, tmp_path / "run", engine=engine)
    assert numbers(tmp_path / "run") == expected
    assert sorted(path.name for path in (tmp_path / "run" / "parts").iterdir()) == ["1-of-2", "2-of-2"]


def test_searches_in_jobs(study, tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="submitit is not installed")
    study = {**study, "tasks": study["tasks"][::2], "search": {"width": 0.5, "quality": "nll"}}
    study["rules"] = [{"name": "top_p", "sites": ["all"]}]
    compare(study, tmp_path / "one")
    engine = Engine("slurm", workers=2, options={"cluster": "local", "timeout_min": 10})
    compare(study, tmp_path / "run", engine=engine)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "one")
    found = [json.loads((tmp_path / name / "search.json").read_text()) for name in ("run", "one")]
    assert found[0] == found[1]
    assert [own["task"] for own in found[0]["averages"]] == ["average of 2 tasks"] * 2
    monkeypatch.setattr("dllm_sparsity.study.engines.slurm.run", lambda *_: pytest.fail("a job was submitted"))
    compare(study, tmp_path / "run", engine=engine)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "one")


def test_a_job_that_fails_is_named_and_done_again(study, expected, tmp_path):
    pytest.importorskip("submitit", reason="submitit is not installed")
    engine = Engine("slurm", workers=2, options={"cluster": "local", "timeout_min": 10})
    broken = tmp_path / "run" / "parts" / "2-of-2"
    broken.parent.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("name: x")
    broken.write_text("a file stands where the job wants its folder")
    with pytest.raises(UserError, match=r"1 of 2 jobs failed: .*2-of-2 is a file") as error:
        compare(study, tmp_path / "run", engine=engine)
    assert "goes on" in error.value.hint
    broken.unlink()
    compare(study, tmp_path / "run", engine=engine)
    assert numbers(tmp_path / "run") == expected


def test_what_a_worker_refuses_is_said_in_two_lines(study, tmp_path):
    bad = {**study, "rules": [{"name": "top_p", "strengths": [0.5], "sites": ["all"], "layers": [99]}]}
    with pytest.raises(UserError, match="no such layers: \\[99\\]"):
        compare(bad, tmp_path / "run", engine=Engine(workers=2))
