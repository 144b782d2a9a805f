"""The pool: every batch is answered once, whichever workers die; what cannot go on says so; and how engines are named."""

import json
import pickle
import random
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_sparsity.errors import UserError
from dllm_sparsity.lm.items import Target
from dllm_sparsity.lm.journal import Work
from dllm_sparsity.sparsity.reading import NonFiniteError
from dllm_sparsity.study.engines import Engine, Share, local, slurm
from dllm_sparsity.study.engines.pool import Pool
from dllm_sparsity.study.engines.runner import open_pool
from dllm_sparsity.study.records import checksums, find_damage

RECORD = {
    **dict.fromkeys(("paradigm", "model", "task", "output_type"), "x"),
    **dict.fromkeys(("rule", "strength", "site", "layers", "estimator")),
    **{name: [] for name in ("sites_recorded", "qualities", "notes")},
    **{name: {} for name in ("rule_parameters", "ffn", "totals")},
    **dict.fromkeys(("dense", "shifted_steps", "simulated"), True),
    **{"schema": 1, "fingerprint": "abc", "items": 1},
}


class DiedError(Exception):
    """What a call raises when its worker is gone."""


class Worker:
    """Answers at once; dies in the calls that `fate` says, and all its later calls fail as well."""

    def __init__(self, fate):
        self.fate, self.dead, self.stopped = fate, False, False

    def ask(self, method, *arguments):
        asked = Future()
        if method == "answer" and not self.dead:
            self.dead = self.fate(arguments[1])
        if self.dead or self.stopped:
            asked.set_exception(DiedError("gone"))
        elif isinstance(answer := arguments[-1], Exception):
            asked.set_exception(answer)
        else:
            asked.set_result(answer)
        return asked

    def stop(self):
        self.stopped = True


def pool_of(fate, size=2):
    workers = []

    def start(number):
        workers.append(Worker(fate))
        return workers[-1]

    return Pool(start, size, (DiedError,), seed=0), workers


def works(count):
    return [(number, Work([Target("item", [number], [1])])) for number in range(count)]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(0, 30), st.integers(0, 2**32), st.floats(0, 0.25))
def test_every_batch_is_answered_once(size, count, seed, share):
    draw, tries = random.Random(seed), {}

    def fate(work):
        key = work.key
        tries[key] = tries.get(key, 0) + 1
        return tries[key] == 1 and draw.random() < share

    pool, workers = pool_of(fate, size)
    asked = works(count)
    got = list(pool.counted(None, asked))
    assert sorted(number for number, _ in got) == list(range(count))
    assert all(work is dict(asked)[number] for number, work in got)
    pool.close()
    assert all(worker.stopped for worker in workers)


def test_a_batch_that_kills_workers_is_given_up():
    bad = works(6)[3][1].key
    pool, _ = pool_of(lambda work: work.key == bad)
    with pytest.raises(UserError, match="a batch of 1 requests killed 3 workers") as error:
        list(pool.counted(None, works(6)))
    assert "batch_size" in error.value.hint


def test_workers_that_never_live_end_the_run():
    class Dead(Worker):
        def ask(self, method, *arguments):
            failed = Future()
            failed.set_exception(DiedError("at birth"))
            return failed

    pool = Pool(lambda number: Dead(None), 2, (DiedError,), seed=0)
    with pytest.raises(UserError, match="workers died, and no batch was answered"):
        pool.describe()
    with pytest.raises(UserError, match="workers died, and no batch was answered"):
        list(pool.counted(None, works(3)))


def test_an_error_of_a_batch_is_the_study_s():
    class Refusing(Worker):
        def ask(self, method, *arguments):
            return super().ask("other", UserError("no such site", "choose another") if method == "answer" else 0)

    pool = Pool(lambda number: Refusing(lambda _: False), 2, (DiedError,), seed=0)
    with pytest.raises(UserError, match="no such site"):
        list(pool.counted(None, works(3)))


def test_errors_cross_from_one_process_to_another():
    for error in (UserError("what", "do"), NonFiniteError(3, "input", 7)):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert again.__dict__ == error.__dict__


@given(st.integers(0, 40), st.integers(1, 9))
def test_parts_of_a_study_are_all_of_it(count, parts):
    found = [Share(number, parts).of(range(count)) for number in range(parts)]
    assert [each for part in found for each in part] == list(range(count))
    assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("cloud", (), "unknown engine 'cloud'"),
        ("slrum", (), "did you mean slurm"),
        ("ray://", (), "cannot read engine"),
        ("slurm://host", (), "cannot read engine"),
        ("slurm", ("timeout_min",), "cannot read engine option"),
        ("local", ("timeout_min=3",), "takes no options"),
    ],
)
def test_engines_that_do_not_exist_are_refused(text, options, message):
    with pytest.raises(UserError, match=message):
        Engine.parse(text, options=options)


def test_how_engines_are_named():
    assert Engine.parse("ray://10.0.0.1:10001").address == "ray://10.0.0.1:10001"
    assert Engine.parse("ray").address is None
    found = Engine.parse("slurm", 4, options=("slurm_partition=a100", "timeout_min=90"))
    assert found.options == {"slurm_partition": "a100", "timeout_min": 90}
    assert found.workers == 4


@pytest.mark.parametrize(
    ("device", "hint"),
    [
        ("cpu", "leave --gpus-per-worker out"),
        ("cuda", "leave --gpus-per-worker out"),
        ("mps", "leave --gpus-per-worker out"),
        ("cuda:1", "use --device cuda"),
    ],
)
def test_gpus_that_a_device_does_not_have_are_not_shared_out(device, hint, monkeypatch):
    monkeypatch.setattr(local, "visible_gpus", list)
    with pytest.raises(UserError, match=f"2 GPUs for each worker, but device {device} has none") as error:
        local.count_workers(Engine(gpus_per_worker=2), device)
    assert error.value.hint == hint


def test_jobs_of_slurm_are_not_done_here(tmp_path):
    config = SimpleNamespace(device="auto", seed=0)
    assert open_pool(Engine("slurm", workers=3), config, tmp_path / "log.txt") is None


@pytest.mark.parametrize(
    ("options", "device"),
    [
        ({}, "cpu"),
        ({"gpus_per_node": 1}, "cuda"),
        ({"gpus_per_node": 0}, "cpu"),
        ({"slurm_gres": "gpu:1"}, "cuda"),
        ({"slurm_partition": "nongpu"}, "cpu"),
    ],
)
def test_the_device_of_jobs(options, device):
    assert slurm.device_of(Engine("slurm", options=options), "auto") == device
    assert slurm.device_of(Engine("slurm", options=options), "cpu") == "cpu"


def test_a_sealed_cell_takes_the_place_of_a_damaged_one(tmp_path):
    study = SimpleNamespace(path=tmp_path / "study")
    (study.path / "cells" / "abc").mkdir(parents=True)
    sealed = tmp_path / "parts" / "cells" / "abc"
    sealed.mkdir(parents=True)
    for name in ("samples.parquet", "steps.parquet"):
        (sealed / name).write_text(name)
    (sealed / "cell.json").write_text(json.dumps(RECORD))
    (sealed / "DONE").write_text(json.dumps(checksums(sealed)))
    slurm.take_over([sealed], study)
    assert find_damage(study.path / "cells" / "abc") is None
    assert find_damage(sealed) is None  # a part that runs again has its own
