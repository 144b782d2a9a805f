"""entropy: commit first where the distribution over tokens is narrowest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dllm_sparsity.diffusion.sampler import Draw, Sampler

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class Entropy(Sampler):
    """Rank positions by the negative entropy of their distribution.

    Source: Ye et al. 2025 (Dream), https://arxiv.org/abs/2508.15487.
    """

    def confidence(
        self, logits: Float[Tensor, "batch seq vocab"], tokens: Int[Tensor, "batch seq"], draw: Draw
    ) -> Float[Tensor, "batch seq"]:
        """Return the negative entropy, in nats.

        Args:
            logits: As in `Sampler.confidence`.
            tokens: As in `Sampler.confidence`.
            draw: Unused.
        """
        log_probability = logits.double().log_softmax(-1)
        return (log_probability.exp() * log_probability.clamp(min=-1e9)).sum(-1)  # 0 * -inf is nan
