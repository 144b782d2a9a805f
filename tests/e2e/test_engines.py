"""Every engine ends with the numbers of one process, also where a worker is killed in the middle of the study."""

import contextlib
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from material import make_study
from test_resume import numbers

from dllm_sparsity import compare
from dllm_sparsity.errors import UserError
from dllm_sparsity.study.engines import Engine
from dllm_sparsity.study.journal import CellJournal

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
    """Kill a process in the middle of the study; return what was killed."""

    def arm(find):
        real, written, gone = CellJournal._write, [], []

        def write(self, *arguments):
            real(self, *arguments)
            written.append(1)
            if len(written) == KILL_AT:
                gone.append(find())
                os.kill(gone[0], signal.SIGKILL)

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
