"""Held-out figures of a twin: per-token likelihood (or its bound) of texts, and accuracy on choice items."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from dllm_sparsity.pair.making.objective import attention_bias, hidden_states
from dllm_sparsity.pair.making.pack import END_ID, MASK_ID, PAD_ID

Pair = tuple[list[int], list[int]]
Row = tuple[list[int], list[bool], float]


def read_items(path: Path, encode: Callable[[str], list[int]], limit: int) -> list[tuple[list[Pair], int]]:
    """Read choice items, or texts as items of one choice after the end token, as pairs of token ids."""
    items = []
    for line in path.read_text(encoding="utf-8").splitlines()[:limit]:
        row = json.loads(line)
        if "text" in row:
            items.append(([([END_ID], encode(row["text"]))], 0))
        else:
            context = encode(row["query"])
            items.append(([(context, encode(f" {choice}")) for choice in row["choices"]], row["gold"]))
    return items


def masked_rows(pair: Pair, counts: int, chance: torch.Generator) -> list[Row]:
    """Return one row for each of the stratified mask counts: the ids, where masked, and the weight n / count."""
    context, target = pair
    size, rows = len(target), []
    for number in range(counts):
        level = (number + torch.rand((), generator=chance).item()) / counts
        masked = 1 + int(level * size)
        chosen = set(torch.randperm(size, generator=chance)[:masked].tolist())
        where = [False] * len(context) + [place in chosen for place in range(size)]
        rows.append((context + target, where, size / masked / counts))
    return rows


@torch.no_grad()
def row_scores(model: PreTrainedModel, rows: Sequence[Row], causal: bool, batch_rows: int = 1024) -> Tensor:
    """Return the weighted log-likelihood of the marked positions of each row."""
    device, scores = model.device, torch.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda number: len(rows[number][0]))
    for first in range(0, len(order), batch_rows):
        chosen = order[first : first + batch_rows]
        width = max(len(rows[number][0]) for number in chosen)
        ids = torch.full((len(chosen), width), PAD_ID)
        where = torch.zeros(len(chosen), width, dtype=torch.bool)
        for place, number in enumerate(chosen):
            ids[place, : len(rows[number][0])] = torch.tensor(rows[number][0])
            where[place, : len(rows[number][1])] = torch.tensor(rows[number][1])
        ids, where = ids.to(device), where.to(device)
        position = torch.arange(width, device=device).expand_as(ids)
        inputs = ids if causal else ids.masked_fill(where, MASK_ID)
        hidden = hidden_states(model, inputs, attention_bias((ids != PAD_ID).long(), causal), position)
        source = hidden[:, :-1][where[:, 1:]] if causal else hidden[where]
        losses = F.cross_entropy(model.lm_head(source).float(), ids[where], reduction="none")
        sums = torch.zeros(len(chosen), device=device).index_add_(0, where.nonzero()[:, 0], losses)
        scores[chosen] = -sums.cpu() * torch.tensor([rows[number][2] for number in chosen])
    return scores


def per_token(model: PreTrainedModel, pairs: Sequence[Pair], causal: bool, counts: int) -> Tensor:
    """Return the log-likelihood per target token of each pair; its bound where the model is not causal."""
    if causal:
        rows = [(context + target, [False] * len(context) + [True] * len(target), 1.0) for context, target in pairs]
        totals = row_scores(model, rows, causal)
    else:
        chance = torch.Generator().manual_seed(0)
        rows = [row for pair in pairs for row in masked_rows(pair, counts, chance)]
        totals = row_scores(model, rows, causal).view(len(pairs), counts).sum(1)
    return totals / torch.tensor([len(target) for _, target in pairs])


def evaluate(model: PreTrainedModel, items: list[tuple[list[Pair], int]], causal: bool, counts: int) -> Tensor:
    """Return for each item whether the gold choice has the best score per token; for texts, the loss per token."""
    scores = per_token(model, [pair for pairs, _ in items for pair in pairs], causal, counts)
    if len(items[0][0]) == 1:
        return -scores
    gold = torch.tensor([item[1] for item in items])
    return (scores.view(len(items), -1).argmax(1) == gold).float()
