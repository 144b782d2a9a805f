"""The contract of a metric: integers counted a row at a time, and what their sums mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from dllm_sparsity.sparsity.clock import Frame


class Metric(ABC):
    """Count something about the kept sets, row by row.

    Counts are int64, so sums do not depend on the order of rows, batches or devices. A metric that needs fractions
    counts in fixed point and names the unit in `scales`.
    """

    columns: ClassVar[tuple[str, ...]]
    """Names of the columns it adds to the step records."""
    scales: ClassVar[dict[str, float]] = {}
    """Column -> what one counted unit is worth, for columns that are not plain integers."""
    needs_clock: ClassVar[bool] = False
    by_place: ClassVar[bool] = False
    """Whether rows are compared by their place, which they do not keep where experts share them out."""

    def begin(self) -> None:  # noqa: B027 - most metrics keep nothing between rows
        """Forget what was kept of the request batch before."""

    @abstractmethod
    def count(
        self, point: int, rows: Float[Tensor, "rows width"], kept: Bool[Tensor, "rows width"], frame: Frame
    ) -> Int[Tensor, "rows columns"]:
        """Return this forward pass's counts, one row a token, one column a name in `columns`.

        Args:
            point: Number of the (layer, site) pair.
            rows: Activations before the rule.
            kept: Entries that are non-zero after the rule.
            frame: Where the forward pass stands.
        """
