"""The journal of a cell that is not sealed yet: each answered batch with what was counted in it.

A batch is known by a digest of its requests. A run that was broken off takes the batches of its journal as they are
and has the rest answered; counts are sums of whole numbers, so both ways, and every order, give the same tables.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from dllm_sparsity.lm.items import Generation, Score
from dllm_sparsity.lm.journal import Answer, Compute, Work
from dllm_sparsity.sparsity.clock import Clock
from dllm_sparsity.sparsity.frame import Phase, TokenState
from dllm_sparsity.sparsity.reading import KEYS, PerItem, add_items
from dllm_sparsity.study.counted import Counted, Source
from dllm_sparsity.study.recordfile import RecordFile
from dllm_sparsity.study.records import PRIMITIVE_SITES, steps_schema

_KINDS = {kind.__name__: kind for kind in (Score, Generation)}
_ORDER: dict[str, list[str]] = {
    "phase": [str(phase) for phase in Phase],
    "branch": ["cond", "uncond"],
    "site": list(PRIMITIVE_SITES),
    "token_state": [state.name.lower() for state in TokenState],
}
_PENDING_ROWS = 500_000
_log = logging.getLogger(__name__)


class CellJournal:
    """Answered batches of one cell, on disk, and the sums of what was counted in them.

    Args:
        path: The journal.
        fingerprint: The cell's; a journal of another cell is dropped.
        source: Answers the batches that the journal does not have. Where it does not know that every site acts, one
            batch is answered again.
        tell: Told what was damaged; the log when None.

    Raises:
        UserError: The disk is full or cannot be written to.
    """

    def __init__(self, path: Path, fingerprint: str, source: Source, tell: Callable[[str], None] | None = None) -> None:
        self._source, self._sums = source, Sums()
        self.batches, self.replayed, self.replayed_seconds = 0, 0, 0.0
        self._notes: set[str] = set()
        self._tell = tell or _log.warning
        self._file = RecordFile(path, tell)
        try:
            owner = json.dumps({"fingerprint": fingerprint}).encode()  # record 0 says whose journal it is
            if len(self._file) and self._file.read(0) != owner:
                self._file.cut(0, "the journal of another cell")
            if not len(self._file):
                self._file.append(owner)
            if len(self._file) > 1 and not source.checked:
                self._file.cut(len(self._file) - 1, "the last batch is computed again, to see every site at work")
            self._numbers = self._index()
        except BaseException:
            self._file.close()
            raise

    def _index(self) -> dict[str, list[int]]:
        """Return the records of each digest, the last first."""
        numbers: dict[str, list[int]] = {}
        for number in reversed(range(1, len(self._file))):
            content = self._file.read(number)
            if content is not None:
                numbers.setdefault(json.loads(content.partition(b"\n")[0])["key"], []).append(number)
        return numbers

    def answers(self, works: Sequence[Work], compute: Compute) -> Iterator[tuple[int, Answer]]:
        """Yield the place and the answer of each batch: first those that are on disk, then the others as they come.

        Args:
            works: Planned batches.
            compute: Answers one on this process's model.

        Raises:
            UserError: The disk is full or cannot be written to; the batches before are kept.
            NonFiniteError: An activation was NaN or infinite.
        """
        missing: list[tuple[int, Work]] = []
        for place, work in enumerate(works):
            known = self._known(work.key)
            if known is None:
                missing.append((place, work))
            else:
                yield place, known
        started, others = time.perf_counter(), self._source.others_seconds
        for place, counted in self._source.counted(missing, compute):
            if counted.answer is not None:
                wall = time.perf_counter() - started - (self._source.others_seconds - others)
                self._write(works[place].key, counted, counted.answer, wall)
                yield place, counted.answer
            started, others = time.perf_counter(), self._source.others_seconds

    def _known(self, key: str) -> Answer | None:
        """Return the answer of a batch where the journal has it, and count what was counted in it."""
        numbers = self._numbers.get(key)
        if not numbers:
            return None
        content = self._file.read(numbers.pop())
        if content is None:
            self._tell(f"{self._file.path}: a batch is damaged and computed again")
            return None
        head, _, table = content.partition(b"\n")
        entry = json.loads(head)
        kind = _KINDS.get(entry["kind"])
        found = Answer([kind(**values) for values in entry["results"]] if kind else [], entry["seconds"])
        counts = {_item(item): {site: (k, t) for site, k, t in sites} for item, sites in entry["items"]}
        self._count(Counted(found, _unpacked(table), counts, tuple(entry["notes"]), entry["overlap_refused"]))
        self.replayed += 1
        self.replayed_seconds += entry["wall"]
        return found

    def add(self, key: str, counted: Counted, wall: float) -> None:
        """Write down a batch that was answered while another cell was run; it is counted when this one is.

        Args:
            key: Of the batch; one that the journal has already is left as it is.
            counted: The batch.
            wall: This cell's part of the seconds that went by; where several workers are busy, fewer than theirs.

        Raises:
            UserError: The disk is full or cannot be written to.
        """
        numbers = self._numbers.get(key)
        if numbers:
            numbers.pop()
        elif counted.answer is not None:
            self._append(key, counted, counted.answer, wall)

    def _write(self, key: str, counted: Counted, answer: Answer, wall: float) -> None:
        self._append(key, counted, answer, wall)
        self._count(counted)

    def _append(self, key: str, counted: Counted, answer: Answer, wall: float) -> None:
        entry = {
            "key": key,
            "kind": type(answer.results[0]).__name__ if answer.results else "",
            "results": [asdict(result) for result in answer.results],
            "seconds": answer.seconds,
            "wall": wall,
            "items": [
                [item, [[site, kept, total] for site, (kept, total) in sites.items()]]
                for item, sites in counted.per_item.items()
            ],
            "notes": list(counted.notes),
            "overlap_refused": counted.overlap_refused,
        }
        self._file.append(json.dumps(entry, default=_plain).encode() + b"\n" + _packed(counted.steps))

    def _count(self, counted: Counted) -> None:
        self.batches += counted.answer is not None
        self._sums.add(counted.steps, counted.per_item)
        self._notes |= set(counted.notes)
        _tell(self._source.clock, counted.notes, counted.overlap_refused)

    def finish(self) -> tuple[pa.Table, PerItem, tuple[str, ...]]:
        """Return the step records, the kept and total counts of each item, and the notes, over all batches.

        Raises:
            NonFiniteError: An activation was NaN or infinite.
        """
        rest = self._source.rest()
        if rest is not None:
            self._count(rest)
        # sorted, for workers answer in any order
        return self._sums.steps(), self._sums.per_item, tuple(sorted(self._notes))

    def close(self) -> None:
        """Close the file; it stays until the cell is sealed."""
        self._file.close()


class Sums:
    """Counts of several batches added up; no order of adding changes them."""

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []
        self._pending = 0
        self.per_item: PerItem = {}

    def add(self, steps: pa.Table, per_item: PerItem) -> None:
        """Add the counts of a batch.

        Args:
            steps: Step records.
            per_item: Item -> site -> (kept, total).
        """
        self._tables.append(steps)
        self._pending += len(steps)
        if self._pending > _PENDING_ROWS:
            self._tables, self._pending = [self._summed()], 0
        add_items(self.per_item, per_item)

    def steps(self) -> pa.Table:
        """Return the step records; their order depends on their keys alone."""
        table = self._summed()
        ranks = {name: _ranks(table[name].to_pylist(), _ORDER.get(name)) for name in KEYS}
        places = pa.table({**ranks, "place": pa.array(range(len(table)), pa.int64())}).sort_by(
            [(name, "ascending") for name in KEYS]
        )
        return table.take(places["place"])

    def _summed(self) -> pa.Table:
        table = pa.concat_tables(self._tables)
        counts = [name for name in table.column_names if name not in KEYS]
        summed = table.group_by(list(KEYS), use_threads=False).aggregate([(name, "sum") for name in counts])
        columns = {name: summed[name if name in KEYS else f"{name}_sum"] for name in table.column_names}
        return pa.table(columns).cast(table.schema)


def _ranks(values: list[Any], order: list[str] | None) -> list[Any]:
    """Return what a column is sorted by: its place in an order, names that stand in none by the alphabet behind it."""
    if order is None:
        return values
    known = {name: place for place, name in enumerate([*order, *sorted(set(values) - set(order))])}
    return [known[value] for value in values]


def _packed(table: pa.Table) -> bytes:
    packed = pa.table(
        {
            name: table[name].dictionary_encode() if pa.types.is_string(kind) else table[name]
            for name, kind in zip(table.schema.names, table.schema.types, strict=True)
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, packed.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(packed)
    return sink.getvalue().to_pybytes()


def _unpacked(packed: bytes) -> pa.Table:
    table = pa.ipc.open_stream(packed).read_all()
    return table.cast(steps_schema("rows_prev" in table.column_names))


def _plain(value: Any) -> Any:
    """Turn a number of numpy or torch into Python's."""
    return value.item()


def _item(item: Any) -> Hashable:
    """Undo what JSON made of an item's name: tuples come back as lists."""
    return tuple(_item(part) for part in item) if isinstance(item, list) else item


def _tell(clock: Clock, notes: Sequence[str], overlap_refused: bool) -> None:
    """Bring a clock to where it stood behind a batch."""
    for note in notes:
        clock.note(note)
    clock.overlap_refused |= overlap_refused
