"""low_confidence: commit the proposals with the highest probability, leave the others masked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dllm_sparsity.diffusion.sampler import Draw, Sampler

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class LowConfidence(Sampler):
    """Rank proposals by their probability at temperature 1.

    Source: Nie et al. 2025 (LLaDA), Algorithm 5, https://arxiv.org/abs/2502.09992.
    """

    def confidence(
        self, logits: Float[Tensor, "batch seq vocab"], tokens: Int[Tensor, "batch seq"], draw: Draw
    ) -> Float[Tensor, "batch seq"]:
        """Return the probability of each proposal.

        Args:
            logits: As in `Sampler.confidence`.
            tokens: As in `Sampler.confidence`.
            draw: Unused.
        """
        return logits.double().softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
