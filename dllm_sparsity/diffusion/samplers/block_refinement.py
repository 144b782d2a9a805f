"""block_refinement: commit what is sure enough, at least the schedule's number, and edit committed tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from dllm_sparsity.diffusion.sampler import Draw, Sampler, propose
from dllm_sparsity.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class BlockRefinement(Sampler):
    """Commit all proposals above the threshold, or the schedule's number of the surest where fewer are above it.

    With an editing threshold, a committed token of the block is replaced where another token is proposed with more
    than that probability, also after the last mask is gone, until a step edits nothing. Settings and their defaults
    are those of `BlockRefinementScheduler` in diffusers with a mask token; there `confidence_threshold` is
    `threshold`, and `steps` is meant for each block.

    Args:
        confidence_threshold: Probability that a proposal must exceed; above 1 only the schedule commits.
        editing_threshold: Probability that a replacement must exceed; None never edits.
        minimal_topk: Tokens a step commits at least; bounds the steps of a block by the canvas's length over it.
        max_post_steps: Steps that go on editing when nothing is masked; one more is done, as in the pipeline.
        top_k: Tokens to draw from, where the temperature is not 0; None is all.
        top_p: Probability mass to draw from, where the temperature is not 0; None is all.

    Source: Bie et al. 2026 (LLaDA2.1), https://arxiv.org/abs/2602.08676. Differs: each row goes on and stops as if it
    were alone, ties go to the lower position, and no step is made that could change nothing.
    """

    confidence_threshold: float = 0.95
    editing_threshold: float | None = None
    minimal_topk: int = 1
    max_post_steps: int = 16
    top_k: int | None = None
    top_p: float | None = None
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("confidence_threshold", "editing_threshold", "top_p"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and (value <= 1 or name == "confidence_threshold")):
                raise UserError(f"{name} {value!r} is out of range", "give a probability in (0, 1]")
        whole = [value for value in (self.minimal_topk, self.max_post_steps, self.top_k) if value is not None]
        if not all(isinstance(value, int) for value in whole):
            raise UserError("minimal_topk, max_post_steps and top_k are whole numbers", "give 1, 2, 3 and so on")
        if self.minimal_topk < 1 or self.max_post_steps < 0 or (self.top_k is not None and self.top_k < 1):
            raise UserError("minimal_topk and top_k must be 1 or more, max_post_steps 0 or more", "raise them")

    @property
    def edit_steps(self) -> int:
        """Steps at most that a block with nothing masked goes on being edited."""
        return 0 if self.editing_threshold is None else self.max_post_steps + 1

    def steps_per_block(self, scheduled: int, block: int, length: int) -> int:
        """Return the scheduled steps, fewer where each commits several tokens at least.

        Args:
            scheduled: As in `Sampler.steps_per_block`.
            block: As in `Sampler.steps_per_block`.
            length: As in `Sampler.steps_per_block`.
        """
        return min(scheduled, max(1, length // self.minimal_topk))

    def propose(self, logits: Float[Tensor, "batch seq vocab"], draw: Draw) -> Int[Tensor, "batch seq"]:
        """Return the likeliest token, or one drawn from what top-k and top-p leave.

        Args:
            logits: As in `Sampler.propose`.
            draw: As in `Sampler.propose`.
        """
        if draw.temperature == 0:
            return propose(logits, draw)
        return propose(self._shaped(logits, draw.temperature), Draw(1.0, draw.generators))

    def confidence(
        self, logits: Float[Tensor, "batch seq vocab"], tokens: Int[Tensor, "batch seq"], draw: Draw
    ) -> Float[Tensor, "batch seq"]:
        """Return the probability of each proposal in the distribution it is drawn from, in float32.

        Args:
            logits: As in `Sampler.confidence`.
            tokens: As in `Sampler.confidence`.
            draw: As in `Sampler.confidence`.
        """
        shaped = self._shaped(logits, draw.temperature) if draw.temperature else logits
        return shaped.float().softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

    def _shaped(self, logits: Tensor, temperature: float) -> Tensor:
        """Divide by the temperature, and rule out what top-k and top-p leave out."""
        logits = logits / temperature
        never = torch.finfo(logits.dtype).min
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k, dim=-1).values[..., -1:], never)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            before = ordered.softmax(-1).cumsum(-1).roll(1, dims=-1)  # mass of the likelier tokens
            before[..., 0] = 0
            logits = logits.scatter(-1, order, ordered.masked_fill(before > self.top_p, never))
        return logits

    def select(
        self, confidence: Float[Tensor, "batch seq"], rank: Int[Tensor, "batch seq"], num_commits: Int[Tensor, "batch"]
    ) -> Bool[Tensor, "batch seq"]:
        """Mark what exceeds the threshold where that is enough, else the schedule's number of the surest.

        Args:
            confidence: As in `Sampler.select`.
            rank: As in `Sampler.select`.
            num_commits: As in `Sampler.select`.
        """
        sure, wanted = confidence > self.confidence_threshold, num_commits.unsqueeze(-1)
        return torch.where(sure.sum(-1, keepdim=True) >= wanted, sure, rank < wanted)

    def refine(
        self,
        logits: Float[Tensor, "batch seq vocab"],
        canvas: Int[Tensor, "batch seq"],
        masked: Bool[Tensor, "batch seq"],
        num_commits: Int[Tensor, "batch"],
        draw: Draw,
    ) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
        """Fill masks, and replace committed tokens by surer ones.

        Args:
            logits: As in `Sampler.refine`.
            canvas: As in `Sampler.refine`.
            masked: As in `Sampler.refine`.
            num_commits: As in `Sampler.refine`.
            draw: As in `Sampler.refine`.
        """
        if self.editing_threshold is None:
            return super().refine(logits, canvas, masked, num_commits, draw)
        tokens = self.propose(logits, draw)
        confidence = self.confidence(logits, tokens, draw)
        edit = ~masked & (tokens != canvas) & (confidence > self.editing_threshold)
        return tokens, self.choose(confidence, masked, num_commits), edit
