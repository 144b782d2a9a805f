"""threshold: keep what is at least a fixed magnitude, the same for every row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from dllm_sparsity.sparsity.rule import Cut, CutoffRule

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class Threshold(CutoffRule):
    """Keep |x| >= activation_threshold.

    Args:
        activation_threshold: In the units of the activation, 0 or more; 0 is dense.

    Source: Liu et al. 2024 (TEAL), https://arxiv.org/abs/2408.14690. Differs: one threshold, not one per layer.
    """

    activation_threshold: float

    dense: ClassVar[float] = 0.0
    high: ClassVar[float] = math.inf
    denser_upwards: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.check_range()

    @property
    def strength(self) -> float:
        """The activation threshold."""
        return self.activation_threshold

    def cutoff(self, scores: Float[Tensor, "rows width"]) -> Float[Tensor, "rows 1"]:
        """Return the threshold, once a row.

        Args:
            scores: From `score`.
        """
        return torch.full_like(scores[:, :1], self.activation_threshold, dtype=torch.float32)

    def fused(self, width: int) -> Cut | None:
        """Return the cutoff for the fused kernel.

        Args:
            width: As in `Rule.fused`.
        """
        return Cut("threshold", self.activation_threshold)
