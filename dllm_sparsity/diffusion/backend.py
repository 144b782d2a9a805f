"""diffusion: any masked-diffusion language model as an lm-eval LM."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dllm_sparsity.diffusion.denoise import DenoiseSettings, denoise, ended, guided
from dllm_sparsity.diffusion.likelihood import MAX_EXACT, MaskPlan, exact, monte_carlo, target_seed
from dllm_sparsity.diffusion.sampler import Sampler
from dllm_sparsity.diffusion.samplers.low_confidence import LowConfidence
from dllm_sparsity.diffusion.tokens import closing_tokens, cut_answer, find_mask_id
from dllm_sparsity.errors import UserError
from dllm_sparsity.lm.base import Generation, PromptBatch, Score, SparsityLM, Target
from dllm_sparsity.lm.call import pad
from dllm_sparsity.sparsity.clock import Phase, Slot, TokenState
from dllm_sparsity.sparsity.transfer import Poll, upload

_OPTIONS = {"do_sample", "temperature", "top_k", "top_p"}


@dataclass(frozen=True)
class _Row:
    """One forward pass of one target: its number in the batch, and the number of its mask."""

    target: int
    mask: int


class DiffusionBackend(SparsityLM):
    """Likelihood bound and denoising of a masked-diffusion model, with its sparsity clock driven.

    `is_greedy` says whether denoising with one token a step commits the target.

    Args:
        model: A model that sees both sides and predicts masked tokens.
        tokenizer: Its tokenizer.
        mask_token: Mask token or its id; from the tokenizer or the model's config when None.
        logits_shift: Whether position i is predicted by the logits of i - 1, as in Dream.
        mc: Monte-Carlo draws of the bound, or `exact` to enumerate all masks of short targets.
        steps: Denoising steps over the canvas; one for each token when None.
        block_length: Tokens denoised together; the whole canvas when None.
        temperature: Of the Gumbel noise on proposals.
        cfg_scale: Weight of classifier-free guidance, in likelihood and generation; 0 is off.
        sampler: Chooses commits.
        batch_size: Sequences in one forward pass.
        max_length: Longest sequence; from the model's config when None.
        seed: Seed of masks and sampling.
    """

    bidirectional, stacks = True, True

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        mask_token: str | int | None = None,
        logits_shift: bool = False,
        mc: int | str = 16,
        steps: int | None = None,
        block_length: int | None = None,
        temperature: float = 0.0,
        cfg_scale: float = 0.0,
        sampler: Sampler | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, tokenizer, **settings)
        if mc != "exact" and (not isinstance(mc, int) or mc < 1):
            raise UserError(f"{mc!r} is no number of Monte-Carlo draws", "give 1 or more, or exact for short targets")
        self.mc, self.logits_shift, self.cfg_scale = mc, logits_shift, cfg_scale
        self.mask_id = find_mask_id(model, tokenizer, mask_token)
        self._closing = closing_tokens(tokenizer)
        self.denoising: dict[str, Any] = {
            "steps": steps,
            "block_length": block_length,
            "temperature": temperature,
            "cfg_scale": cfg_scale,
            "sampler": sampler or LowConfidence(),
            "logits_shift": logits_shift,
        }

    @property
    def estimator(self) -> str:
        """How likelihoods are estimated."""
        return "bound, all masks" if self.mc == "exact" else f"bound, K={self.mc} stratified masks"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Turn text into token ids, without the closing tokens that tokenizers of masked LMs add.

        Args:
            string: The text.
            add_special_tokens: As in transformers; None leaves it to the tokenizer.
            kwargs: Ignored.
        """
        ids = super().tok_encode(string, add_special_tokens, **kwargs)
        closing = self._closing if add_special_tokens is not False else 0
        return ids[: len(ids) - closing]

    @property
    def _window(self) -> int:
        return self.max_length - 1  # the context token stands in the same canvas

    def _plan(self, target: Target) -> MaskPlan:
        length = len(target.tokens)
        if self.mc == "exact":
            if length > MAX_EXACT:
                raise UserError(
                    f"a target of {length} tokens is too long for the exact bound", "give --mc a number, such as 16"
                )
            return exact(length)
        return monte_carlo(length, int(self.mc), target_seed(self.seed, target.context, target.tokens))

    def _batches(self, order: list[int], targets: list[Target]) -> Iterable[list[int]]:
        """Fill forward passes with whole targets; a target's masks stay together where they fit."""
        batch: list[int] = []
        rows = 0
        for number in order:
            more = 2 ** min(len(targets[number].tokens), MAX_EXACT) if self.mc == "exact" else int(self.mc)
            if batch and rows + more > self.batch_size:
                yield batch
                batch, rows = [], 0
            batch.append(number)
            rows += more
        if batch:
            yield batch

    def _score(self, targets: Sequence[Target]) -> list[Score]:
        targets = [replace(t, context=_fit(t.context, self.max_length - len(t.tokens))) for t in targets]
        alone = len(targets) // self.copies
        plans = [self._plan(target) for target in targets[:alone]] * self.copies
        rows = [_Row(number, mask) for number, plan in enumerate(plans[:alone]) for mask in range(len(plan.masks))]
        sums: list[list[float]] = [[] for _ in targets]
        for start in range(0, len(rows), self.batch_size):
            own = rows[start : start + self.batch_size]
            chunk = [_Row(copy * alone + row.target, row.mask) for copy in range(self.copies) for row in own]
            for row, total in zip(chunk, self._forward(targets, plans, chunk), strict=True):
                sums[row.target].append(total)
        greedy = self._decodes_to(targets) if self.check_greedy else [False] * len(targets)
        passes = 2 if self.cfg_scale else 1
        return [
            Score(bound, is_greedy, error, len(total) * passes)
            for plan, total, is_greedy in zip(plans, sums, greedy, strict=True)
            for bound, error in [plan.bound(total)]
        ]

    @torch.no_grad()
    def _forward(self, targets: Sequence[Target], plans: list[MaskPlan], chunk: list[_Row]) -> list[float]:
        """Return the summed log-probability of the masked tokens of each row."""
        chosen = [targets[row.target] for row in chunk]
        rows = pad([[*t.context, *t.tokens] for t in chosen], self.pad_id, "left")
        hidden, scored = torch.zeros_like(rows.real), torch.zeros_like(rows.real)
        for number, (row, target) in enumerate(zip(chunk, chosen, strict=True)):
            hidden[number, -len(target.tokens) :] = torch.from_numpy(plans[row.target].masks[row.mask])
            scored[number, -len(target.tokens) :] = True
        states = torch.where(rows.real, TokenState.PROMPT, TokenState.PAD)
        states = torch.where(scored, torch.where(hidden, TokenState.MASKED, TokenState.COMMITTED), states)
        asked = (_shifted(hidden) if self.logits_shift else hidden).flatten().nonzero().squeeze(-1)
        wanted, owner = rows.ids[hidden], hidden.nonzero()[:, 0]
        noisy = rows.ids.masked_fill(hidden, self.mask_id)
        blank = noisy.masked_fill(states == TokenState.PROMPT, self.mask_id)
        with self.clock.batch([target.item for target in chosen], 2):
            device = self.call.device
            there, asked, states = replace(rows, ids=noisy).to(device), upload(asked, device), upload(states, device)
            self.clock.tick(Slot(Phase.LIKELIHOOD), states)
            logits = self.call.at(there, asked)
            if self.cfg_scale:
                self.clock.tick(Slot(Phase.LIKELIHOOD, "uncond"), states)
                free = self.call.at(replace(there, ids=upload(blank, device)), asked)
                logits = guided(logits, free, self.cfg_scale)
            log = logits.log_softmax(-1, dtype=torch.float32)
            found = log.gather(-1, upload(wanted, log.device).unsqueeze(-1)).squeeze(-1).double()
            sums = torch.zeros(len(chunk), dtype=torch.float64, device=log.device)
            sums.index_add_(0, upload(owner, log.device), found)
        return sums.tolist()

    def _decodes_to(self, targets: Sequence[Target]) -> list[bool]:
        """Tell for each target whether denoising commits it; these forward passes are not counted as sparsity."""
        result = [False] * len(targets)
        lengths = sorted({len(target.tokens) for target in targets})
        for length in lengths:
            members = [n for n, target in enumerate(targets) if len(target.tokens) == length]
            settings = DenoiseSettings(length, cfg_scale=self.cfg_scale, logits_shift=self.logits_shift)
            wanted = upload(torch.tensor([targets[n].tokens for n in members]), self.call.device)
            right, wrong = torch.ones(len(members), dtype=torch.bool, device=wanted.device), Poll()
            with self.clock.paused():
                self.clock.begin([targets[n].item for n in members], settings.max_forwards)
                contexts = [targets[n].context for n in members]
                for step in denoise(
                    self.call, self.clock, contexts, settings, mask_id=self.mask_id, pad_id=self.pad_id
                ):
                    right &= ~(step.committed & (step.canvas != wanted)).any(-1)
                    if wrong.says(~right.any()):
                        break
            for number, is_right in zip(members, right.tolist(), strict=True):
                result[number] = is_right
        return result

    def _generate(self, batch: PromptBatch) -> list[Generation]:
        options = batch.options
        unknown = sorted(set(options) - _OPTIONS)
        if unknown or options.get("top_k") or (options.get("top_p") or 1.0) < 1.0:
            raise UserError(
                f"generation arguments not supported by denoising: {', '.join(unknown) or 'top_k, top_p'}",
                "the task may use: do_sample, temperature",
            )
        sampled = {"temperature": options.get("temperature") or 1.0} if options.get("do_sample") else {}
        settings = DenoiseSettings(batch.length, **{**self.denoising, **sampled})
        generators = [self._generator(draw) for draw in batch.draws]
        nfe = torch.zeros(len(batch.prompts), dtype=torch.long, device=self.call.device)
        canvas = torch.full((len(batch.prompts), batch.length), self.mask_id)
        finished = Poll()
        with self.clock.batch(batch.items, settings.max_forwards):
            for step in denoise(
                self.call,
                self.clock,
                batch.prompts,
                settings,
                mask_id=self.mask_id,
                pad_id=self.pad_id,
                eos_id=self.eot_token_id,
                generators=generators,
            ):
                nfe += step.active
                canvas = step.canvas
                if finished.says(ended(canvas, self.mask_id, self.eot_token_id).all()):
                    break
        return [
            cut_answer(self.tokenizer, row, count, self.eot_token_id, batch.until)
            for row, count in zip(canvas.tolist(), nfe.tolist(), strict=True)
        ]


def _fit(context: list[int], room: int) -> list[int]:
    return context[-room:] if room > 0 else []


def _shifted(hidden: torch.Tensor) -> torch.Tensor:
    """Return where the logits stand that predict the hidden tokens; column 0 has no position before it."""
    before = hidden.roll(-1, dims=1)
    before[:, -1] = False
    if hidden[:, 0].any():
        raise UserError("a target without context has no position that predicts its first token", "give a context")
    return before
