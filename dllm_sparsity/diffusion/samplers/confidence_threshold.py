"""confidence_threshold: commit every proposal that is sure enough, and at least the surest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dllm_sparsity.diffusion.samplers.low_confidence import LowConfidence
from dllm_sparsity.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class ConfidenceThreshold(LowConfidence):
    """Commit proposals whose probability is at least the threshold; the number of steps follows from the model.

    Args:
        confidence_threshold: Probability, in (0, 1].

    Source: Wu et al. 2025 (Fast-dLLM), https://arxiv.org/abs/2505.22618.
    """

    confidence_threshold: float = 0.9
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.confidence_threshold <= 1:
            raise UserError(
                f"confidence threshold {self.confidence_threshold!r} is out of range", "give a probability in (0, 1]"
            )

    def select(
        self, confidence: Float[Tensor, "batch seq"], rank: Int[Tensor, "batch seq"], num_commits: Int[Tensor, "batch"]
    ) -> Bool[Tensor, "batch seq"]:
        """Mark what reaches the threshold, and the surest position.

        Args:
            confidence: As in `Sampler.select`.
            rank: As in `Sampler.select`.
            num_commits: Unused; the schedule does not count here.
        """
        return (confidence >= self.confidence_threshold) | (rank == 0)
