"""Packs documents into rows of 256 tokens; no document is cut by a row's end, and each keeps to itself."""

from collections.abc import Iterator
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

END_ID, MASK_ID, PAD_ID = 0, 1, 2
ROW_TOKENS = 256
LONGEST_PIECE = 126
MOST_PIECES = 128

# Share of the tokens of each part, at the start and at the end of training.
SHARES = {
    "activitynet": (0.12, 0.25),
    "activitynet_alternatives": (0.16, 0.28),
    "piqa": (0.09, 0.15),
    "winogrande": (0.12, 0.11),
    "csqa": (0.03, 0.04),
    "openbookqa": (0.02, 0.02),
    "wordnet": (0.22, 0.07),
    "python": (0.08, 0.03),
    "postgresql": (0.06, 0.02),
    "rust": (0.02, 0.01),
    "commentary": (0.08, 0.02),
}


class Packer(IterableDataset):
    """Endless batches of packed rows; the mixture follows `progress`, which the training loop moves from 0 to 1."""

    def __init__(self, path: Path, rows: int, progress: Synchronized, long_tails: bool, seed: int) -> None:
        """Read the arrays that `prepare` wrote.

        Args:
            path: File of the arrays.
            rows: Rows in a batch.
            progress: Share of the training time gone; read by the workers.
            long_tails: Close some documents with many end tokens, for a model that fills a canvas.
            seed: Seed of the first worker.
        """
        arrays = np.load(path)
        self._ids, self._starts = arrays["ids"], arrays["starts"].astype(np.int64)
        self._prompts, self._parts = arrays["prompts"].astype(np.int64), arrays["parts"]
        self._sizes = np.diff(self._starts)
        self._names = [str(name) for name in arrays["names"]]
        self._members = [np.flatnonzero(self._parts == number) for number in range(len(self._names))]
        means = [np.minimum(self._sizes[members], LONGEST_PIECE).mean() + 1 for members in self._members]
        shares = np.array([SHARES[name] for name in self._names])
        self._first, self._last = shares[:, 0] / means, shares[:, 1] / means
        self._rows, self._progress, self._long_tails, self._seed = rows, progress, long_tails, seed

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield batches for ever."""
        worker = get_worker_info()
        chance = np.random.default_rng(self._seed + (worker.id if worker else 0))
        while True:
            yield self.batch(chance, self._progress.value)

    def batch(self, chance: np.random.Generator, progress: float) -> dict[str, torch.Tensor]:
        """Draw documents with replacement and pack them.

        Returns:
            ids, segment (0 = padding), position in the segment, and of the segment: prompt (tokens of its question,
            the opening end token counted) and size, each [rows, 256].
        """
        late = min(max((progress - 0.4) / 0.4, 0.0), 1.0)
        weights = (1 - late) * self._first + late * self._last
        wanted = int(self._rows * ROW_TOKENS / 24)
        parts = chance.choice(len(self._names), size=wanted, p=weights / weights.sum())
        documents = np.empty(wanted, dtype=np.int64)
        for number, members in enumerate(self._members):
            here = parts == number
            documents[here] = members[chance.integers(len(members), size=here.sum())]
        pieces = self._pieces(documents, chance)
        rows, places = next_fit(pieces["size"], self._rows)
        return self._fill({name: values[: len(rows)] for name, values in pieces.items()}, rows, places)

    def _pieces(self, documents: np.ndarray, chance: np.random.Generator) -> dict[str, np.ndarray]:
        """Choose what is taken of each document: mostly all, else a random stretch; and its end tokens."""
        count, sizes = len(documents), self._sizes[documents]
        taken = np.minimum(sizes, LONGEST_PIECE)
        cropped = chance.random(count) < 0.2
        taken = np.where(cropped, np.maximum(chance.integers(1, taken + 1), np.minimum(taken, 16)), taken)
        offset = np.where(chance.random(count) < 0.5, chance.integers(0, sizes - taken + 1), 0)
        lead = ((offset == 0) & (chance.random(count) < 0.5)).astype(np.int64)
        tail = (chance.random(count) < 0.5).astype(np.int64)
        if self._long_tails:
            tail *= np.where(chance.random(count) < 0.7, 1, chance.integers(1, 24, size=count))
        tail = np.where(offset + taken == sizes, tail, 0)
        return {
            "source": self._starts[documents] + offset,
            "taken": taken,
            "lead": lead,
            "prompt": lead + np.clip(self._prompts[documents] - offset, 0, taken),
            "size": lead + taken + tail,
        }

    def _fill(self, pieces: dict[str, np.ndarray], rows: np.ndarray, places: np.ndarray) -> dict[str, torch.Tensor]:
        size = pieces["size"]
        within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        spread = {name: np.repeat(values, size) for name, values in pieces.items()}
        target = np.repeat(rows * ROW_TOKENS + places, size) + within
        place = within - spread["lead"]
        in_text = (place >= 0) & (place < spread["taken"])
        ids = np.where(in_text, self._ids[spread["source"] + np.where(in_text, place, 0)], END_ID)
        first_of_row = np.searchsorted(rows, rows)
        segment = np.repeat(np.arange(len(rows)) - first_of_row + 1, size)
        columns = {
            "ids": (ids, PAD_ID),
            "segment": (segment, 0),
            "position": (within, 0),
            "prompt": (spread["prompt"], 0),
            "size": (spread["size"], 1),
        }
        filled = {}
        for name, (values, nothing) in columns.items():
            flat = np.full(self._rows * ROW_TOKENS, nothing, dtype=np.int64)
            flat[target] = values
            filled[name] = torch.from_numpy(flat.reshape(self._rows, ROW_TOKENS))
        return filled


def next_fit(sizes: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and the place in it of as many pieces as fill the rows, in order."""
    ends = np.cumsum(sizes)
    row_of, place_of, first, start = [], [], 0, 0
    for row in range(rows):
        last = min(int(np.searchsorted(ends, start + ROW_TOKENS, side="right")), first + MOST_PIECES - 1)
        row_of.append(np.full(last - first, row))
        place_of.append(ends[first:last] - sizes[first:last] - start)
        first, start = last, int(ends[last - 1])
    return np.concatenate(row_of), np.concatenate(place_of)
