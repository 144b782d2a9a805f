"""Dense run again with its requests batched in another order: what the study runs, and the noise floor in its report."""

import json
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import tiny
from click.testing import CliRunner
from lm_eval.api.instance import Instance

from autoregressive.backend import AutoregressiveBackend
from dllm_sparsity import compare
from dllm_sparsity.analysis.checking import read_record
from dllm_sparsity.cli.main import cli
from dllm_sparsity.diffusion.backend import DiffusionBackend
from dllm_sparsity.errors import UserError
from dllm_sparsity.study import run as study_run
from dllm_sparsity.study.config import build_config
from dllm_sparsity.study.plan import cell_parts, expand, fingerprint

TEXTS = [f"{'a long way ' * (n % 5)}to number {n}" for n in range(12)]


def embedded(replicates):
    return {
        "models": [
            {"paradigm": "autoregressive", "model": "embedded:autoregressive", "batch_size": 3},
            {"paradigm": "diffusion", "model": "embedded:diffusion", "batch_size": 4, "steps": 4, "mc": 2},
        ],
        "tasks": [{"name": "easy_endings", "limit": 6}, {"name": "heldout_continuation", "limit": 2}],
        "rules": [{"name": "top_p", "strengths": [0.6], "sites": ["all"]}],
        "replicates": replicates,
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("replicates") / "run"
    return compare(embedded(1), path)


def records(path):
    return [json.loads(file.read_text()) for file in sorted(path.glob("cells/*/cell.json"))]


def test_the_report_has_the_floor_of_every_curve_and_counts_no_replicate_as_one(finished):
    found = records(finished.path)
    again = [record for record in found if "replicate" in record]
    assert [record["replicate"] for record in again] == [1] * 4
    assert all(record["dense"] and record["parts"]["replicate"] == 1 for record in again)
    assert not any("replicate" in record["parts"] for record in found if record not in again)
    curves = finished.summary["curves"]
    assert len({(curve["paradigm"], curve["task"]) for curve in curves}) == 4
    for curve in curves:
        assert len(curve["points"]) == 2
        assert curve["points"][0]["fingerprint"] not in {record["fingerprint"] for record in again}
        assert curve["noise"]["floor"] < 1e-4
        assert {point["noise_floor"] for point in curve["points"][1:]} == {curve["noise"]["floor"]}
    page = finished.report.read_text()
    for model in ("autoregressive", "diffusion"):
        assert f"on easy_endings, {model} (" in page
    assert "dense run again in another batch order moves" in page
    assert "dense, run 2" in page
    assert "several dense cells" not in page
    rows = pq.read_table(finished.path / "tables" / "items.parquet").to_pylist()
    assert sorted(row["replicate"] for row in rows if row["strength"] is None) == [0] * 4 + [1] * 4


def test_another_order_moves_the_last_bits_and_nothing_else(finished):
    found = records(finished.path)
    moved = 0
    for again in (record for record in found if "replicate" in record):
        same = ("paradigm", "task", "dense")
        first = next(r for r in found if "replicate" not in r and all(r[name] == again[name] for name in same))
        one, two = (
            pq.read_table(finished.path / "cells" / record["fingerprint"] / "samples.parquet").sort_by("doc_id")
            for record in (first, again)
        )
        assert one["prompt_hash"] == two["prompt_hash"]
        for ours, theirs in zip(one["loglikelihoods"].to_pylist(), two["loglikelihoods"].to_pylist(), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
            moved += ours != theirs
    assert moved > 0


def test_one_batch_is_told_of(tmp_path):
    study = embedded(1)
    study["models"] = [{**study["models"][0], "batch_size": 100}]
    study["tasks"] = study["tasks"][:1]
    result = compare(study, tmp_path / "run")
    notes = result.summary["notes"]
    assert "easy_endings on autoregressive is one batch: run again it is the same batch" in notes
    assert any("dense run again in the same batch, its only one, does not move acc on easy_endings" in n for n in notes)
    assert not any("in another batch order" in note for note in notes)


@pytest.mark.parametrize("name", ["ar", "dm"])
def test_other_requests_share_a_batch_and_every_one_is_asked_once(monkeypatch, name):
    model = tiny.llama(name == "ar", forbid_mask=name == "dm")
    lm = (AutoregressiveBackend if name == "ar" else DiffusionBackend)(model, tiny.tokenizer(), batch_size=4)
    requests = [
        Instance("loglikelihood", {}, (text, " end"), number, metadata=("t", number, 1))
        for number, text in enumerate(TEXTS)
    ]
    batches, score = [], lm._score
    monkeypatch.setattr(lm, "_score", lambda targets: batches.append([t.item[1] for t in targets]) or score(targets))
    orders, answers = {}, {}
    for seed in (None, 1, 1, 2):
        batches.clear()
        lm.log.clear()
        lm.order_seed = seed
        answers[seed] = lm.loglikelihood(requests)
        assert sorted(chain(*batches)) == list(range(len(TEXTS)))
        assert orders.setdefault(seed, list(batches)) == batches  # the same each time
    assert len({repr(order) for order in orders.values()}) == 3
    for own in answers.values():
        assert [value for value, _ in own] == pytest.approx([value for value, _ in answers[None]], rel=1e-4)


def test_generation_is_batched_in_another_order_with_the_same_answers(monkeypatch):
    lm = AutoregressiveBackend(tiny.llama(True), tiny.tokenizer(), batch_size=4)
    requests = [
        Instance("generate_until", {}, (text, {"until": [], "max_gen_toks": 4}), n, metadata=("t", n, 1))
        for n, text in enumerate(TEXTS)
    ]
    batches, generate = [], lm._generate
    monkeypatch.setattr(lm, "_generate", lambda batch: batches.append(list(batch.items)) or generate(batch))
    first, before = lm.generate_until(requests), list(batches)
    batches.clear()
    lm.order_seed = 1
    assert lm.generate_until(requests) == first
    assert batches != before
    assert sorted(chain(*batches)) == sorted(chain(*before))


def test_fingerprints_of_studies_without_replicates_stay():
    config = build_config(embedded(2))
    dense, again, third, sparse = expand(config)[:4]
    assert [cell.replicate for cell in (dense, again, third, sparse)] == [0, 1, 2, 0]
    assert [cell.title.rsplit(" | ", 1)[-1] for cell in (dense, again, third)] == [
        "dense",
        "dense, run 2",
        "dense, run 3",
    ]
    plain = expand(build_config(embedded(0)))
    assert plain[:2] == [dense, sparse]
    parts = [cell_parts(cell, 0, {"w": "1"}, {"name": "t"}, {"torch": "2"}) for cell in (dense, again, third)]
    assert "replicate" not in parts[0]
    assert parts[1] == {**parts[0], "replicate": 1}
    assert len(set(map(fingerprint, parts))) == 3


def test_a_study_that_only_searches_runs_dense_on_all_items_for_its_replicates():
    study = {**embedded(1), "search": {}, "rules": [{"name": "top_p", "sites": ["input"]}]}
    cells = expand(build_config(study))
    assert [(cell.rule, cell.block, cell.replicate) for cell in cells] == [(None, None, 0), (None, None, 1)] * 4
    assert expand(build_config({**study, "replicates": 0})) == []


def test_a_backend_that_knows_no_order_is_refused():
    config = build_config(embedded(1))
    again = replace(expand(config)[0], replicate=1)
    with pytest.raises(UserError, match="cannot batch its requests in another order"):
        study_run.run_cell(again, None, SimpleNamespace(lm=object()), "cell", {"seed": 0}, {}, None)


def test_the_backend_is_left_as_it_was(monkeypatch, tmp_path):
    seen, real = [], study_run.prepared

    def watched(lm, setting):
        seen.append(lm.order_seed)
        return real(lm, setting)

    monkeypatch.setattr(study_run, "prepared", watched)
    study = embedded(1)
    study["models"], study["tasks"] = study["models"][:1], study["tasks"][:1]
    compare(study, tmp_path / "run")
    assert seen == [None] * 3


def test_the_command_line_asks_for_replicates_and_a_dry_run_counts_them():
    counts = []
    for extra in ([], ["--replicates", "2"]):
        command = ["compare", "--ar", "embedded:autoregressive", "--task", "easy_endings", "--limit", "2", *extra]
        command += ["--strength", "0.5", "--site", "input", "--dry-run", "--json"]
        ran = CliRunner().invoke(cli, command, catch_exceptions=False)
        assert ran.exit_code == 0, ran.output
        found = json.loads(ran.stdout.strip().splitlines()[-1])
        (part,) = found["parts"]
        counts.append((part["cells"], part["runs"], found["totals"]["forwards"]))
    (cells, runs, forwards), (more_cells, more_runs, more_forwards) = counts
    assert (cells, runs, more_cells, more_runs) == (2, 2, 4, 4)
    assert more_forwards == 2 * forwards


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "2", None])
def test_a_damaged_replicate_is_refused(finished, tmp_path, value):
    (own,) = [r for r in records(finished.path) if "replicate" in r and r["paradigm"] == "diffusion"][:1]
    folder = tmp_path / own["fingerprint"]
    folder.mkdir()
    (folder / "cell.json").write_text(json.dumps({**own, "replicate": value}))
    with pytest.raises(UserError, match="replicate is not the number of a further dense run"):
        read_record(folder / "cell.json")
