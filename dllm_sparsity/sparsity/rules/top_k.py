"""top_k: keep the fraction k of a row's entries that is largest in magnitude."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dllm_sparsity.sparsity.kernels import naive
from dllm_sparsity.sparsity.rule import Cut, CutoffRule

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class TopK(CutoffRule):
    """Keep floor(k * width) entries of each row, at least one, and what ties with the smallest of them.

    Args:
        k: Fraction kept, in (0, 1]; 1 is dense.

    Source: Szatkowski et al. 2025, section 3, https://arxiv.org/abs/2509.00454. Differs: at least one entry is kept.
    """

    k: float

    dense: ClassVar[float] = 1.0
    open_low: ClassVar[bool] = True
    denser_upwards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check_range()

    @property
    def strength(self) -> float:
        """The fraction k."""
        return self.k

    def count(self, width: int) -> int:
        """Return how many entries of a row are kept.

        Args:
            width: Entries of a row.
        """
        return max(1, math.floor(self.k * width + 1e-9))  # 0.29 * 100 is 28.999...

    def cutoff(self, scores: Float[Tensor, "rows width"]) -> Float[Tensor, "rows 1"]:
        """Return the lowest score that is kept in each row.

        Args:
            scores: From `score`.
        """
        return naive.top_k_cutoff(scores, self.count(scores.shape[-1]))

    def fused(self, width: int) -> Cut | None:
        """Return the cutoff for the fused kernel.

        Args:
            width: As in `Rule.fused`.
        """
        return Cut("top_k", self.count(width))
