"""The contract of a sampler: which masked positions a denoising step commits, and to what."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from dllm_sparsity.sparsity.transfer import upload

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """Randomness of one denoising step.

    Args:
        temperature: Of the Gumbel noise on the logits; 0 proposes the likeliest token.
        generators: One CPU generator a row, so that a row's draw does not depend on its batch.
    """

    temperature: float
    generators: Sequence[torch.Generator]

    def uniform(self, shape: Sequence[int], device: torch.device) -> Float[Tensor, batch * shape]:
        """Return float64 numbers in [0, 1), a row from each generator.

        Args:
            shape: Shape of one row.
            device: Where they go.
        """
        rows = [torch.rand(*shape, dtype=torch.float64, generator=generator) for generator in self.generators]
        return upload(torch.stack(rows), device)


class Sampler(ABC):
    """Choose commits from logits; knows no model.

    Ties go to the lower position, so a run is repeatable.
    """

    adaptive: ClassVar[bool] = False
    """Whether it ignores the schedule and runs until nothing is masked."""

    @abstractmethod
    def confidence(
        self, logits: Float[Tensor, "batch seq vocab"], tokens: Int[Tensor, "batch seq"], draw: Draw
    ) -> Float[Tensor, "batch seq"]:
        """Return how sure the model is of each proposal; higher commits first.

        Args:
            logits: Raw model output of the block.
            tokens: The proposals.
            draw: Randomness of the step.
        """

    def commit(
        self,
        logits: Float[Tensor, "batch seq vocab"],
        masked: Bool[Tensor, "batch seq"],
        num_commits: Int[Tensor, "batch"],
        draw: Draw,
    ) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
        """Propose a token for each position and mark those that are committed.

        Args:
            logits: Raw model output of the block; not yet divided by temperature.
            masked: True where a token is still masked.
            num_commits: Positions the schedule commits in each row; never more than the row has left.
            draw: Randomness of the step.

        Returns:
            Token ids, and True where they are to be written.
        """
        tokens = propose(logits, draw)
        confidence = self.confidence(logits, tokens, draw).masked_fill(~masked, -torch.inf)
        order = confidence.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
        )
        return tokens, self.select(confidence, rank, num_commits) & masked

    def select(
        self, confidence: Float[Tensor, "batch seq"], rank: Int[Tensor, "batch seq"], num_commits: Int[Tensor, "batch"]
    ) -> Bool[Tensor, "batch seq"]:
        """Mark the positions to commit; the schedule's number of the surest unless a sampler says otherwise.

        Args:
            confidence: Of every position; minus infinity where nothing is masked.
            rank: Place of each position, the surest first.
            num_commits: As in `commit`.
        """
        return rank < num_commits.unsqueeze(-1)


def propose(logits: Float[Tensor, "batch seq vocab"], draw: Draw) -> Int[Tensor, "batch seq"]:
    """Return the likeliest token of each position, under Gumbel noise where the temperature is not 0.

    Args:
        logits: Raw model output.
        draw: Randomness of the step.

    Source: Zheng et al. 2024 (float64 noise), https://arxiv.org/abs/2409.02908.
    """
    if draw.temperature == 0:
        return logits.argmax(-1)
    noise = -torch.log(-torch.log(draw.uniform(logits.shape[1:], logits.device)))
    return (logits.double() + draw.temperature * noise).argmax(-1)
