"""Every quality as one pair per item, numerator and denominator, so that quality = sum of one / sum of the other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from dllm_sparsity.study.records import Quality

Pairs = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Scale:
    """How a kind of quality is read.

    Args:
        sign: 1 where higher is better, -1 where lower is.
        logarithmic: Whether it is a log-likelihood, so that a retention is a difference and not a ratio.
    """

    sign: int
    logarithmic: bool

    def retention(self, quality: np.ndarray | float, dense: np.ndarray | float) -> np.ndarray:
        """Return the share of the dense quality that is kept: a ratio, or exp of a log-likelihood's loss.

        Args:
            quality: The quality.
            dense: The dense model's.
        """
        quality, dense = np.asarray(quality, dtype=float), np.asarray(dense, dtype=float)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            return np.exp(self.sign * (quality - dense)) if self.logarithmic else quality / dense


SCALES = {
    "accuracy": Scale(1, logarithmic=False),
    "agreement": Scale(1, logarithmic=False),
    "score": Scale(1, logarithmic=False),
    "loglikelihood": Scale(1, logarithmic=True),
    "nll": Scale(-1, logarithmic=True),
}


def pairs(quality: Quality, samples: pa.Table, dense: pa.Table) -> Pairs:
    """Return a quality's numerator and denominator for every item; NaN where the item has no value.

    Args:
        quality: Which quality.
        samples: The cell's items.
        dense: The dense cell's items, in the same order.
    """
    return _PAIRS[quality["kind"]](quality["name"], samples, dense)


def _metric(name: str, samples: pa.Table, dense: pa.Table) -> Pairs:
    """Read a per-item metric by its name; where the item has no such metric, its headline metric `correct`."""
    correct = numbers(samples, "correct")
    values = np.array([_named(text, name) for text in samples["metrics"].to_pylist()], dtype=float)
    values = np.where(np.isnan(values), correct, values) if np.isnan(values).all() else values
    return values, np.where(np.isnan(values), np.nan, 1.0)


@lru_cache(maxsize=4096)  # right or wrong, most items of a study share a few texts
def _named(text: str | None, name: str) -> float:
    try:
        value = json.loads(text or "{}").get(name)
    except (ValueError, AttributeError, RecursionError):
        return math.nan
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def _nll(name: str, samples: pa.Table, dense: pa.Table) -> Pairs:
    """Read minus the log-likelihood of the right option, or of the only request, and its number of tokens."""
    numerator, denominator = np.full(len(samples), np.nan), np.full(len(samples), np.nan)
    columns = (samples[column].to_pylist() for column in ("target", "loglikelihoods", "target_tokens"))
    for item, (target, values, tokens) in enumerate(zip(*columns, strict=True)):
        values, tokens = values or [], tokens or []
        index = target if target is not None else 0 if len(values) == 1 else -1
        if not 0 <= index < min(len(values), len(tokens)) or values[index] is None or not tokens[index]:
            continue
        if math.isfinite(values[index]) and tokens[index] > 0:
            numerator[item], denominator[item] = -values[index], tokens[index]
    return numerator, denominator


def _agreement(name: str, samples: pa.Table, dense: pa.Table) -> Pairs:
    """Count positions whose answer token equals the dense cell's, over the longer of both answers."""
    ours, theirs = samples["answer_tokens"].to_pylist(), dense["answer_tokens"].to_pylist()
    lengths = np.array([[len(a or ()), len(b or ())] for a, b in zip(ours, theirs, strict=True)]).reshape(-1, 2)
    width = int(lengths.max(initial=0))
    equal = _padded(ours, width, -1) == _padded(theirs, width, -2)
    missing = np.array([a is None or b is None for a, b in zip(ours, theirs, strict=True)], dtype=bool)
    longer = np.where(missing, np.nan, lengths.max(1, initial=0).astype(float))
    return np.where(missing, np.nan, equal.sum(1).astype(float)), longer


def _padded(lists: list[list[int] | None], width: int, fill: int) -> np.ndarray:
    padded = np.full((len(lists), width), fill, dtype=np.int64)
    for row, tokens in enumerate(lists):
        padded[row, : len(tokens or ())] = tokens or ()
    return padded


def numbers(table: pa.Table, column: str) -> np.ndarray:
    """Return a numeric column as float64, NaN where it is null.

    Args:
        table: The table.
        column: Name of the column.
    """
    return table[column].cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False).astype(float)


_PAIRS: dict[str, Callable[[str, pa.Table, pa.Table], Pairs]] = {
    "accuracy": _metric,
    "score": _metric,
    "loglikelihood": _metric,
    "nll": _nll,
    "agreement": _agreement,
}
