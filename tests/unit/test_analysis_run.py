"""A synthetic run directory with known curves, and the tests of loading it: sealed, damaged, foreign."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dllm_sparsity.analysis.checking import read_record
from dllm_sparsity.analysis.loading import load
from dllm_sparsity.errors import UserError
from dllm_sparsity.study.records import OVERLAP_COLUMNS, checksums, samples_schema, steps_schema

WIDTHS = {"input": 64, "intermediate": 176}
BREAKS = {"autoregressive": 0.55, "diffusion": 0.66}
STRENGTHS = (0.99, 0.95, 0.9, 0.8, 0.6, 0.4)
TASKS = {"arc_easy": "multiple_choice", "gsm8k": "generate_until"}


def achieved(site: str, p: float) -> float:
    """Sparsity that top_p has in this synthetic world."""
    return float((1 - p) ** 0.45 * (0.98 if site == "intermediate" else 0.72)) if p < 1 else 0.0


def write_study(
    path: Path,
    items: int = 40,
    layers: int = 4,
    steps: int = 12,
    sites: tuple[str, ...] = ("input", "intermediate", "all"),
    strengths: tuple[float, ...] = STRENGTHS,
    answer: str = "The answer is 42.",
    model: str = "",
) -> Path:
    """Write a study of both paradigms, two tasks, some sites and strengths."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text("models: [pair-ar, pair-diffusion]\nrule: top_p\n")
    (path / "plan.json").write_text(json.dumps({"cells": []}))
    (path / "environment.json").write_text(json.dumps({"packages": {"torch": "2.11.0"}, "device": "cpu"}))
    for paradigm in BREAKS:
        for task in TASKS:
            settings = [(None, 1.0)] + [(site, p) for site in sites for p in strengths]
            for site, p in settings:
                _write_cell(path, paradigm, task, site, p, items, layers, steps, answer, model)
    return path


def _write_cell(path, paradigm, task, site, p, items, layers, steps, answer, model):
    fingerprint = f"{paradigm[:4]}{task}{site or 'dense'}{p:g}".replace(".", "p")
    folder = path / "cells" / fingerprint
    folder.mkdir(parents=True, exist_ok=True)
    recorded = ["input", "intermediate"] if site == "all" else [site] if site else list(WIDTHS)
    samples = _samples(paradigm, task, site, p, items, layers, recorded, answer)
    table = _steps(paradigm, task, p, items, layers, steps, recorded)
    pq.write_table(samples, folder / "samples.parquet")
    pq.write_table(table, folder / "steps.parquet")
    generates = TASKS[task] == "generate_until"
    qualities = [
        {"name": "exact_match" if generates else "acc", "kind": "accuracy", "chance": 0.0 if generates else 0.25}
    ]
    qualities.append({"name": "agreement", "kind": "agreement", "chance": None} if generates else _nll())
    record = {
        "schema": 1,
        "fingerprint": fingerprint,
        "paradigm": paradigm,
        "backend": paradigm,
        "model": model or {"autoregressive": "pair-ar", "diffusion": "pair-diffusion"}[paradigm],
        "model_id": "embedded",
        "task": task,
        "output_type": TASKS[task],
        "dense": site is None,
        "rule": None if site is None else "top_p",
        "rule_parameters": {} if site is None else {"p": p, "ties": "all"},
        "strength": None if site is None else p,
        "site": site,
        "sites_recorded": recorded,
        "layers": None,
        "qualities": qualities,
        "estimator": "bound, K=4 stratified" if paradigm == "diffusion" and not generates else None,
        "shifted_steps": paradigm == "autoregressive",
        "ffn": {"d_model": 64, "d_ffn": 176, "num_layers": layers, "gated": True},
        "simulated": True,
        "items": items,
        "totals": {
            "nfe": 1.0,
            "new_tokens": 1.0,
            "seconds": 1.0,
            "sites": {
                name: {column: int(np.sum(samples[f"{column}_{name}"].to_numpy())) for column in ("kept", "total")}
                for name in recorded
            },
        },
        "parts": {},
        "environment": {},
        "notes": [],
    }
    (folder / "cell.json").write_text(json.dumps(record))
    seal(folder)


def seal(folder: Path) -> None:
    """Say that the files of a cell are as they should be."""
    (folder / "DONE").write_text(json.dumps(checksums(folder)))


def _nll():
    return {"name": "nll", "kind": "nll", "chance": None}


def _samples(paradigm, task, site, p, items, layers, recorded, answer):
    rng = np.random.default_rng([len(task), items])  # the same items in every cell
    ability, frailty = rng.random(items), rng.random(items)
    level = 0.0 if site is None else np.mean([achieved(name, p) for name in recorded])
    lost = 1 / (1 + np.exp(-(level - BREAKS[paradigm] - 0.1) / 0.05)) - 1 / (
        1 + np.exp((BREAKS[paradigm] + 0.1) / 0.05)
    )
    correct = ((ability < (0.72 if paradigm == "diffusion" else 0.78)) & (frailty >= lost)).astype(float)
    tokens = rng.integers(2, 9, items)
    gold = (
        -(1.1 + (0.25 if paradigm == "diffusion" else 0.0))
        * tokens
        * (1 + 0.8 * lost + 0.05 * rng.random(items) * lost)
    )
    generates = TASKS[task] == "generate_until"
    length = rng.integers(10, 30, items)
    nfe = np.where(length > 0, 12 if paradigm == "diffusion" else length, 0) if generates else np.full(items, 4)
    wrong = np.floor(length * min(1.0, lost)).astype(int)
    columns = {
        "task": [task] * items,
        "doc_id": list(range(items)),
        "doc_hash": [f"d{i}" for i in range(items)],
        "prompt_hash": [f"p{i}" for i in range(items)],
        "filter": ["none"] * items,
        "answer": [answer if generates else str(i % 4) for i in range(items)],
        "correct": correct,
        "metrics": [json.dumps({"exact_match" if generates else "acc": value}) for value in correct],
        "target": [None if generates else i % 4 for i in range(items)],
        "loglikelihoods": [
            [] if generates else [g if j == i % 4 else g - 1.0 for j in range(4)] for i, g in enumerate(gold)
        ],
        "loglikelihood_errors": [[] if generates else [0.0] * 4 for _ in range(items)],
        "target_tokens": [[] if generates else [int(t)] * 4 for t in tokens],
        "answer_tokens": [[9] * w + [7] * (n - w) if generates else [] for w, n in zip(wrong, length, strict=True)],
        "nfe": nfe,
        "new_tokens": length if generates else np.zeros(items, int),
        "seconds": np.full(items, 0.1),
    }
    for name in ("input", "gate", "up", "intermediate"):
        total = length * layers * WIDTHS.get(name, 1)
        kept = np.round(total * (1 - achieved(name, p) * (0.98 + 0.04 * rng.random(items)))).astype(int).clip(0, total)
        columns[f"kept_{name}"] = kept if name in recorded else [None] * items
        columns[f"total_{name}"] = total if name in recorded else [None] * items
    return pa.table({name: pa.array(value) for name, value in columns.items()}).cast(samples_schema())


def _steps(paradigm, task, p, items, layers, steps, recorded):
    generates = TASKS[task] == "generate_until"
    rows = {name: [] for name in steps_schema(with_overlap=True).names}
    rng = np.random.default_rng(5)

    def add(phase, step, noise, layer, site, state, count, share):
        total = count * WIDTHS[site]
        kept = round(total * (1 - min(0.99, share)))
        values = {"phase": phase, "branch": "cond", "block": 0, "step": step, "noise_bin": noise, "layer": layer}
        values |= {"site": site, "expert": -1, "token_state": state, "rows": count, "kept": kept, "total": total}
        density = kept / total if total else 0.0
        compared = count if step and state != "pad" else 0
        for against, common in (("prev", 0.75), ("first", 0.75 * np.exp(-step / steps) + density * 0.2)):
            inter = int(compared * WIDTHS[site] * density * min(1.0, common + 0.2 * density))
            union = 2 * int(compared * WIDTHS[site] * density) - inter
            part = {"rows": compared, "inter": inter, "union": union, "kept": int(compared * WIDTHS[site] * density)}
            part["jaccard_sum"] = compared * (0.97 * inter / union if union else 0.0)
            values |= {f"{name}_{against}": value for name, value in part.items()}
        for name in OVERLAP_COLUMNS | rows:
            rows[name].append(values[name])

    for site in recorded:
        base = achieved(site, p)
        for layer in range(layers):
            depth = base * (0.85 + 0.25 * layer / max(1, layers - 1)) + 0.01 * rng.random()
            if paradigm == "diffusion" and generates:
                for step in range(steps):
                    done = step / steps
                    states = {"prompt": (9, 0.95), "masked": (int(24 * (1 - done)), 1.04 - 0.2 * done)}
                    states |= {"committed": (int(24 * done), 0.93), "committed_now": (2 if step else 0, 0.9)}
                    states |= {"after_eos": (3, 1.1), "pad": (2, 0.2)}
                    for state, (count, factor) in states.items():
                        if count:
                            add(
                                "denoise", step, int(19 * (1 - done)), layer, site, state, count * items, depth * factor
                            )
            elif paradigm == "diffusion":
                for noise in range(20):
                    add("likelihood", 0, noise, layer, site, "prompt", 9 * items, depth * 0.96)
                    add(
                        "likelihood",
                        0,
                        noise,
                        layer,
                        site,
                        "masked",
                        (noise + 1) * items,
                        depth * (1.05 - 0.01 * noise),
                    )
            elif generates:
                add("prefill", 0, 0, layer, site, "prompt", 9 * items, depth * 0.9)
                for step in range(2 * steps):
                    add("decode", step, 0, layer, site, "committed_now", items, depth * (1 + 0.004 * step))
            else:
                add("likelihood", 0, 0, layer, site, "prompt", 9 * items, depth * 0.95)
                add("likelihood", 0, 0, layer, site, "committed", 4 * items, depth)
    return pa.table(rows).cast(steps_schema(with_overlap=True))


@pytest.fixture
def run_dir(tmp_path):
    return write_study(tmp_path / "study", items=12, layers=2, steps=4, sites=("intermediate",), strengths=(0.9, 0.5))


def test_only_sealed_cells_count(run_dir):
    next((run_dir / "cells").glob("diff*0p5")).joinpath("DONE").unlink()
    run = load(run_dir)
    assert (len(run.cells), run.unsealed, run.name) == (11, 1, "study")
    assert run.config.startswith("models")


def test_a_folder_without_cells_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no cells"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not JSON"),
        ('{"schema": NaN}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not an object"),
        ("{}", "schema is missing"),
    ],
)
def test_a_damaged_record_is_refused(run_dir, text, told):
    path = load(run_dir).cells[0].folder / "cell.json"
    path.write_text(text)
    with pytest.raises(UserError, match=told):
        read_record(path)
    seal(path.parent)
    if text == "{":  # whoever sealed it, it is no record of this cell
        assert load(run_dir).damaged == (f"cell {path.parent.name}: cell.json does not hold: not JSON",)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema": 99}, "schema 99"),
        ({"fingerprint": "../x"}, "belongs to cell"),
        ({"dense": 1}, "dense is missing or of the wrong type"),
        ({"totals": {"sites": {"input": 3}}}, "totals.sites"),
        ({"items": True}, "items is missing or of the wrong type"),
        ({"items": "x"}, "items is missing or of the wrong type"),
        ({"layers": ["x"]}, "layers holds"),
        ({"notes": [3]}, "notes holds"),
        ({"qualities": [{"name": "acc", "kind": "magic", "chance": 0}]}, "unknown kind"),
    ],
)
def test_a_foreign_record_is_refused(run_dir, change, told):
    path = load(run_dir).cells[0].folder / "cell.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    seal(path.parent)
    with pytest.raises(UserError, match=told):
        read_record(path)
    (damage,) = load(run_dir).damaged  # named and left out: compare computes it again
    assert "is of another cell" in damage if "fingerprint" in change else told in damage


@pytest.mark.parametrize("number", ["1" + "0" * 400, "1e999", str(2**63)])
def test_numbers_that_no_record_holds_are_damage(run_dir, number):
    path = next(cell for cell in load(run_dir).cells if not cell.record["dense"]).folder / "cell.json"
    path.write_text(re.sub(r'"strength": [^,]*', f'"strength": {number}', path.read_text()))
    seal(path.parent)
    assert len(load(run_dir).damaged) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("3", "not an object"),
        ('{"curves": "x", "averages": 3}', "curves is not a list of answers"),
        ('{"curves": [], "averages": 3}', "averages is not a list of answers"),
        ('{"averages": [null]}', "averages is not a list of answers"),
        ('{"curves": [{"task": "t"}]}', "curves is not a list of answers"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_search_that_no_run_writes_is_named(run_dir, text, told):
    (run_dir / "search.json").write_text(text)
    with pytest.raises(UserError, match=f"search.json cannot be used: {told}") as caught:
        load(run_dir)
    assert "writes this file anew" in caught.value.hint


def test_damaged_tables_are_refused(run_dir):
    cell = load(run_dir).cells[0]
    (cell.folder / "steps.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        _ = cell.steps
    table = pq.read_table(cell.folder / "samples.parquet")
    pq.write_table(table.drop_columns(["nfe"]), cell.folder / "samples.parquet")
    with pytest.raises(UserError, match="column nfe is missing"):
        _ = cell.samples
    text = pa.array(["x"] * len(table))
    pq.write_table(table.set_column(table.column_names.index("nfe"), "nfe", text), cell.folder / "samples.parquet")
    with pytest.raises(UserError, match="wrong type"):
        _ = cell.samples
    negative = pa.array([-1] * len(table))
    at = table.column_names.index("kept_intermediate")
    pq.write_table(table.set_column(at, "kept_intermediate", negative), cell.folder / "samples.parquet")
    with pytest.raises(UserError, match="negative or larger"):
        _ = cell.samples


def test_nulls_in_step_records(run_dir):
    cell = load(run_dir).cells[0]
    path = cell.folder / "steps.parquet"
    table = pq.read_table(path)
    for name in ("noise_bin", "layer"):
        at = table.column_names.index(name)
        table = table.set_column(at, name, pa.nulls(len(table), pa.int32()))
        pq.write_table(table, path)
        if name == "noise_bin":
            assert set(cell.steps["noise_bin"].to_pylist()) == {0}
    with pytest.raises(UserError, match="layer is null"):
        _ = cell.steps
