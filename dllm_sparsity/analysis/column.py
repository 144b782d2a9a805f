"""What one strength gave, item by item, and what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Column:
    """What one strength gave, item by item; quality and sparsity are ratios of sums, or means of those of tasks.

    Args:
        height: Numerator of the quality, its sign turned so that higher is better.
        weight: Its denominator.
        kept: Activations kept.
        total: Activations.
        group: Number of the group of each item; None where all stand alone.
        item: Number of each item in the search's order, none twice; None where they are the first ones.
        stratum: Number of the task of each item, from 0; all tasks count the same. None where there is one.
    """

    height: np.ndarray
    weight: np.ndarray
    kept: np.ndarray
    total: np.ndarray
    group: np.ndarray | None = None
    item: np.ndarray | None = None
    stratum: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.height)

    @property
    def sparsity(self) -> float:
        """Return the share of activations that are zero."""
        return 1 - ratio(self.kept, self.total, self.stratum)[0]

    @property
    def items(self) -> np.ndarray:
        """Return the number of each item in the search's order."""
        return np.arange(len(self)) if self.item is None else self.item

    def first(self, items: int) -> Column:
        """Return those of the first items alone.

        Args:
            items: How many, in the search's order.
        """
        return self.at(self.items < items)

    def at(self, places: np.ndarray) -> Column:
        """Return the items at some places.

        Args:
            places: Numbers, or truth values.
        """
        own = {**vars(self), "item": self.items}
        parts: dict[str, Any] = {name: None if part is None else part[places] for name, part in own.items()}
        return Column(**parts)

    def joined(self, more: Column) -> Column:
        """Return these items and others.

        Args:
            more: The others; they have groups where these have.
        """
        own, other = ({**vars(each), "item": each.items} for each in (self, more))
        parts: dict[str, Any] = {
            name: None if part is None else np.concatenate([part, other[name]]) for name, part in own.items()
        }
        return Column(**parts)

    def drawn(self, items: np.ndarray) -> Column:
        """Return a sample of items, numbered anew by their place in the sample; those that are not here are left out.

        Args:
            items: Numbers in the search's order, in any order, some more than once.
        """
        order = np.argsort(self.items)
        place = np.minimum(np.searchsorted(self.items[order], items), len(self) - 1)
        here = self.items[order][place] == items
        return Column(**{**vars(self.at(order[place[here]])), "item": np.flatnonzero(here)})


def ratio(top: np.ndarray, bottom: np.ndarray, stratum: np.ndarray | None) -> tuple[float, np.ndarray]:
    """Return a ratio of sums, or the mean of those of all strata, and each item's pull on it.

    Args:
        top: Numerators, one per item.
        bottom: Denominators.
        stratum: Number of the stratum of each item; None where there is one.

    Source: Cochran 1977, Sampling Techniques, sections 6.4 and 6.11, the separate ratio estimate, strata equally heavy.
    """
    if stratum is None:
        mean = bottom.mean()
        value = float(top.mean() / mean)
        return value, (top - value * bottom) / mean
    tops, bottoms = (np.bincount(stratum, part) for part in (top, bottom))
    values = tops / bottoms
    pull = (top - values[stratum] * bottom) / bottoms[stratum]
    return float(values.mean()), pull * len(top) / len(values)


@dataclass(frozen=True)
class Threshold:
    """What is asked of the quality.

    Args:
        retention: Share of the dense quality to be kept.
        logarithmic: Whether quality is a log-likelihood: the threshold is then dense + ln(retention).
        bounded: Whether an item's quality is 0 or 1.
    """

    retention: float
    logarithmic: bool
    bounded: bool
