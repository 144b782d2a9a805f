"""Exact log-likelihood of targets under a causal model, one forward pass a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dllm_sparsity.lm.base import Score, Target
from dllm_sparsity.lm.call import ModelCall, pad
from dllm_sparsity.sparsity.clock import Clock, Phase, Slot, TokenState
from dllm_sparsity.sparsity.transfer import upload


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
    rows = pad(inputs, pad_id, "right")
    scored = [range(len(ids) - len(t.tokens), len(ids)) for ids, t in zip(inputs, targets, strict=True)]
    wanted = torch.zeros_like(rows.real)
    states = torch.where(rows.real, TokenState.PROMPT, TokenState.PAD)
    for number, span in enumerate(scored):
        states[number, span.start + 1 : span.stop] = TokenState.COMMITTED
        wanted[number, span.start : span.stop] = True
    # without a mask: padding on the right is out of sight, and unmasked attention is the faster kernel
    unmasked = replace(rows.to(call.device), padded=False)
    with clock.batch([target.item for target in targets]):
        clock.tick(Slot(Phase.LIKELIHOOD), upload(states, call.device))
        places = upload(wanted.flatten().nonzero().squeeze(-1), call.device)
        logits = call.at(unmasked, places).log_softmax(-1, dtype=torch.float32)
        asked = [t for target, span in zip(targets, scored, strict=True) for t in target.tokens[-len(span) :]]
        tokens = upload(torch.tensor(asked), logits.device)
        found = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        right = logits.argmax(-1) == tokens
    lengths = [len(span) for span in scored]
    parts = zip(found.cpu().split(lengths), right.cpu().split(lengths), strict=True)
    return [Score(float(own.sum()), bool(hits.all()), 0.0, 1) for own, hits in parts]
