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
    rows = pad(inputs, pad_id, "right", call.device)
    scored = [range(len(ids) - len(t.tokens), len(ids)) for ids, t in zip(inputs, targets, strict=True)]
    positions = sorted(set().union(*scored))
    column = {position: number for number, position in enumerate(positions)}
    states = torch.where(rows.real, TokenState.PROMPT, TokenState.PAD)
    for number, span in enumerate(scored):
        states[number, span.start + 1 : span.stop] = TokenState.COMMITTED
    with clock.batch([target.item for target in targets]):
        clock.tick(Slot(Phase.LIKELIHOOD), states)
        # without a mask: padding on the right is out of sight, and unmasked attention is the faster kernel
        unmasked = Rows(rows.ids, torch.ones_like(rows.real))
        logits = call(unmasked, torch.tensor(positions, device=rows.ids.device))
    results = []
    for number, (span, target) in enumerate(zip(scored, targets, strict=True)):
        own = logits[number, [column[position] for position in span]].log_softmax(-1, dtype=torch.float32)
        tokens = torch.tensor(target.tokens[-len(own) :], device=own.device)
        total = own.gather(-1, tokens.unsqueeze(-1)).sum()
        results.append(Score(float(total), bool((own.argmax(-1) == tokens).all()), 0.0, 1))
    return results
