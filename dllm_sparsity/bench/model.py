"""Builds models of random weights, and copies of their modules that share these weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface

from dllm_sparsity.bench.shapes import Shape

_ATTENTION = "dllm_sparsity_bench"
_SEED = 0


def build(shape: Shape, layers: int, dtype: torch.dtype, device: torch.device, head: bool) -> nn.Module:
    """Return a model of random weights, made where and as it is used.

    Args:
        shape: Its widths.
        layers: Its layers.
        dtype: Of the weights.
        device: Where they are.
        head: Whether it has an LM head, which costs as much as several layers.
    """
    AttentionInterface.register(_ATTENTION, attend)
    config = getattr(transformers, f"{shape.form}Config")(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
    )
    config.is_causal = shape.causal
    kind = transformers.AutoModelForCausalLM if head else transformers.AutoModel
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(_SEED)
        return kind.from_config(config, dtype=dtype, attn_implementation=_ATTENTION).eval()


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attend without a mask tensor, for sequences without padding.

    Under transformers' own `sdpa` a forward pass waits for the device to look at its positions, and one that is being
    captured builds a mask; then attention falls back to a slower kernel, and dense would look slower than it is.

    Args:
        module: The attention layer.
        query: `[batch, heads, tokens, head_dim]`.
        key: As `query`, with the key heads.
        value: As `key`.
        attention_mask: Not used.
        scaling: What scores are multiplied by.
        rest: What other forms of attention need.
    """
    causal = getattr(module.config, "is_causal", True) and query.shape[2] > 1
    attended = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=causal, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return attended.transpose(1, 2).contiguous(), None


def share(model: nn.Module) -> nn.Module:
    """Return a copy of a model's modules over the same weights; hooks on it leave the model alone.

    Args:
        model: Without hooks.
    """
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(weight): weight for weight in weights})
