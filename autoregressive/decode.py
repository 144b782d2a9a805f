"""Autoregressive decoding as a generator: one yield for each forward pass, prefill first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dllm_sparsity.lm.call import ModelCall, Rows, pad
from dllm_sparsity.sparsity.clock import Clock, Compare, Phase, Slot, TokenState
from dllm_sparsity.sparsity.transfer import Download, upload


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; greedy at temperature 0.

    Args:
        temperature: Divides the logits; 0 is greedy.
        top_k: Candidates kept; 0 keeps all.
        top_p: Probability mass of the candidates kept; 1 keeps all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def choose(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Choose one token a row.

        Args:
            logits: `[batch, vocab]`.
            generators: One a row, so that a row's draw does not depend on its batch.
        """
        if self.temperature == 0.0:
            return logits.argmax(-1)
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        scores: Any = logits.float() / self.temperature
        if self.top_k:
            scores = TopKLogitsWarper(self.top_k)(None, scores)
        if self.top_p < 1.0:
            scores = TopPLogitsWarper(self.top_p)(None, scores)
        chances = Download(scores.softmax(-1)).wait()  # a row's own generator is on the CPU
        drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(chances, generators, strict=True)]
        return upload(torch.cat(drawn), logits.device)


@torch.no_grad()
def decode(
    call: ModelCall,
    clock: Clock,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    pad_id: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    finished: Callable[[], Sequence[bool]],
) -> Iterator[Tensor]:
    """Yield the token that each row gets, once for each forward pass.

    The caller wraps this in `clock.batch` and says which rows are finished; they run on, as `after_eos`, until it
    stops iterating. Overlap between decode steps compares two different tokens.

    Args:
        call: The model.
        clock: Told of every forward pass.
        prompts: Token ids.
        max_new_tokens: Forward passes at most.
        pad_id: Id to pad with on the left.
        sampling: How tokens are chosen.
        generators: One a row.
        finished: Called before each decode step; True for rows that are done.
    """
    from transformers import DynamicCache

    rows = pad(prompts, pad_id, "left").to(call.device)
    cache = DynamicCache(config=call.model.config)
    clock.tick(Slot(Phase.PREFILL), torch.where(rows.real, TokenState.PROMPT, TokenState.PAD))
    last = torch.full((1,), rows.ids.shape[1] - 1, device=rows.ids.device)
    token = sampling.choose(call(rows, last, cache)[:, -1], generators)
    yield token
    past, first = rows.real, torch.zeros(1, dtype=torch.long, device=rows.ids.device)
    for step in range(max_new_tokens - 1):
        done = upload(torch.tensor(list(finished())), token.device).unsqueeze(-1)
        states = torch.where(done, TokenState.AFTER_EOS, TokenState.COMMITTED_NOW)
        clock.tick(Slot(Phase.DECODE, step=step), states, Compare.PREVIOUS if step else Compare.START)
        new = Rows(token.unsqueeze(-1), torch.ones_like(done), padded=False)
        token = sampling.choose(call(new, first, cache, past if rows.padded else None)[:, -1], generators)
        past = torch.cat([past, new.real], dim=1)
        yield token
