"""The counters on the device: one table for each layer and site, read and folded once a request batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from dllm_sparsity.sparsity.clock import Clock, Frame, Slot, TokenState
from dllm_sparsity.sparsity.kernels.fused import Counters
from dllm_sparsity.sparsity.metrics.density import Density
from dllm_sparsity.sparsity.metrics.overlap import Overlap
from dllm_sparsity.sparsity.records import Lines, Records

if TYPE_CHECKING:
    from torch import Tensor

    from dllm_sparsity.sparsity.metric import Metric
    from dllm_sparsity.sparsity.reading import Reading
    from dllm_sparsity.sparsity.sites import Routed

_STATES = len(TokenState)
_FIRST_SLOTS = 64  # a loop may end long before its longest run; tick makes more room
_FIRST_BYTES = 4 << 20  # but what is small is made at once
_READ_BYTES = 64 << 20  # tables are joined to be read, no more than this at once


@dataclass(frozen=True)
class Point:
    """One (layer, site) pair that is counted, each of its experts apart."""

    layer: int
    site: str
    device_of: Tensor
    width: int = 0
    experts: int = 0


class Ledger:
    """Count rows into (slot, batch row, token state) on the device, fold them into step and item records on the host.

    Args:
        points: What is counted; hooks name a point by its place here.
        metrics: What is counted about each row.
    """

    def __init__(self, points: Sequence[Point], metrics: Sequence[Metric]) -> None:
        self.points, self.metrics = list(points), list(metrics)
        self.columns = ("nonfinite", *(column for metric in self.metrics for column in metric.columns))
        placeless = [column for metric in self.metrics if not metric.by_place for column in metric.columns]
        self._routed_columns = [self.columns.index(name) for name in ("nonfinite", *placeless)]
        self.fusable = [type(metric) for metric in self.metrics] in ([Density], [Density, Overlap])
        """Whether the fused kernel counts all that is counted here."""
        self.by_row = True
        """Whether the rule takes each row for itself; metrics count row by row."""
        self._tables: list[Tensor] = []
        self._spare: list[Tensor] = []  # of the batch before: kept, so that addresses stay
        self._retired: list[Tensor] = []
        self._captured = False
        self._batch = self._base = self._ticked = 0  # tables of experts begin at slot `_base`
        scales = {name: scale for metric in self.metrics for name, scale in metric.scales.items()}
        most = max((point.experts for point in self.points), default=0)
        self._records = Records([(point.layer, point.site) for point in self.points], self.columns, scales, most)

    def begin(self, clock: Clock) -> None:
        """Make room for a request batch.

        Args:
            clock: The clock that starts it.
        """
        self._batch = len(clock.items)
        self._base = self._ticked = 0
        spare = self._spare or self._tables  # the latter after an exception
        lines = [self._first_slots(point, clock.capacity) * self._lines(point) for point in self.points]
        if spare and [len(table) for table in spare] == lines:
            self._tables = [table.zero_() for table in spare]
        else:
            if self._captured:  # a graph that is replayed all the same must not write into freed memory
                self._retired += spare
            self._tables = [self._empty(point, count) for point, count in zip(self.points, lines, strict=True)]
            self._captured = False
        self._spare = []
        for metric in self.metrics:
            metric.begin()

    def _lines(self, point: Point) -> int:
        """Return the lines of a table that one slot takes."""
        return self._batch * _STATES * max(1, point.experts)

    def _first_slots(self, point: Point, capacity: int) -> int:
        if point.experts:  # what does not fit is read out between two forward passes
            return min(capacity, max(2, _FIRST_BYTES // (self._lines(point) * len(self._routed_columns) * 8)))
        return min(capacity, max(_FIRST_SLOTS, _FIRST_BYTES // (self._lines(point) * len(self.columns) * 8)))

    def _empty(self, point: Point, lines: int) -> Tensor:
        shape = (lines, len(self._routed_columns if point.experts else self.columns))
        with torch.inference_mode(False):
            return torch.zeros(shape, dtype=torch.long, device=point.device_of.device)

    def tick(self, clock: Clock) -> None:
        """Grow before a forward pass that needs it, never inside one.

        Args:
            clock: The clock that announces it.
        """
        if self.fusable and len(self.metrics) == 2 and clock.frame is not None and clock.frame.comparing:
            places = [None if point.experts else (point.width, point.device_of.device) for point in self.points]
            cast("Overlap", self.metrics[1]).prepare(places, clock.frame)
        known, self._ticked = self._ticked, len(clock.slots)
        short = self._short(clock)
        if any(self.points[number].experts for number in short):
            self.flush(clock)
            self._base = known
            short = self._short(clock)
        for number in short:
            table, point = self._tables[number], self.points[number]
            missing = (len(clock.slots) - self._start(number)) * self._lines(point) - len(table)
            self._tables[number] = torch.cat([table, self._empty(point, max(len(table), missing))])

    def _start(self, point: int) -> int:
        """Return the slot that a table begins with."""
        return self._base if self.points[point].experts else 0

    def _short(self, clock: Clock) -> list[int]:
        """Return the points whose tables have no room for the newest slot."""
        rooms = [len(table) // self._lines(point) for table, point in zip(self._tables, self.points, strict=False)]
        short = [number for number, room in enumerate(rooms) if len(clock.slots) - self._start(number) > room]
        if short and self._captured:
            raise ValueError(
                f"a captured forward pass counts into room for {min(rooms)} slots, and this is one more: capture anew "
                f"after clock.begin with a larger `forwards`, at most what fits {_FIRST_BYTES >> 20} MiB a point"
            )
        return short

    def frame(self, point: int, frame: Frame, routed: Routed) -> Frame:
        """Return where the rows of an expert layer are counted.

        Args:
            point: As in `add`.
            frame: Of the tokens.
            routed: What the rows are.
        """
        picked = frame.routed(routed.token)
        index = picked.index - self._base * self._batch * _STATES
        index = index * self.points[point].experts + routed.expert
        return picked.on(index, picked.sequence, picked.states, cast("Tensor", picked.code))

    def add(self, point: int, rows: Tensor, kept: Tensor, nonfinite: Tensor, frame: Frame) -> None:
        """Count one FFN call at one site.

        Args:
            point: Place of the layer and site in `points`.
            rows: Activations before the rule, `[rows, width]`.
            kept: Entries that are non-zero after the rule.
            nonfinite: True for rows with a NaN or an infinity, `[rows, 1]`.
            frame: Where the forward pass stands.
        """
        metrics = [metric for metric in self.metrics if not (metric.by_place and self.points[point].experts)]
        counts = [metric.count(point, rows, kept, frame) for metric in metrics]
        values = torch.cat([nonfinite.long(), *counts], dim=-1)
        self._tables[point].index_add_(0, frame.index, values)

    def counters(self, point: int, rows: Tensor, frame: Frame) -> Counters:
        """Return where the fused kernel counts one FFN call.

        Args:
            point: As in `add`.
            rows: Activations, `[rows, width]`.
            frame: As in `add`.
        """
        if rows.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
            self._captured = True
        code, sets = None, (None, None)
        if frame.comparing and len(self.metrics) == 2:
            code, sets = frame.code, cast("Overlap", self.metrics[1]).sets(point, frame)
        return Counters(self._tables[point], frame.index, frame.states, code, *sets)

    def end(self, clock: Clock) -> None:
        """Read the counters and close the request batch.

        Args:
            clock: The clock that ends it.
        """
        self.flush(clock)
        self._spare, self._tables = self._tables, []

    def flush(self, clock: Clock) -> None:
        """Add the counters to the records and set them back to zero; the request batch goes on.

        Args:
            clock: The clock that drives it.
        """
        slots = list(clock.slots)
        if not slots or not self._tables or not clock.counting:
            return
        bins = torch.stack(clock.noise).cpu().numpy()  # [slot, row]
        alike: dict[tuple, list[int]] = {}
        for point, table in enumerate(self._tables):
            alike.setdefault((table.device, self.points[point].experts > 0), []).append(point)
        for members in alike.values():
            step = max(1, _READ_BYTES // max(1, max(self._tables[point].nbytes for point in members)))
            for start in range(0, len(members), step):
                self._fold(members[start : start + step], slots, bins, clock)

    def _fold(self, members: list[int], slots: list[Slot], bins: np.ndarray, clock: Clock) -> None:
        """Read the lines that hold something, of tables of one device and kind at once; set them back to zero."""
        parts = [
            self._tables[point][: (len(slots) - self._start(point)) * self._lines(self.points[point])]
            for point in members
        ]
        whole = torch.cat(parts)
        hit = whole.any(dim=-1).nonzero().squeeze(-1)
        counts, place = whole[hit].cpu().numpy(), hit.cpu().numpy()
        for point in members:
            self._tables[point].zero_()
        ends = np.cumsum([len(part) for part in parts])
        member = np.searchsorted(ends, place, side="right")
        point = np.array(members)[member]
        line = place - np.concatenate([[0], ends])[member]
        line, expert = np.divmod(line, np.array([max(1, each.experts) for each in self.points])[point])
        line, state = np.divmod(line, _STATES)
        slot, row = np.divmod(line, self._batch)
        if clock.weights is not None:
            counts = counts * np.array(clock.weights)[row][:, None]
        slot = slot + np.array([self._start(each) for each in members])[member]
        real = np.zeros(len(slots), dtype=bool)
        real[slot[state != TokenState.PAD]] = True  # else a forward pass in which every row waited
        routed = bool(self.points[members[0]].experts)
        found = (slot, row, point, state, expert if routed else expert - 1, counts)
        columns = [self.columns[n] for n in self._routed_columns] if routed else self.columns
        self._records.add(Lines(*(each[real[slot]] for each in found)), columns, slots, bins, clock.items)

    def read(self, notes: Sequence[str] = ()) -> Reading:
        """Return everything counted so far as plain columns.

        Args:
            notes: What the reader should know about the counts.

        Raises:
            NonFiniteError: An activation was NaN or infinite; the first layer and site are named.
        """
        return self._records.read(notes)

    def take(self, notes: Sequence[str] = ()) -> Reading:
        """Return everything counted since the last take, and forget it.

        Args:
            notes: As in `read`.

        Raises:
            NonFiniteError: As in `read`.
        """
        return self._records.take(notes)
