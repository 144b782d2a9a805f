"""What a loop says of its forward passes, what a clock said of them, and what it has to say."""

from __future__ import annotations

from dataclasses import dataclass, field

import tiny
import torch
from torch.nn import functional as F

from dllm_sparsity.sparsity.clock import Compare, TokenState


@dataclass
class Pass:
    """What a loop says of one forward pass: its canvas is `ids`, of which the model sees `columns`."""

    phase: str
    branches: tuple[str, ...]
    block: int
    step: int
    ids: torch.Tensor
    columns: list[int]
    given: torch.Tensor  # True for the prompt
    pad: torch.Tensor
    request: int


@dataclass
class Log:
    passes: list[Pass] = field(default_factory=list)
    request: int = 0

    def begin(self, given, pad=None):
        self.request += 1
        self._given, self._pad = given, torch.zeros_like(given) if pad is None else pad

    def grow(self, width):
        more = max(0, width - self._given.shape[1])
        self._given, self._pad = F.pad(self._given, (0, more)), F.pad(self._pad, (0, more))

    def add(self, phase, ids, columns, block=0, step=0, branches=("cond",)):
        self.grow(ids.shape[1])
        known = self._given.clone(), self._pad.clone()
        self.passes.append(Pass(phase, branches, block, step, ids.clone(), list(columns), *known, self.request))


@dataclass
class Said:
    """What a clock announced of one forward pass."""

    slots: list[tuple]  # one a batch row
    states: torch.Tensor
    compare: Compare
    items: list


@dataclass
class Listener:
    said: list[Said] = field(default_factory=list)

    def begin(self, clock):
        pass

    def end(self, clock):
        pass

    def tick(self, clock):
        batch = len(clock.items)
        states = clock.frame.states.view(batch, -1).clone()
        number = (clock.frame.index.view(batch, -1)[:, 0] // (batch * len(TokenState))).tolist()
        slots = [list(clock.slots)[n] for n in number]
        named = [(str(slot.phase), slot.branch, slot.block, slot.step) for slot in slots]
        self.said.append(Said(named, states, clock.frame.compare, list(clock.items)))


def expected(log, eos=None):
    """Yield what the clock has to say of each pass: slots, states, compare, request."""
    last, columns_before, request, before = {}, {}, 0, []
    for entry in log.passes:
        if entry.request != request:
            last, columns_before, request = {}, {}, entry.request
        ids, states = entry.ids.tolist(), []
        for row, line in enumerate(ids):
            states.append([state_of(entry, last, row, column, line, eos) for column in entry.columns])
        if "cond" in entry.branches:
            last |= {(row, c): line[c] for row, line in enumerate(ids) for c in entry.columns}
        else:
            states = before  # those of the conditional pass just before
        before = states
        same = columns_before.get(entry.branches[0]) == entry.columns
        columns_before[entry.branches[0]] = entry.columns
        slots = [(entry.phase, branch, entry.block, entry.step) for branch in entry.branches for _ in ids]
        yield slots, states * len(entry.branches), Compare.PREVIOUS if same else Compare.START, request


def state_of(entry, last, row, column, line, eos):
    if entry.pad[row, column]:
        return TokenState.PAD
    if entry.given[row, column]:
        return TokenState.PROMPT
    if line[column] == tiny.MASK:
        return TokenState.MASKED
    if eos is not None and any(line[c] == eos for c in range(column) if not entry.given[row, c]):
        return TokenState.AFTER_EOS
    return TokenState.COMMITTED if last.get((row, column)) == line[column] else TokenState.COMMITTED_NOW
