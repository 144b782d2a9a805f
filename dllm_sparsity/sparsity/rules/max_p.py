"""max_p: keep what is at least the share p of the row's largest magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from dllm_sparsity.sparsity.rule import Cut, CutoffRule

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class MaxP(CutoffRule):
    """Keep |x| >= p * max |x| of each row.

    Args:
        p: Share of the row's maximum, in [0, 1]; 0 is dense.

    Source: Szatkowski et al. 2025, section 3, https://arxiv.org/abs/2509.00454.
    """

    p: float

    dense: ClassVar[float] = 0.0
    denser_upwards: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.check_range()

    @property
    def strength(self) -> float:
        """The share p."""
        return self.p

    def cutoff(self, scores: Float[Tensor, "rows width"]) -> Float[Tensor, "rows 1"]:
        """Return the lowest score that is kept in each row.

        Args:
            scores: From `score`.
        """
        # at least float32, so that rounding to a 16-bit type cannot lift the cutoff above the maximum
        return self.p * scores.amax(-1, keepdim=True).to(torch.promote_types(scores.dtype, torch.float32))

    def fused(self, width: int) -> Cut | None:
        """Return the cutoff for the fused kernel.

        Args:
            width: As in `Rule.fused`.
        """
        return Cut("max_p", self.p)
