"""The two training losses over packed rows: next token, and masked tokens weighted by one over the masked share."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from dllm_sparsity.pair.making.pack import END_ID, MASK_ID, MOST_PIECES

Batch = dict[str, Tensor]


def attention_bias(segment: Tensor, causal: bool) -> Tensor:
    """Return the additive mask [rows, 1, tokens, tokens] that keeps each segment to itself."""
    allowed = segment[:, :, None] == segment[:, None, :]
    if causal:
        allowed = allowed.tril()
    device = segment.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    return torch.zeros(allowed.shape, dtype=kind, device=segment.device).masked_fill(~allowed, -1e4)[:, None]


def hidden_states(model: PreTrainedModel, ids: Tensor, bias: Tensor, position: Tensor) -> Tensor:
    """Run the body of a Llama model under an explicit attention mask."""
    body = model.model
    hidden = body.embed_tokens(ids)
    rotary = body.rotary_emb(hidden, position)
    for layer in body.layers:
        hidden = layer(hidden, attention_mask=bias, position_embeddings=rotary)
    return body.norm(hidden)


def causal_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the mean next-token loss inside segments, in nats.

    A share of the input tokens, uniform in 0..`noise` for each row, is hidden behind the mask token: with few unique
    tokens this keeps the model from learning them by heart. All next tokens are predicted all the same.
    """
    share = torch.rand(len(batch["ids"]), 1, device=batch["ids"].device) * batch["noise"]
    hidden_input = (torch.rand(batch["ids"].shape, device=share.device) < share) & (batch["segment"] > 0)
    ids = batch["ids"].masked_fill(hidden_input, MASK_ID)
    hidden = hidden_states(model, ids, attention_bias(batch["segment"], True), batch["position"])
    segment = batch["segment"]
    counted = (segment[:, 1:] == segment[:, :-1]) & (segment[:, 1:] > 0)
    logits = model.lm_head(hidden[:, :-1]).flatten(0, 1)
    losses = F.cross_entropy(logits.float(), batch["ids"][:, 1:].flatten(), reduction="none")
    return (losses * counted.flatten()).sum() / counted.sum()


def choose_masked(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the masked positions: in each segment a count uniform in 1..n of its n open positions.

    In four segments of ten all positions are open; in the others a prompt stays as it is: the document's question
    where it has one (four of ten), or a random prefix. An opening end token always stays.

    Returns:
        True where masked, the weight n / count of each position, and the number of open positions.
    """
    segment, position = batch["segment"], batch["position"]
    same = segment[:, :, None] == segment[:, None, :]
    draws = torch.rand(3, segment.shape[0], MOST_PIECES + 1, device=segment.device)
    kind, cut, level = draws.gather(2, segment.expand(3, -1, -1))
    prefix = position < cut * batch["size"]
    question = torch.where(batch["prompt"] > 1, position < batch["prompt"], prefix)
    kept = torch.where(kind < 0.4, False, torch.where(kind < 0.8, question, prefix))
    is_open = (segment > 0) & ~kept & ~((position == 0) & (batch["ids"] == END_ID))
    peers = same & is_open[:, None, :]
    total = peers.sum(-1)
    order = torch.rand(segment.shape, device=segment.device)
    rank = (peers & (order[:, None, :] < order[:, :, None])).sum(-1)
    count = 1 + (level * total).floor().clamp(max=(total - 1).clamp(min=0))
    return is_open & (rank < count), total / count, is_open.sum()


def diffusion_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the mean bound per open token, in nats; logits only where masked, half of the positions at most."""
    masked, weight, num_open = choose_masked(batch)
    canvas = batch["ids"].masked_fill(masked, MASK_ID)
    hidden = hidden_states(model, canvas, attention_bias(batch["segment"], False), batch["position"])
    chosen = masked.flatten().to(torch.uint8).argsort(descending=True)[: masked.numel() // 2]
    logits = model.lm_head(hidden.flatten(0, 1)[chosen])
    losses = F.cross_entropy(logits.float(), batch["ids"].flatten()[chosen], reduction="none")
    return (losses * (weight * masked).flatten()[chosen]).sum() / num_open
