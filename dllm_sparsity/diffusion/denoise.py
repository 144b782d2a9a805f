"""The denoising loop: a generator with one yield for each forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from dllm_sparsity.diffusion.sampler import Draw, Sampler
from dllm_sparsity.diffusion.samplers.low_confidence import LowConfidence
from dllm_sparsity.errors import UserError
from dllm_sparsity.lm.call import ModelCall, Rows, pad
from dllm_sparsity.sparsity.clock import Clock, Compare, Phase, Slot, TokenState
from dllm_sparsity.sparsity.transfer import Poll

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class DenoiseSettings:
    """How a canvas is denoised.

    Args:
        max_new_tokens: Length of the canvas.
        block_length: Tokens denoised together, left to right; the whole canvas when None or longer than it.
        steps: Denoising steps over the whole canvas; one for each token when None.
        temperature: Of the Gumbel noise on proposals.
        cfg_scale: Weight of classifier-free guidance; 0 is off.
        sampler: Chooses commits.
        logits_shift: Whether position i is predicted by the logits of i - 1, as in Dream.
    """

    max_new_tokens: int
    block_length: int | None = None
    steps: int | None = None
    temperature: float = 0.0
    cfg_scale: float = 0.0
    sampler: Sampler = field(default_factory=LowConfidence)
    logits_shift: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.block < 1 or (self.steps is not None and self.steps < 1):
            raise UserError("max_new_tokens, block_length and steps must be 1 or more", "give positive numbers")
        if self.max_new_tokens % self.block:
            raise UserError(
                f"{self.max_new_tokens} new tokens do not divide into blocks of {self.block}",
                "choose a block length that divides the number of new tokens",
            )
        if self.total_steps % self.blocks:
            raise UserError(
                f"{self.total_steps} steps do not divide over {self.blocks} blocks",
                f"give a multiple of {self.blocks}",
            )
        if self.temperature < 0 or self.cfg_scale < 0:
            raise UserError("temperature and cfg_scale must not be negative", "give 0 or more")

    @property
    def block(self) -> int:
        """Tokens of one block."""
        wanted = self.max_new_tokens if self.block_length is None else self.block_length
        return min(wanted, self.max_new_tokens)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.max_new_tokens // self.block

    @property
    def total_steps(self) -> int:
        """Steps over the whole canvas, if the sampler keeps to the schedule."""
        return self.max_new_tokens if self.steps is None else self.steps

    @property
    def fill_steps(self) -> int:
        """Steps at most in which something of a block is masked."""
        return self.sampler.steps_per_block(self.total_steps // self.blocks, self.block, self.max_new_tokens)

    @property
    def steps_per_block(self) -> int:
        """Steps a block takes at most."""
        return self.fill_steps + self.sampler.edit_steps

    @property
    def max_forwards(self) -> int:
        """Forward passes at most, guidance included."""
        return self.blocks * self.steps_per_block * (2 if self.cfg_scale else 1)


@dataclass(frozen=True)
class DenoiseStep:
    """What one forward pass did.

    Args:
        branch: cond or uncond; with guidance, the second of a step is uncond and commits.
        block: Block of the canvas.
        step: Denoising step, counted over the whole canvas.
        canvas: Token ids after this forward pass, prompt cut off.
        committed: Positions that this forward pass committed.
        edited: Committed positions whose token it replaced.
        active: Rows that had something left to do in this block, and whose text was not finished.
    """

    branch: str
    block: int
    step: int
    canvas: Int[Tensor, "batch new"]
    committed: Bool[Tensor, "batch new"]
    edited: Bool[Tensor, "batch new"]
    active: Bool[Tensor, "batch"]


@torch.no_grad()
def denoise(
    call: ModelCall,
    clock: Clock,
    prompts: Sequence[Sequence[int]],
    settings: DenoiseSettings,
    *,
    mask_id: int,
    pad_id: int,
    eos_id: int | None = None,
    generators: Sequence[torch.Generator] | None = None,
) -> Iterator[DenoiseStep]:
    """Denoise one batch of canvases; the caller wraps this in `clock.batch` and may stop at any step.

    Args:
        call: A model that sees both sides.
        clock: Told of every forward pass.
        prompts: Token ids; padded on the left.
        settings: How to denoise.
        mask_id: Id of the mask token.
        pad_id: Id to pad with; attention never sees it.
        eos_id: Id of the end token; tokens behind it count as `after_eos`.
        generators: Randomness, one a row; seeded by the row's number when None.

    Source: Nie et al. 2025 (LLaDA), section 2.4 and Algorithm 5, https://arxiv.org/abs/2502.09992. Differs: guidance
    is two forward passes; an adaptive sampler's block is left when nothing is masked, or edited any more. On a GPU that
    is learnt some forward passes late, and these are not counted. A row whose text is finished is not edited.
    """
    rows = pad([[*prompt, *[mask_id] * settings.max_new_tokens] for prompt in prompts], pad_id, "left").to(call.device)
    ids, start = rows.ids, rows.ids.shape[1] - settings.max_new_tokens
    draw = Draw(settings.temperature, generators or [torch.Generator().manual_seed(row) for row in range(len(prompts))])
    fixed = torch.where(rows.real, TokenState.PROMPT, TokenState.PAD)
    now = torch.zeros_like(ids[:, start:], dtype=torch.bool)  # committed by the row's step before
    compare = Compare.START
    sampler, nothing = settings.sampler, torch.zeros_like(now)
    for block in range(settings.blocks):
        left, right = start + block * settings.block, start + (block + 1) * settings.block
        schedule = _schedule((ids[:, left:right] == mask_id).sum(-1), settings.fill_steps)
        editing = _Editing(schedule, sampler.edit_steps) if sampler.edit_steps else None
        finished, drawn = Poll(), draw.fork() if sampler.adaptive else draw
        turns = settings.steps_per_block if sampler.adaptive else min(settings.steps_per_block, settings.block)
        for turn in range(turns):  # an even schedule has no commit after as many as the block has tokens
            masked = ids[:, left:right] == mask_id
            over = ended(ids[:, start:], mask_id, eos_id)
            going = masked.any(-1) if editing is None else editing.going & ~over
            active = going & ~over
            if sampler.adaptive and finished.says(~going.any()):
                break
            step = block * settings.steps_per_block + turn  # the same for a row alone and in any batch
            states = torch.cat([fixed[:, :start], token_states(ids[:, start:], now, mask_id, eos_id)], dim=1)
            states = states.masked_fill(~active.unsqueeze(-1), TokenState.PAD)  # a row that only waits is not counted
            clock.tick(Slot(Phase.DENOISE, "cond", block, step), states, compare)
            logits = block_logits(call, rows, left, right, settings.logits_shift)
            if settings.cfg_scale:
                yield DenoiseStep("cond", block, step, ids[:, start:].clone(), nothing, nothing, active)
                clock.tick(Slot(Phase.DENOISE, "uncond", block, step), states, compare)
                blank = torch.cat([ids[:, :start].masked_fill(rows.real[:, :start], mask_id), ids[:, start:]], dim=1)
                free = block_logits(call, replace(rows, ids=blank), left, right, settings.logits_shift)
                logits = guided(logits, free, settings.cfg_scale)
            count = schedule[:, turn] if editing is None else editing.num_commits
            tokens, commit, edit = sampler.refine(logits, ids[:, left:right], masked, count, drawn)
            if editing is not None:
                commit, edit = commit & active.unsqueeze(-1), edit & active.unsqueeze(-1)
                editing.after(masked.any(-1), edit.any(-1))
            ids[:, left:right] = torch.where(commit | edit, tokens, ids[:, left:right])
            committed, edited = nothing.clone(), nothing.clone()
            committed[:, left - start : right - start], edited[:, left - start : right - start] = commit, edit
            now = torch.where(active.unsqueeze(-1), committed | edited, now)
            branch = "uncond" if settings.cfg_scale else "cond"
            yield DenoiseStep(branch, block, step, ids[:, start:].clone(), committed, edited, active)
            compare = Compare.PREVIOUS


class _Editing:
    """Which rows of a block a sampler that edits is not done with; each row as if it were alone."""

    def __init__(self, schedule: Int[Tensor, "batch steps"], edit_steps: int) -> None:
        self._schedule, self._edit_steps = schedule, edit_steps
        self._filled, self._polished = torch.zeros_like(schedule[:, 0]), torch.zeros_like(schedule[:, 0])
        self.going = torch.ones_like(self._filled, dtype=torch.bool)

    @property
    def num_commits(self) -> Int[Tensor, "batch"]:
        """Commits that the schedule asks of each row now."""
        place = self._filled.clamp(max=self._schedule.shape[1] - 1)
        return self._schedule.gather(1, place.unsqueeze(-1)).squeeze(-1)

    def after(self, had_masks: Bool[Tensor, "batch"], edited: Bool[Tensor, "batch"]) -> None:
        """Note what a step did; a row is done when its steps are spent, or nothing is masked and nothing was edited.

        Args:
            had_masks: Whether something was masked before the step.
            edited: Whether the step replaced a token.
        """
        self._filled += had_masks
        self._polished += ~had_masks
        more = torch.where(
            had_masks, self._filled < self._schedule.shape[1], edited & (self._polished < self._edit_steps)
        )
        self.going = self.going & more


def block_logits(call: ModelCall, rows: Rows, left: int, right: int, shift: bool) -> Float[Tensor, "batch block vocab"]:
    """Return the logits that predict columns left to right.

    Args:
        call: The model.
        rows: Token rows.
        left: First column.
        right: Column after the last.
        shift: Whether a column is predicted by the logits of the one before it; column 0 by its own.
    """
    columns = torch.arange(left, right, device=rows.ids.device)
    return call(rows, (columns - 1).clamp(min=0) if shift else columns)


def guided(logits: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Combine both halves of classifier-free guidance.

    Args:
        logits: With the prompt.
        unconditional: With the prompt masked.
        scale: Weight of the guidance.

    Source: Nie et al. 2025 (LLaDA), appendix, https://arxiv.org/abs/2502.09992.
    """
    return unconditional + (scale + 1) * (logits - unconditional)


def _schedule(masked: Int[Tensor, "batch"], steps: int) -> Int[Tensor, "batch steps"]:
    """Spread commits evenly over the steps; the first steps take the remainder."""
    turn = torch.arange(steps, device=masked.device)
    return (masked // steps).unsqueeze(-1) + (turn < (masked % steps).unsqueeze(-1)).long()


def ended(canvas: Tensor, mask_id: int, eos_id: int | None) -> Bool[Tensor, "batch"]:
    """Tell which rows have an end token with nothing masked before it: what follows is cut off anyway.

    Args:
        canvas: Token ids, prompt cut off.
        mask_id: Id of the mask token.
        eos_id: Id of the end token; None where there is none.
    """
    if eos_id is None:
        return torch.zeros(len(canvas), dtype=torch.bool, device=canvas.device)
    after = (canvas == eos_id).long().cumsum(-1) > 0
    return after.any(-1) & ~((canvas == mask_id) & ~after).any(-1)


def token_states(
    canvas: Int[Tensor, "batch new"], now: Bool[Tensor, "batch new"], mask_id: int, eos_id: int | None
) -> Int[Tensor, "batch new"]:
    """Return the state of each canvas token.

    Args:
        canvas: Token ids, prompt cut off.
        now: True where a token was written by the step before.
        mask_id: Id of the mask token.
        eos_id: Id of the end token; None where there is none.
    """
    states = torch.where(now, TokenState.COMMITTED_NOW, TokenState.COMMITTED)
    if eos_id is not None:
        end = (canvas == eos_id).long()
        states = torch.where(end.cumsum(-1) - end > 0, TokenState.AFTER_EOS, states)  # an end token strictly before it
    return torch.where(canvas == mask_id, TokenState.MASKED, states)
