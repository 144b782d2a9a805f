"""The contract of a sampler: which masked positions a denoising step commits, to what, and which it edits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
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

    def fork(self) -> Draw:
        """Return generators of one block's own: how many steps a block takes must not move what later blocks draw."""
        seeds = [int(torch.randint(2**62, (), generator=generator)) for generator in self.generators]
        return replace(self, generators=[torch.Generator().manual_seed(seed) for seed in seeds])


class Sampler(ABC):
    """Choose commits from logits; knows no model.

    Ties go to the lower position, so a run is repeatable.
    """

    adaptive: ClassVar[bool] = False
    """Whether a block may be done before all its steps are."""

    @property
    def edit_steps(self) -> int:
        """Steps at most that a block with nothing masked goes on being edited; 0 if committed tokens stay."""
        return 0

    def steps_per_block(self, scheduled: int, block: int, length: int) -> int:
        """Return how many steps may pass in a block until nothing is masked.

        Args:
            scheduled: What the settings ask for.
            block: Tokens of a block.
            length: Tokens of the canvas.
        """
        return block if self.adaptive else scheduled

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
        tokens = self.propose(logits, draw)
        return tokens, self.choose(self.confidence(logits, tokens, draw), masked, num_commits)

    def refine(
        self,
        logits: Float[Tensor, "batch seq vocab"],
        canvas: Int[Tensor, "batch seq"],
        masked: Bool[Tensor, "batch seq"],
        num_commits: Int[Tensor, "batch"],
        draw: Draw,
    ) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
        """Do one denoising step: `commit`, and replace committed tokens where a sampler edits.

        Args:
            logits: As in `commit`.
            canvas: Token ids of the block.
            masked: As in `commit`.
            num_commits: As in `commit`.
            draw: As in `commit`.

        Returns:
            Token ids, True where they fill a mask, and True where they replace a committed token.
        """
        tokens, commit = self.commit(logits, masked, num_commits, draw)
        return tokens, commit, torch.zeros_like(commit)

    def propose(self, logits: Float[Tensor, "batch seq vocab"], draw: Draw) -> Int[Tensor, "batch seq"]:
        """Return a token for each position.

        Args:
            logits: As in `commit`.
            draw: As in `commit`.
        """
        return propose(logits, draw)

    def choose(
        self,
        confidence: Float[Tensor, "batch seq"],
        masked: Bool[Tensor, "batch seq"],
        num_commits: Int[Tensor, "batch"],
    ) -> Bool[Tensor, "batch seq"]:
        """Mark the masked positions to commit.

        Args:
            confidence: Of every position.
            masked: As in `commit`.
            num_commits: As in `commit`.
        """
        confidence = confidence.masked_fill(~masked, -torch.inf)
        order = confidence.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
        )
        return self.select(confidence, rank, num_commits) & masked

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
