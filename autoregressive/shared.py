"""What targets have in common: equal inputs are read once, and a context once for all that continue it."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dllm_sparsity.lm.call import ModelCall, Rows, pad
from dllm_sparsity.lm.items import Target
from dllm_sparsity.sparsity.clock import Clock, Phase, Slot, TokenState
from dllm_sparsity.sparsity.transfer import upload

PAYS = 0.8
"""Shorter forward passes, but more of them, have to save a fifth of the tokens, padding included."""


@dataclass(frozen=True)
class Read:
    """What the model reads of a target; what is too long loses its left end.

    Args:
        item: What it belongs to; counts are shared within one item alone.
        context: Tokens before the first that is scored.
        tokens: Tokens to score; the last is never read.
    """

    item: Hashable
    context: tuple[int, ...]
    tokens: tuple[int, ...]

    @classmethod
    def of(cls, target: Target, max_length: int) -> Read:
        """Return what is read of a target.

        Args:
            target: The target.
            max_length: Longest input.
        """
        ids = (target.context + target.tokens)[-(max_length + 1) :]
        return cls(target.item, tuple(ids[: len(ids) - len(target.tokens)]), tuple(target.tokens))

    @property
    def ids(self) -> list[int]:
        """Tokens of the input."""
        return [*self.context, *self.tokens[:-1]]


def alike(reads: Sequence[Read]) -> list[list[int]]:
    """Return the places of targets with one input, a list for each input.

    Args:
        reads: What is read of each target.
    """
    groups: dict[Hashable, list[int]] = {}
    for place, read in enumerate(reads):
        groups.setdefault((read.item, read.context, read.tokens[:-1]), []).append(place)
    return list(groups.values())


def by_context(reads: Sequence[Read]) -> list[list[int]]:
    """Return the places of an item's targets with one context, a list for each context.

    Args:
        reads: What is read of each target.
    """
    groups: dict[Hashable, list[int]] = {}
    for place, read in enumerate(reads):
        groups.setdefault((read.item, read.context), []).append(place)
    return list(groups.values())


def cost(reads: Sequence[Read], continues: bool) -> tuple[int, bool]:
    """Return how many tokens a batch's forward passes hold, padding included, and whether its contexts are read apart.

    Args:
        reads: What is read of each target.
        continues: Whether the model's cache can be continued by several rows.
    """
    inputs = [reads[group[0]] for group in alike(reads)]
    whole = _rectangle([len(read.ids) for read in inputs])
    if not continues:
        return whole, False
    contexts = [len(reads[group[0]].context) for group in by_context(reads)]
    split = _rectangle(contexts) + _rectangle([len(read.tokens) - 1 for read in inputs if len(read.tokens) > 1])
    return (split, True) if split <= PAYS * whole else (whole, False)


def forwards(reads: Sequence[Read], share: bool, continues: bool) -> list[tuple[list[int], list[int], int]]:
    """Return of each forward pass the tokens of its rows, how many tokens each can see, and positions with logits.

    Args:
        reads: What is read of each target.
        share: Whether rows are shared.
        continues: As in `cost`.
    """
    inputs = [reads[group[0]] for group in alike(reads)] if share else list(reads)
    if not (share and cost(reads, continues)[1]):
        lengths = [len(read.ids) for read in inputs]
        return [(lengths, lengths, sum(len(read.tokens) for read in inputs))]
    contexts = [len(reads[group[0]].context) for group in by_context(reads)]
    longer = [read for read in inputs if len(read.tokens) > 1]
    rests = [len(read.tokens) - 1 for read in longer]
    more = [(rests, [len(read.ids) for read in longer], sum(rests))] if longer else []
    return [(contexts, contexts, len(contexts)), *more]


def _rectangle(lengths: Sequence[int]) -> int:
    return max(lengths, default=0) * len(lengths)


def continues(model: Any) -> bool:
    """Tell whether several rows can continue one cached context: models of transformers with full attention alone.

    Args:
        model: The model.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if not type(model).__module__.startswith("transformers.") or getattr(model, "_is_stateful", False):
        return False
    if not hasattr(model.config, "get_text_config"):
        return False
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def score_continued(call: ModelCall, clock: Clock, reads: Sequence[Read], pad_id: int) -> list[tuple[Tensor, Tensor]]:
    """Read each context once, then what continues it; return log-probabilities and hits of each target's tokens.

    The first token of a target is predicted by the context's last, the others by what continues it. A context counts
    once for each target that it stands for.

    Args:
        call: The model.
        clock: Told of both forward passes.
        reads: What is read of each target.
        pad_id: Id to pad with.
    """
    from transformers import DynamicCache

    groups = by_context(reads)
    owner = {place: number for number, group in enumerate(groups) for place in group}
    firsts = [reads[group[0]] for group in groups]
    rows = pad([list(read.context) for read in firsts], pad_id, "left").to(call.device)
    cache = DynamicCache(config=call.model.config)
    with clock.batch([read.item for read in firsts], weights=[len(group) for group in groups]):
        clock.tick(Slot(Phase.LIKELIHOOD), torch.where(rows.real, TokenState.PROMPT, TokenState.PAD))
        last = torch.full((1,), rows.ids.shape[1] - 1, device=rows.ids.device)
        logits = call(rows, last, cache)[:, -1]
        places = [owner[place] for place in range(len(reads))]
        found, right = pick(logits, places, [read.tokens[0] for read in reads])
    parts = [([found[place : place + 1]], [right[place : place + 1]]) for place in range(len(reads))]
    longer = [group for group in alike(reads) if len(reads[group[0]].tokens) > 1]
    if longer:
        cache.batch_select_indices(torch.tensor([owner[group[0]] for group in longer]))
        own = [[reads[place] for place in group] for group in longer]
        past = _selected(rows, [owner[group[0]] for group in longer])
        more = _continue(call, clock, own, cache, past, pad_id)
        for place, both in zip((place for group in longer for place in group), more, strict=True):
            for mine, new in zip(parts[place], both, strict=True):
                mine.append(new)
    return [(torch.cat(found), torch.cat(right)) for found, right in parts]


def _selected(rows: Rows, numbers: list[int]) -> Tensor | None:
    """Return which cached columns are real tokens, a row for each number; None where all are."""
    return rows.real[upload(torch.tensor(numbers), rows.real.device)] if rows.padded else None


def _continue(
    call: ModelCall, clock: Clock, groups: list[list[Read]], cache: Any, past: Tensor | None, pad_id: int
) -> list[tuple[Tensor, Tensor]]:
    """Read what continues the cached contexts; return what comes of all tokens but the first, by target."""
    rows = pad([list(group[0].tokens[:-1]) for group in groups], pad_id, "right").to(call.device)
    if past is None:
        rows = replace(rows, padded=False)  # padding on the right is out of sight
    lengths = [len(group[0].tokens) - 1 for group in groups]
    with clock.batch([group[0].item for group in groups], weights=[len(group) for group in groups]):
        clock.tick(Slot(Phase.LIKELIHOOD), torch.where(rows.real, TokenState.COMMITTED, TokenState.PAD))
        width = rows.ids.shape[1]
        wanted = [row * width + column for row, length in enumerate(lengths) for column in range(length)]
        logits = call.at(rows, upload(torch.tensor(wanted), rows.ids.device), cache, past)
        starts = [sum(lengths[:row]) for row in range(len(lengths))]
        spans = [
            (start + column, token)
            for start, group in zip(starts, groups, strict=True)
            for read in group
            for column, token in enumerate(read.tokens[1:])
        ]
        found, right = pick(logits, [place for place, _ in spans], [token for _, token in spans])
    sizes = [len(read.tokens) - 1 for group in groups for read in group]
    return list(zip(found.split(sizes), right.split(sizes), strict=True))


def pick(logits: Tensor, places: Sequence[int], tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of tokens, and whether each is the likeliest, on the CPU.

    Args:
        logits: `[rows, vocab]`.
        places: Row of each token.
        tokens: The tokens.
    """
    log = logits.log_softmax(-1, dtype=torch.float32)
    at, wanted = (upload(torch.tensor(list(values)), log.device) for values in (places, tokens))
    return log[at, wanted].cpu(), (log.argmax(-1)[at] == wanted).cpu()
