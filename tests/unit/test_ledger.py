"""The ledger: sums stay exact when it folds, and counting never waits for the device."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from tiny_families import logits
from torch import nn

import dllm_sparsity.sparsity as core
from dllm_sparsity.sparsity.clock import Clock, Phase, Slot, TokenState
from dllm_sparsity.sparsity.ledger import Ledger, Point
from dllm_sparsity.sparsity.metrics.density import Density
from dllm_sparsity.sparsity.rules.top_p import TopP
from dllm_sparsity.sparsity.sparsifier import sparsify

FILES = sorted(Path(core.__path__[0]).rglob("*.py"))
SYNCS = {"item", "tolist", "cpu", "numpy", "nonzero", "unique", "synchronize"}
ALLOWED = {
    ("ledger.py", "flush"),  # once a request batch
    ("ledger.py", "_fold"),
    ("naive.py", "_sort"),  # CPU only, behind _on_host
    ("naive.py", "zero_out"),
    ("naive.py", "pack_bits"),
    ("naive.py", "count_bits"),
    ("transfer.py", "wait"),  # for one value that a loop asks for
    ("top_p.py", "_keep_by_sequence"),  # scope="sequence" reproduces a released script; it loops over sequences
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_waits_for_the_device_inside_a_forward_pass(path: Path) -> None:
    for function in ast.walk(ast.parse(path.read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        calls = {
            n.func.attr for n in ast.walk(function) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
        }
        if path.name != "records.py" and (path.name, function.name) not in ALLOWED:  # records.py is numpy's alone
            assert not calls & SYNCS, f"{path.name}:{function.lineno} {function.name}"


def ledger_and_clock() -> tuple[Ledger, Clock]:
    ledger = Ledger([Point(0, "input", torch.zeros(1)), Point(3, "input", torch.zeros(1))], [Density()])
    clock = Clock()
    clock.listeners.append(ledger)
    return ledger, clock


def count(ledger: Ledger, clock: Clock, kept: torch.Tensor, point: int = 0) -> None:
    frame = clock.rows(len(kept), kept.device)
    ledger.add(point, kept.float(), kept, torch.zeros(len(kept), 1, dtype=torch.bool), frame)


def test_sums_over_batches_and_compactions_are_exact() -> None:
    g = torch.Generator().manual_seed(0)
    batches = [[torch.rand(6, 9, generator=g) < 0.5 for _ in range(3)] for _ in range(5)]
    columns = []
    for compact in (False, True):
        ledger, clock = ledger_and_clock()
        for batch in batches:
            with clock.batch(["a", "b"]):
                for step, kept in enumerate(batch):
                    clock.tick(Slot(Phase.DENOISE, step=step), torch.full((2, 3), int(TokenState.MASKED)))
                    count(ledger, clock, kept)
            if compact:
                ledger._records._compact()
        columns.append(ledger.read().columns)
    assert columns[0] == columns[1]
    assert columns[0]["kept"] == [sum(int(batch[step].sum()) for batch in batches) for step in range(3)]
    assert columns[0]["rows"] == [30] * 3
    assert set(columns[0]["layer"]) == {0}
    per_item = ledger.read().per_item
    assert per_item["b"]["input"] == (sum(int(kept[3:].sum()) for batch in batches for kept in batch), 5 * 3 * 3 * 9)


def test_reading_in_the_middle_counts_nothing_twice(llama: nn.Module, ids: torch.Tensor) -> None:
    readings = []
    for middle in (False, True):
        clock = Clock()
        with sparsify(llama, TopP(0.5), clock=clock) as tracker, clock.batch([0, 1, 2]):
            for step in range(4):
                clock.tick(Slot(Phase.DENOISE, step=step), torch.full((3, 7), int(TokenState.MASKED)))
                logits(llama, ids)
                if middle:
                    tracker.read()
        readings.append(tracker.read())
    assert readings[0].columns == readings[1].columns
    assert readings[0].per_item == readings[1].per_item


def test_points_and_items_without_counts() -> None:
    ledger, clock = ledger_and_clock()
    with clock.batch(["a"]):
        pass
    assert ledger.read().per_item == {}
    with clock.batch(["a"]):
        clock.tick(Slot(Phase.DECODE), torch.full((1, 2), int(TokenState.PAD)))
        count(ledger, clock, torch.ones(2, 9, dtype=torch.bool))
    reading = ledger.read()
    assert reading.per_item == {"a": {"input": (0, 0)}}
    assert reading["token_state"] == []  # a forward pass in which every row waited


def test_a_frame_moves_once_a_device() -> None:
    clock = Clock()
    clock.begin([0])
    clock.tick(Slot(Phase.DECODE), torch.zeros(1, 4, dtype=torch.long))
    assert clock.frame.to(torch.device("cpu")) is clock.frame
    meta = torch.device("meta")
    assert clock.frame.to(meta) is clock.frame.to(meta)
    assert clock.frame.to(meta).index.device == meta
