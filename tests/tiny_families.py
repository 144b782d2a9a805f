"""Tiny random models of every family, built from a config and never downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tiny import randomize
from torch import nn

WIDTH, FFN, LAYERS, VOCAB = 32, 64, 2, 100
CANVAS = 8
GATED = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "modernbert", "llada")
PLAIN = ("gpt2", "gpt_neox", "opt", "bert")
FAMILIES = (*GATED, *PLAIN)


class LladaBlock(nn.Module):
    """A block in the form of LLaDA's: the FFN's linears are the block's own children."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_norm, self.ff_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q_proj, self.attn_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.ff_proj, self.up_proj = nn.Linear(WIDTH, FFN), nn.Linear(WIDTH, FFN)
        self.ff_out, self.act = nn.Linear(FFN, WIDTH), nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.q_proj(self.attn_norm(x))
        x = x + self.attn_out(torch.softmax(mixed @ mixed.mT, -1) @ mixed)
        normed = self.ff_norm(x)
        return x + self.ff_out(self.act(self.ff_proj(normed)) * self.up_proj(normed))


class LladaForm(nn.Module):
    """Embedding, blocks and head, with the arguments and the output of a transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(LladaBlock() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCAB)

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def forward(self, input_ids: torch.Tensor) -> object:
        from types import SimpleNamespace

        x = self.wte(input_ids)
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(logits=self.head(x))


def _config(name: str) -> object:
    import transformers as hf

    heads = {"num_hidden_layers": LAYERS, "num_attention_heads": 4}
    plain = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": FFN, **heads}
    small = {**plain, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    made: dict[str, Callable[[], object]] = {
        "llama": lambda: hf.LlamaConfig(**small),
        "qwen2": lambda: hf.Qwen2Config(**small),
        "qwen3": lambda: hf.Qwen3Config(**small),
        "mistral": lambda: hf.MistralConfig(**small),
        "gemma2": lambda: hf.Gemma2Config(**small),
        "gemma3": lambda: hf.Gemma3TextConfig(**small),
        "phi3": lambda: hf.Phi3Config(**small, pad_token_id=0),
        "gpt2": lambda: hf.GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_inner=FFN, n_layer=LAYERS, n_head=4),
        "gpt_neox": lambda: hf.GPTNeoXConfig(**plain),
        "opt": lambda: hf.OPTConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, ffn_dim=FFN, word_embed_proj_dim=WIDTH, **heads
        ),
        "bert": lambda: hf.BertConfig(**plain),
        "modernbert": lambda: hf.ModernBertConfig(**plain, **ids),
        "qwen3_moe": lambda: hf.Qwen3MoeConfig(**small, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    }
    return made[name]()


@cache
def tiny_model(name: str) -> nn.Module:
    """Return the tiny model of a family; shared by the whole session, so tests must leave it as it was."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    torch.manual_seed(sum(name.encode()))
    if name == "llada":
        return LladaForm().eval()
    auto = AutoModelForMaskedLM if name in ("bert", "modernbert") else AutoModelForCausalLM
    return auto.from_config(_config(name)).eval()


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return a model's logits without gradients."""
    with torch.no_grad():
        return model(input_ids=ids).logits


def hooks(model: nn.Module) -> int:
    """Count the hooks on a model's modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def diffusion_gemma() -> nn.Module:
    """Random weights; text only, but the image token's id has to be one of the vocabulary."""
    import transformers as hf

    text = hf.DiffusionGemmaTextConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, global_head_dim=8, num_global_key_value_heads=2, sliding_window=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"], num_experts=4, top_k_experts=2,
        moe_intermediate_size=16, max_position_embeddings=256, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    vision = hf.Gemma4VisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    ids = {"image_token_id": 99, "boi_token_id": 98, "eoi_token_id": 97}
    config = hf.DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=CANVAS, **ids)
    return randomize(hf.DiffusionGemmaForBlockDiffusion(config), std=0.4)
