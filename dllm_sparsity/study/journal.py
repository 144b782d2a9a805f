"""The journal of a cell that is not sealed yet: each answered batch with what was counted in it.

A batch is known by its place and by a digest of its requests. A run that was broken off takes the batches of its
journal as they are and computes the rest; counts are sums of whole numbers, so both ways give the same tables.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from dllm_sparsity.lm.items import Generation, Score
from dllm_sparsity.lm.journal import Answer
from dllm_sparsity.sparsity.clock import Clock
from dllm_sparsity.sparsity.frame import Phase, TokenState
from dllm_sparsity.sparsity.reading import KEYS, PerItem, Reading, add_items
from dllm_sparsity.sparsity.sparsifier import Tracker
from dllm_sparsity.study import collect
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


class CellJournal:
    """Answered batches of one cell, on disk, and the sums of what was counted in them.

    Args:
        path: The journal.
        fingerprint: The cell's; a journal of another cell is dropped.
        tracker: Counts; what it holds is taken after each batch.
        keep_last: Whether the last batch on disk may stand; if not it is computed again, for a tracker that needs to
            see a forward pass.

    Raises:
        UserError: The disk is full or cannot be written to.
    """

    def __init__(self, path: Path, fingerprint: str, tracker: Tracker, keep_last: bool = True) -> None:
        self._tracker, self._sums = tracker, Sums()
        self.replayed, self.replayed_seconds = 0, 0.0
        self._place = 1  # record 0 says whose journal it is
        self._file = RecordFile(path)
        try:
            owner = json.dumps({"fingerprint": fingerprint}).encode()
            if len(self._file) and self._file.read(0) != owner:
                self._file.cut(0, "the journal of another cell")
            if not len(self._file):
                self._file.append(owner)
            if len(self._file) > 1 and not keep_last:
                self._file.cut(len(self._file) - 1, "the last batch is computed again, to see every site at work")
        except BaseException:
            self._file.close()
            raise

    def known(self, key: str) -> Answer | None:
        """Return the answer of the next batch where the journal has it.

        Args:
            key: Digest of the batch's requests.

        Raises:
            UserError: The journal cannot be read.
        """
        if self._place >= len(self._file):
            return None
        content = self._file.read(self._place)
        head, _, table = (content or b"").partition(b"\n")
        if content is None or (entry := json.loads(head))["key"] != key:
            self._file.cut(self._place, "damaged" if content is None else "a batch of other requests")
            return None
        kind = _KINDS.get(entry["kind"])
        found = Answer([kind(**values) for values in entry["results"]] if kind else [], entry["seconds"])
        counts = {_item(item): {site: (k, t) for site, k, t in sites} for item, sites in entry["items"]}
        self._sums.add(_unpacked(table), counts)
        _tell(self._tracker.clock, entry["notes"], entry["overlap_refused"])
        self._place += 1
        self.replayed += 1
        self.replayed_seconds += found.seconds
        return found

    def add(self, key: str, answer: Answer) -> None:
        """Write the answer of the next batch, with what the tracker counted in it.

        Args:
            key: Digest of the batch's requests.
            answer: What it gave.

        Raises:
            UserError: The disk is full or cannot be written to; the batches before are kept.
            NonFiniteError: An activation was NaN or infinite.
        """
        reading = self._tracker.take()
        table = collect.step_table(reading.columns)
        entry = {
            "key": key,
            "kind": type(answer.results[0]).__name__ if answer.results else "",
            "results": [asdict(result) for result in answer.results],
            "seconds": answer.seconds,
            "items": [
                [item, [[site, kept, total] for site, (kept, total) in sites.items()]]
                for item, sites in reading.per_item.items()
            ],
            "notes": list(self._tracker.clock.notes),
            "overlap_refused": self._tracker.clock.overlap_refused,
        }
        self._file.append(json.dumps(entry, default=_plain).encode() + b"\n" + _packed(table))
        self._sums.add(table, reading.per_item)
        self._place += 1

    def finish(self) -> tuple[pa.Table, PerItem, tuple[str, ...]]:
        """Return the step records, the kept and total counts of each item, and the notes, over all batches.

        Raises:
            NonFiniteError: An activation was NaN or infinite.
        """
        rest: Reading = self._tracker.take()  # what was counted outside of a batch
        self._sums.add(collect.step_table(rest.columns), rest.per_item)
        return self._sums.steps(), self._sums.per_item, rest.notes

    @property
    def batches(self) -> int:
        """Number of batches that were answered."""
        return self._place - 1

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


def _tell(clock: Clock, notes: list[str], overlap_refused: bool) -> None:
    """Bring a clock to where it stood behind a batch."""
    for note in notes:
        clock.note(note)
    clock.overlap_refused |= overlap_refused
