"""What a tracker gives back: step records as plain columns, and the kept and total counts of each item."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dllm_sparsity.errors import UserError

NOISE_BINS = 20
"""Bins of the masked fraction of a row's canvas."""
KEYS = ("phase", "branch", "block", "step", "noise_bin", "layer", "site", "expert", "token_state")
"""Columns of a reading that say what a row is about; all others are sums."""
PerItem = dict[Hashable, dict[str, tuple[int, int]]]
"""Item -> site -> (kept, total)."""


def add_items(sums: PerItem, more: PerItem) -> None:
    """Add the kept and total counts of items to sums.

    Args:
        sums: Changed in place.
        more: What is added.
    """
    for item, sites in more.items():
        mine = sums.setdefault(item, {})
        for site, (kept, total) in sites.items():
            before = mine.get(site, (0, 0))
            mine[site] = (before[0] + kept, before[1] + total)


class NonFiniteError(UserError):
    """An activation was NaN or infinite.

    Args:
        layer: First layer where it was seen.
        site: Site where it was seen there.
        rows: Rows with such a value, over all layers and sites.
    """

    def __init__(self, layer: int, site: str, rows: int) -> None:
        super().__init__(
            f"NaN or Inf in layer {layer}, site {site} ({rows} rows in all)",
            "try dtype float32 or bfloat16; if it stays, the model itself is broken",
        )
        self.layer, self.site, self.rows = layer, site, rows


@dataclass(frozen=True)
class Reading(Mapping[str, list]):
    """Step records by name of the column; each row is a sum over items.

    Args:
        columns: phase, branch, block, step, noise_bin, layer, site, expert, token_state, and the metrics' columns.
        per_item: Item -> site -> (kept, total) over all layers, without padding, after_eos and uncond rows.
        notes: What the reader should know.
    """

    columns: dict[str, list]
    per_item: dict[Hashable, dict[str, tuple[int, int]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> list:
        return self.columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)

    def sparsity(self, **only: Any) -> float:
        """Return the share of activations that were zero.

        Args:
            only: Column -> value, or a collection of values, to restrict the rows; by default all but `pad` and
                `after_eos` tokens of the branch `cond`.

        Raises:
            UserError: No row is left, or there is no such column.

        Example:
            >>> reading.sparsity(site="intermediate", token_state=("masked", "committed"))  # doctest: +SKIP
            0.62
        """
        only.setdefault("branch", "cond")
        unknown = [name for name in only if name not in self.columns]
        if unknown:
            raise UserError(f"no column {unknown[0]!r} to select by", f"columns are: {', '.join(self.columns)}")
        kept = total = 0
        for row in range(len(self.columns["kept"])):
            if "token_state" not in only and self.columns["token_state"][row] in ("pad", "after_eos"):
                continue
            if all(_matches(self.columns[name][row], value) for name, value in only.items()):
                kept += self.columns["kept"][row]
                total += self.columns["total"][row]
        if not total:
            raise UserError(
                f"nothing was counted for {only}", "look at reading['token_state'], reading['site'] and so on"
            )
        return 1 - kept / total


def _matches(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, list | tuple | set | range) else value == wanted
