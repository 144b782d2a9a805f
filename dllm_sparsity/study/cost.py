"""What forward passes cost, from a model's structure alone: FLOPs, and estimates of memory and disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dllm_sparsity.sparsity.sites import FFN
from dllm_sparsity.study.workload import Workload

_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_top_k")
_RULE_BYTES = 20
"""A rule's work on one activation: its score in float32, sorted with its place, and summed."""
_SMALL_FILES = 20_000
_ITEM_BYTES, _TEXT_BYTES, _STEP_BYTES = 180, 3, 12  # compressed; measured on sealed cells of 1,000 items


@dataclass(frozen=True)
class Costs:
    """What one token costs a model.

    Args:
        ffn: FLOPs of all FFNs for a token; None where it is not known how many experts a token passes.
        rest: FLOPs of its other matrices for a token, without the head.
        head: FLOPs of the head for a position that gets logits.
        pair: FLOPs of attention for a token and one that it attends to; half of these are skipped by causal kernels.
        weights: Bytes of the weights.
        token: Bytes of the activations that live at once, for a token.
        logits: Bytes for a position that gets logits.
        cached: Bytes of a token in the cache.
        layers: Layers with an FFN.
    """

    ffn: float | None
    rest: float
    head: float
    pair: float
    weights: int
    token: int
    logits: int
    cached: int
    layers: int

    def flops(self, work: Workload) -> tuple[float, float] | None:
        """Return FLOPs of the FFNs and of the whole model for some work; None where they are not known.

        Args:
            work: Forward passes.
        """
        if self.ffn is None:
            return None
        ffn = self.ffn * work.tokens
        return ffn, ffn + self.rest * work.tokens + self.head * work.scored + self.pair * work.pairs

    def peak_bytes(self, work: Workload) -> int:
        """Estimate the memory that the largest call takes, weights included.

        Args:
            work: Forward passes.
        """
        live = self.token * work.most_tokens + self.logits * work.most_scored + self.cached * work.most_cached
        return self.weights + live


def costs(model: nn.Module, ffns: Sequence[FFN], fields: dict[str, Any], size: int, rules: bool = True) -> Costs:
    """Return what a token costs.

    Args:
        model: The model, on any device; the meta device will do.
        ffns: Its FFNs.
        fields: Its configuration.
        size: Bytes of one number of its dtype.
        rules: Whether a rule will act on it.
    """
    text = fields.get("text_config") or fields
    active = next((text[name] for name in _EXPERTS_PER_TOKEN if isinstance(text.get(name), int)), None)
    table: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    vocabulary, width = table.weight.shape
    own = [(3 if ffn.gated else 2) * ffn.d_model * ffn.d_ffn for ffn in ffns]
    known = all(not ffn.experts for ffn in ffns) or active is not None
    met = sum(n * (min(active or 0, ffn.experts) if ffn.experts else 1) for n, ffn in zip(own, ffns, strict=True))
    held = sum(n * max(1, ffn.experts) for n, ffn in zip(own, ffns, strict=True))
    matrices = sum(p.numel() for p in model.parameters() if p.dim() >= 2)
    tables = vocabulary * width * (1 if _is_tied(model, table) else 2)
    heads = text.get("num_attention_heads") or text.get("n_heads") or text.get("n_head") or 0
    per_head = text.get("head_dim") or (width // heads if heads else 0)
    kv = text.get("num_key_value_heads") or text.get("n_kv_heads") or heads
    layers = len({ffn.layer for ffn in ffns})
    widest = max(max(ffn.d_model, ffn.d_ffn) for ffn in ffns)
    return Costs(
        ffn=2.0 * met if known else None,
        rest=2.0 * max(0, matrices - tables - held),
        head=2.0 * vocabulary * width,
        pair=4.0 * layers * heads * per_head,
        weights=sum(parameter.numel() for parameter in model.parameters()) * size,
        token=size * (4 * width + 3 * max(ffn.d_ffn for ffn in ffns)) + (_RULE_BYTES * widest if rules else 0),
        logits=vocabulary * (size + 4),
        cached=2 * layers * kv * per_head * size,
        layers=layers,
    )


def disk_bytes(work: Workload, layers: int, sites: int) -> int:
    """Estimate what a sealed cell takes on disk.

    Args:
        work: Its forward passes.
        layers: Layers with an FFN.
        sites: Sites that are recorded.
    """
    answers = work.items * work.steps * _TEXT_BYTES
    steps = max(1, work.steps) * layers * sites * 3 * _STEP_BYTES  # about three token states in a step
    return _SMALL_FILES + work.items * _ITEM_BYTES + answers + steps


def _is_tied(model: nn.Module, table: nn.Module) -> bool:
    """Tell whether head and embedding are one matrix; parameters() gives a shared one once."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # pyright: ignore[reportCallIssue]
    if not isinstance(head, nn.Module):
        shape = table.weight.shape
        return sum(p.shape == shape for p in model.parameters()) == 1
    return head.weight is table.weight
