"""Exact log-likelihood of targets under a causal model; what targets of one item have in common is read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from autoregressive.shared import Read, alike, cost, pick, score_continued
from dllm_sparsity.lm.base import Score, Target
from dllm_sparsity.lm.call import ModelCall, pad
from dllm_sparsity.sparsity.clock import Clock, Phase, Slot, TokenState
from dllm_sparsity.sparsity.transfer import upload


@torch.no_grad()
def score(
    call: ModelCall,
    clock: Clock,
    targets: Sequence[Target],
    max_length: int,
    pad_id: int,
    share: bool = False,
    continues: bool = False,
) -> list[Score]:
    """Score one batch of targets.

    Context tokens are `prompt`, scored tokens that the model reads are `committed`; the last token of a target is
    never read. What is too long loses its left end. What is read once for several targets is counted for each.

    Args:
        call: The model.
        clock: Told of the forward passes.
        targets: What to score.
        max_length: Longest input.
        pad_id: Id to pad with, where a causal model cannot see it.
        share: Whether targets of one item share rows; only where the clock `may_share`.
        continues: Whether the model's cache can be continued by several rows.
    """
    reads = [Read.of(target, max_length) for target in targets]
    if share and cost(reads, continues)[1]:
        found = score_continued(call, clock, reads, pad_id)
    else:
        found = _score_whole(call, clock, reads, alike(reads) if share else [[n] for n in range(len(reads))], pad_id)
    return [Score(float(own.sum()), bool(hits.all()), 0.0, 1) for own, hits in found]


def _score_whole(
    call: ModelCall, clock: Clock, reads: Sequence[Read], groups: Sequence[Sequence[int]], pad_id: int
) -> list[tuple[Tensor, Tensor]]:
    """Read whole inputs, one for each group of equal ones; return log-probabilities and hits of every target."""
    inputs = [reads[group[0]] for group in groups]
    rows = pad([read.ids for read in inputs], pad_id, "right")
    wanted = torch.zeros_like(rows.real)
    states = torch.where(rows.real, TokenState.PROMPT, TokenState.PAD)
    for number, read in enumerate(inputs):
        start, stop = len(read.context), len(read.ids)
        states[number, start:stop] = TokenState.COMMITTED
        wanted[number, start - 1 : stop] = True
    # without a mask: padding on the right is out of sight, and unmasked attention is the faster kernel
    unmasked = replace(rows.to(call.device), padded=False)
    weights = None if len(groups) == len(reads) else [len(group) for group in groups]
    with clock.batch([read.item for read in inputs], weights=weights):
        clock.tick(Slot(Phase.LIKELIHOOD), upload(states, call.device))
        logits = call.at(unmasked, upload(wanted.flatten().nonzero().squeeze(-1), call.device))
        starts, start = [0] * len(reads), 0
        for group in groups:
            for place in group:
                starts[place] = start
            start += len(reads[group[0]].tokens)
        places = [first + n for first, read in zip(starts, reads, strict=True) for n in range(len(read.tokens))]
        found, right = pick(logits, places, [token for read in reads for token in read.tokens])
    sizes = [len(read.tokens) for read in reads]
    return list(zip(found.split(sizes), right.split(sizes), strict=True))
