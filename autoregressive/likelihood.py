"""Exact log-likelihood of targets under a causal model, one forward pass a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dllm_sparsity.lm.base import Score, Target
from dllm_sparsity.lm.call import ModelCall, Rows, pad
from dllm_sparsity.sparsity.clock import Clock, Phase, Slot, TokenState


@torch.no_grad()
def score(call: ModelCall, clock: Clock, targets: Sequence[Target], max_length: int, pad_id: int) -> list[Score]:
    """Score one batch of targets.

    Context tokens are `prompt`, scored tokens that the model reads are `committed`; the last token of a target is
    never read. What is too long loses its left end.

    Args:
        call: The model.
        clock: Told of the forward pass.
        targets: What to score.
        max_length: Longest input.
        pad_id: Id to pad with on the right, where a causal model cannot see it.
    """
    inputs = [(target.context + target.tokens)[-(max_length + 1) :][:-1] for target in targets]
    rows = pad(inputs, pad_id, "right", torch.device("cpu"))
    scored = [range(len(ids) - len(t.tokens), len(ids)) for ids, t in zip(inputs, targets, strict=True)]
    wanted = torch.zeros_like(rows.real)
    states = torch.where(rows.real, TokenState.PROMPT, TokenState.PAD)
    for number, span in enumerate(scored):
        states[number, span.start + 1 : span.stop] = TokenState.COMMITTED
        wanted[number, span.start : span.stop] = True
    with clock.batch([target.item for target in targets]):
        clock.tick(Slot(Phase.LIKELIHOOD), states.to(call.device))
        # without a mask: padding on the right is out of sight, and unmasked attention is the faster kernel
        unmasked = Rows(rows.ids.to(call.device), torch.ones_like(rows.real, device=call.device))
        logits = call.at(unmasked, wanted.to(call.device)).log_softmax(-1, dtype=torch.float32)
    tokens = torch.tensor(
        [t for target, span in zip(targets, scored, strict=True) for t in target.tokens[-len(span) :]]
    )
    found = logits.gather(-1, tokens.to(logits.device).unsqueeze(-1)).squeeze(-1)
    right = logits.argmax(-1) == tokens.to(logits.device)
    lengths = [len(span) for span in scored]
    parts = zip(found.cpu().split(lengths), right.cpu().split(lengths), strict=True)
    return [Score(float(own.sum()), bool(hits.all()), 0.0, 1) for own, hits in parts]
