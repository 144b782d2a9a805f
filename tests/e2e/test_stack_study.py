"""A study whose strengths share forward passes ends with the numbers of one that runs them one by one."""

import json

import pyarrow.parquet as pq
import pytest
import tiny
import torch
from material import make_study
from test_resume import Stop, killed, moments, numbers, without_seconds

import dllm_sparsity.lm.base as base
from dllm_sparsity import compare
from dllm_sparsity.study.config import build_config
from dllm_sparsity.study.engines import Engine, Share
from dllm_sparsity.study.engines.runner import Silent, run_study
from dllm_sparsity.study.journal import CellJournal
from dllm_sparsity.study.recordfile import RecordFile

STRENGTHS = [0.95, 0.9, 0.7, 0.5, 0.2]


@pytest.fixture(scope="module")
def asked(material):
    def study(stack, sites=("all",), models=slice(None), **changes):
        found = make_study(material)
        found["rules"] = [{"name": "top_p", "strengths": STRENGTHS, "sites": list(sites), **changes}]
        found["models"] = [{**model, "batch_size": 3, "stack": stack} for model in found["models"][models]]
        return found

    return study


@pytest.fixture
def batches(monkeypatch):
    """How many copies each batch that is computed holds."""
    real, seen = base.SparsityLM.compute, []

    def noted(self, work):
        seen.append(self.copies)
        return real(self, work)

    monkeypatch.setattr(base.SparsityLM, "compute", noted)
    return seen


def cells(path):
    """Each sealed cell by what it is, without times and without what names its batch plan."""
    found = {}
    for folder in (path / "cells").iterdir():
        record = without_seconds(json.loads((folder / "cell.json").read_text()))
        key = tuple(record[name] for name in ("paradigm", "task", "rule", "strength", "site"))
        samples = pq.read_table(folder / "samples.parquet").drop(["seconds"]).to_pylist()
        found[key] = (record, samples, pq.read_table(folder / "steps.parquet").to_pylist())
    return found


def assert_same(one, other):
    """Answers and every count are equal, log-likelihoods but for rounding."""
    assert one.keys() == other.keys()
    for key, (record, samples, steps) in one.items():
        record_there, samples_there, steps_there = other[key]
        assert steps == steps_there, key
        for mine, theirs in zip(samples, samples_there, strict=True):
            exact = ("doc_id", "prompt_hash", "answer", "answer_tokens", "nfe", "new_tokens", "target_tokens")
            counts = [name for name in mine if name.startswith(("kept_", "total_"))]
            assert [mine[name] for name in (*exact, *counts)] == [theirs[name] for name in (*exact, *counts)]
            assert mine["loglikelihoods"] == pytest.approx(theirs["loglikelihoods"], rel=1e-5, abs=1e-6)
            errors = "loglikelihood_errors"  # of differences between masks, which rounding moves more
            assert mine[errors] == pytest.approx(theirs[errors], rel=1e-3, abs=1e-6)
        assert record["notes"] == record_there["notes"]
        assert record["ffn"] == record_there["ffn"]


@pytest.fixture(scope="module")
def alone(asked, tmp_path_factory):
    path = tmp_path_factory.mktemp("alone") / "run"
    compare(asked(1), path)
    return path


@pytest.fixture(scope="module")
def stacked(asked, tmp_path_factory):
    path = tmp_path_factory.mktemp("stacked") / "run"
    compare(asked(4), path)
    return path


def test_same_answers_and_counts_in_fewer_batches(asked, alone, tmp_path, batches):
    compare(asked(4), tmp_path / "run")
    assert_same(cells(tmp_path / "run"), cells(alone))
    assert not (tmp_path / "run" / "journals").exists()
    each = {copies: batches.count(copies) for copies in (1, 4)}
    assert len(batches) == sum(each.values())
    assert each[1] == 2 * each[4]  # dense, and the fifth strength
    ran = len(batches)
    compare(asked(4), tmp_path / "run")
    assert len(batches) == ran


def test_the_time_of_a_stack_is_shared_out(alone, stacked):
    shares = {}
    for path in (alone, stacked):
        totals = [json.loads((folder / "cell.json").read_text())["totals"] for folder in (path / "cells").iterdir()]
        assert all(own["wall_seconds"] > own["seconds"] * 0.95 for own in totals)
        shares[path] = sum(own["wall_seconds"] for own in totals)
    assert shares[stacked] < 1.5 * shares[alone]


def test_fingerprints(alone, stacked):
    dense, other = [], []
    for path in (alone, stacked):
        plan = json.loads((path / "plan.json").read_text())
        dense.append({entry["fingerprint"] for entry in plan if entry["parts"]["rule"] is None})
        other.append({entry["fingerprint"] for entry in plan if entry["parts"]["rule"] is not None})
    assert dense[0] == dense[1]  # they are not stacked
    assert not other[0] & other[1]


def test_several_sites_layers_and_a_rule_of_chance(asked, tmp_path):
    for name, changes in (("sites", {"sites": ["gate", "input"], "layers": [1]}), ("chance", {"name": "random"})):
        found = []
        for stack in (1, 5):
            study = asked(stack, models=slice(1, 2), **changes)
            study["tasks"] = study["tasks"][:1]
            compare(study, tmp_path / f"{name}{stack}")
            found.append(cells(tmp_path / f"{name}{stack}"))
        assert found[0].keys() == found[1].keys()
        if name == "sites":
            assert_same(*found)
        else:  # its places are drawn from the bits of a row, which another batch may round otherwise
            assert all(
                sum(row["kept"] for row in found[0][key][2])
                == pytest.approx(sum(row["kept"] for row in steps), rel=0.05)
                for key, (_, _, steps) in found[1].items()
            )


@pytest.mark.parametrize("number", [2, 8, 18])
def test_a_crash_between_the_journals_of_a_stack(asked, stacked, tmp_path, monkeypatch, batches, number):
    """The journals of a stack end at different batches, and the run goes on with the same numbers, to the last bit."""
    real, written = CellJournal.add, []

    def add(self, *arguments):
        written.append(1)
        if len(written) == number:
            raise Stop
        real(self, *arguments)

    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(CellJournal, "add", add)
        with pytest.raises(Stop):
            compare(asked(4), path)
    before = len(batches)
    journals = [len(RecordFile(file)) for file in (path / "journals").iterdir()]
    assert max(journals) - min(journals) == (0 if number % 3 == 1 else 1)
    compare(asked(4), path)
    assert numbers(path) == numbers(stacked)
    batches_before, batches[:] = len(batches), []
    compare(asked(4), tmp_path / "whole")
    assert batches_before == len(batches) + 1, before


def test_killed_at_random_moments(asked, tmp_path):
    study = asked(5)
    study["tasks"] = study["tasks"][:2]
    killed(study, tmp_path / "whole", [])
    broken = killed(study, tmp_path / "broken", moments(4, seed=3))
    assert broken["kills"] >= 2
    assert broken["inside"]
    assert numbers(tmp_path / "broken")["summary"] == numbers(tmp_path / "whole")["summary"]
    found, whole = numbers(tmp_path / "broken"), numbers(tmp_path / "whole")
    assert found == whole


def test_with_the_memory_full_fewer_strengths_share_a_pass(asked, alone, tmp_path, monkeypatch):
    real = base.ModelCall.__call__
    at, most = base.ModelCall.at, 8

    def full(function):
        def call(self, rows, *arguments, **more):
            if len(rows.ids) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return function(self, rows, *arguments, **more)

        return call

    monkeypatch.setattr(base.ModelCall, "__call__", full(real))
    monkeypatch.setattr(base.ModelCall, "at", full(at))
    compare(asked(4), tmp_path / "run")
    found, expected = cells(tmp_path / "run"), cells(alone)
    told = {note for record, _, _ in found.values() for note in record["notes"] if "memory" in note}
    assert told == {"the memory held 2 strengths at once, not 4"}
    for record, _, _ in found.values():
        record["notes"] = [note for note in record["notes"] if "memory" not in note]
    assert_same(found, expected)
    most = 2
    with pytest.raises(torch.OutOfMemoryError):
        compare(asked(4), tmp_path / "other")


def test_workers_answer_for_several_strengths(asked, stacked, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    compare(asked(4), tmp_path / "run", engine=Engine(workers=2))
    assert_same(cells(tmp_path / "run"), cells(stacked))


@pytest.mark.parametrize(
    ("engine", "package"),
    [
        (Engine("ray", workers=1), "ray"),
        (Engine("slurm", workers=2, options={"cluster": "local", "timeout_min": 10}), "submitit"),
    ],
    ids=["ray", "slurm"],
)
def test_actors_and_jobs_answer_for_several_strengths(asked, stacked, tmp_path, monkeypatch, engine, package):
    pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    compare(asked(4), tmp_path / "run", engine=engine)
    assert_same(cells(tmp_path / "run"), cells(stacked))


def test_parts_of_a_study_hold_whole_stacks(asked, tmp_path, batches):
    """As jobs of SLURM run them: what shares forward passes is not torn apart."""
    study = asked(4, models=slice(1))
    study["tasks"] = study["tasks"][:1]
    config = build_config(study)
    for number in range(2):
        run_study(config, tmp_path / str(number), Silent(), share=Share(number, 2)).release()
    assert set(batches) == {1, 4}
    sealed = [cells(tmp_path / str(number)) for number in range(2)]
    assert not sealed[0].keys() & sealed[1].keys()
    assert {key[3] for own in sealed for key in own} == {None, *STRENGTHS}


def test_experts_run_one_strength_at_a_time(asked, tmp_path, batches, caplog):
    tiny.causal_lm("mixtral").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    study = asked(3, sites=["intermediate"], models=slice(1))
    study["models"][0]["model"] = str(tmp_path / "model")
    study["tasks"] = study["tasks"][:1]
    compare(study, tmp_path / "run")
    assert set(batches) == {1}
    assert "model runs one strength at a time: experts take the tokens of all strengths together" in caplog.messages


def test_a_strength_that_breaks_leaves_the_others_whole(asked, tmp_path, monkeypatch):
    """A fellow's NaN is raised when the fellow is run, under its own title; what came before it is sealed."""
    from dllm_sparsity.sparsity.reading import NonFiniteError
    from dllm_sparsity.sparsity.unit import Unit

    real = Unit.take

    def take(self, notes=()):
        found = real(self, notes)
        if self.rule is not None and self.rule.strength == 0.7:
            raise NonFiniteError(1, "input", 3)
        return found

    monkeypatch.setattr(Unit, "take", take)
    with pytest.raises(NonFiniteError):
        compare(asked(4), tmp_path / "run")
    done = cells(tmp_path / "run")
    assert {key[3] for key in done} == {None, 0.95, 0.9}
