"""random: commit proposals at random positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dllm_sparsity.diffusion.sampler import Draw, Sampler

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class Random(Sampler):
    """Rank positions by a random number, as the reverse process of masked diffusion does.

    Source: Nie et al. 2025 (LLaDA), Algorithm 4, https://arxiv.org/abs/2502.09992.
    """

    def confidence(
        self, logits: Float[Tensor, "batch seq vocab"], tokens: Int[Tensor, "batch seq"], draw: Draw
    ) -> Float[Tensor, "batch seq"]:
        """Return a random number for each position.

        Args:
            logits: As in `Sampler.confidence`.
            tokens: As in `Sampler.confidence`.
            draw: Where the numbers come from.
        """
        return draw.uniform(tokens.shape[1:], tokens.device)
