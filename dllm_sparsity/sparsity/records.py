"""The host's side of counting: sums by step record and by item, of what was read from the device."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from dllm_sparsity.sparsity.frame import Slot, TokenState
from dllm_sparsity.sparsity.reading import NOISE_BINS, NonFiniteError, Reading

_STATES = len(TokenState)
_UNCOUNTED = (TokenState.PAD, TokenState.AFTER_EOS)


@dataclass(frozen=True)
class Lines:
    """Lines of the ledger that hold something; one entry a line.

    Args:
        slot: Number of the slot in its request batch.
        row: Batch row.
        point: Number of the (layer, site) pair.
        state: `TokenState`.
        expert: Number of the expert, -1 where there are none.
        counts: `[lines, columns]`.
    """

    slot: np.ndarray
    row: np.ndarray
    point: np.ndarray
    state: np.ndarray
    expert: np.ndarray
    counts: np.ndarray


class Records:
    """Sums of lines.

    Args:
        places: Layer and site of each point.
        columns: What is counted.
        scales: Column -> what one counted unit is worth.
        experts: Experts of a layer, at most.
    """

    def __init__(
        self, places: Sequence[tuple[int, str]], columns: Sequence[str], scales: dict[str, float], experts: int
    ) -> None:
        self._places, self._columns, self._scales, self._experts = list(places), tuple(columns), scales, experts + 1
        self._slots: dict[Slot, int] = {}  # every slot ever seen
        self._keys: list[np.ndarray] = []
        self._sums: list[np.ndarray] = []
        self._pending = 0  # rows since the last compaction
        self._items: dict[Hashable, np.ndarray] = {}

    def add(
        self, lines: Lines, columns: Sequence[str], slots: Sequence[Slot], bins: np.ndarray, items: Sequence[Hashable]
    ) -> None:
        """Add what was read of a request batch.

        Args:
            lines: The lines.
            columns: Names of their columns, all or some of those counted.
            slots: Slots of the batch.
            bins: Bin of the masked fraction, `[slot, batch row]`.
            items: What each batch row belongs to.
        """
        numbers = np.array([self._slots.setdefault(slot, len(self._slots)) for slot in slots])
        key = (numbers[lines.slot] * NOISE_BINS + bins[lines.slot, lines.row]) * len(self._places) + lines.point
        sums = np.zeros((len(key), len(self._columns)), np.int64)
        sums[:, [self._columns.index(name) for name in columns]] = lines.counts
        self._keys.append((key * _STATES + lines.state) * self._experts + lines.expert + 1)
        self._sums.append(sums)
        self._pending += len(key)
        if self._pending > 2_000_000:
            self._compact()
        own = np.array([slot.branch != "uncond" for slot in slots])[lines.slot] & ~np.isin(lines.state, _UNCOUNTED)
        pair = [self._columns.index("kept"), self._columns.index("total")]
        each = np.zeros((len(items), len(self._places), 2), np.int64)
        np.add.at(each, (lines.row[own], lines.point[own]), sums[own][:, pair])
        for item, counts in zip(items, each, strict=True):
            self._items[item] = self._items[item] + counts if item in self._items else counts

    def _compact(self) -> tuple[np.ndarray, np.ndarray]:
        if not self._keys:
            return np.zeros(0, np.int64), np.zeros((0, len(self._columns)), np.int64)
        keys, inverse = np.unique(np.concatenate(self._keys), return_inverse=True)
        sums = np.zeros((len(keys), len(self._columns)), np.int64)
        np.add.at(sums, inverse, np.concatenate(self._sums))
        self._keys, self._sums, self._pending = [keys], [sums], 0
        return keys, sums

    def read(self, notes: Sequence[str] = ()) -> Reading:
        """Return everything added so far as plain columns.

        Args:
            notes: What the reader should know about the counts.

        Raises:
            NonFiniteError: An activation was NaN or infinite; the first layer and site are named.
        """
        keys, sums = self._compact()
        key, expert = np.divmod(keys, self._experts)
        key, state = np.divmod(key, _STATES)
        key, point = np.divmod(key, len(self._places))
        slot, noise_bin = np.divmod(key, NOISE_BINS)
        names = list(self._slots)
        columns: dict[str, list] = {
            "phase": [str(names[number].phase) for number in slot],
            "branch": [names[number].branch for number in slot],
            "block": [names[number].block for number in slot],
            "step": [names[number].step for number in slot],
            "noise_bin": noise_bin.tolist(),
            "layer": [self._places[number][0] for number in point],
            "site": [self._places[number][1] for number in point],
            "expert": (expert - 1).tolist(),
            "token_state": [TokenState(number).name.lower() for number in state],
        }
        for number, name in enumerate(self._columns):
            values = sums[:, number]
            columns[name] = (values * self._scales[name] if name in self._scales else values).tolist()
        bad = np.flatnonzero((sums[:, 0] > 0) & (state != TokenState.PAD)) if len(sums) else []
        if len(bad):
            worst = bad[np.argmin(point[bad])]  # points stand in the order in which they fire
            raise NonFiniteError(columns["layer"][worst], columns["site"][worst], int(sums[bad, 0].sum()))
        del columns["nonfinite"]
        return Reading(columns, self._item_sums(), tuple(notes))

    def take(self, notes: Sequence[str] = ()) -> Reading:
        """Return everything added since the last take, and forget it.

        Args:
            notes: As in `read`.

        Raises:
            NonFiniteError: As in `read`.
        """
        reading = self.read(notes)
        self._keys, self._sums, self._items = [], [], {}
        return reading

    def _item_sums(self) -> dict[Hashable, dict[str, tuple[int, int]]]:
        members: dict[str, list[int]] = {}
        for number, (_, site) in enumerate(self._places):
            members.setdefault(site, []).append(number)
        summed: dict[Hashable, dict[str, tuple[int, int]]] = {}
        for item, counts in self._items.items():
            pairs = {site: counts[numbers].sum(axis=0) for site, numbers in members.items()}
            summed[item] = {site: (int(kept), int(total)) for site, (kept, total) in pairs.items()}
        return summed
