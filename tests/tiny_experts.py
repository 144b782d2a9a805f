"""Tiny models with experts: those of transformers from a config, those of remote code as stand-ins of their form."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch
from tiny_families import LAYERS, VOCAB, WIDTH
from torch import nn

EXPERTS, TOP, EXPERT_FFN = 4, 2, 16
FUSED = ("qwen3_moe", "olmoe", "mixtral", "gpt_oss")
LISTS = ("llada_moe", "llada2")


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, width, bias=False), nn.Linear(WIDTH, width, bias=False)
        self.down_proj, self.act_fn = nn.Linear(width, WIDTH, bias=False), nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Routed(nn.Module):
    """Experts as a list. `sorted_calls`: all tokens of an expert in the order of a sort, as LLaDA2 has it."""

    def __init__(self, sorted_calls: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Mlp(EXPERT_FFN) for _ in range(EXPERTS))
        self.sorted_calls = sorted_calls
        if sorted_calls:
            self.shared_experts = Mlp(EXPERT_FFN)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.view(-1, WIDTH)
        weight, chosen = self.gate(rows).softmax(-1).topk(TOP, -1)
        out = torch.zeros_like(rows)
        if self.sorted_calls:
            flat = chosen.flatten()
            order = flat.argsort()
            sizes = torch.bincount(flat, minlength=EXPERTS).tolist()
            made, start = [], 0
            for expert, size in zip(self.experts, sizes, strict=True):
                if size:
                    made.append(expert(rows[order[start : start + size] // TOP]))
                start += size
            each = rows.new_empty(len(flat), WIDTH).index_copy(0, order, torch.cat(made))
            out = (each.view(-1, TOP, WIDTH) * weight.unsqueeze(-1)).sum(1) + self.shared_experts(rows)
        else:
            for number, expert in enumerate(self.experts):
                token, rank = torch.where(chosen == number)
                if len(token):
                    out.index_add_(0, token, expert(rows[token]) * weight[token, rank, None])
        return out.view(hidden.shape)


class Layer(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.mix = mlp, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.softmax(x @ x.mT, -1) @ self.mix(x)
        return x + self.mlp(x)


class ListForm(nn.Module):
    """Both kinds mix dense and expert layers."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.wte, self.lm_head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        mlps = [Mlp(EXPERT_FFN * 2), *(Routed(name == "llada2") for _ in range(LAYERS - 1))]
        self.layers = nn.ModuleList(Layer(mlp) for mlp in mlps)

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def forward(self, input_ids: torch.Tensor) -> object:
        x = self.wte(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.lm_head(x))


@cache
def tiny_moe(name: str) -> nn.Module:
    """Return a tiny model with experts; shared by the whole session, so tests must leave it as it was."""
    import transformers as hf

    torch.manual_seed(sum(name.encode()))
    if name in LISTS:
        return ListForm(name).eval()
    small = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": TOP,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    configs = {
        "qwen3_moe": lambda: hf.Qwen3MoeConfig(
            **small, num_experts=EXPERTS, moe_intermediate_size=EXPERT_FFN, head_dim=8
        ),
        "olmoe": lambda: hf.OlmoeConfig(**small, num_experts=EXPERTS, intermediate_size=EXPERT_FFN),
        "mixtral": lambda: hf.MixtralConfig(**small, num_local_experts=EXPERTS, intermediate_size=EXPERT_FFN),
        "gpt_oss": lambda: hf.GptOssConfig(
            **small, num_local_experts=EXPERTS, intermediate_size=EXPERT_FFN, head_dim=8, sliding_window=8
        ),
    }
    model = hf.AutoModelForCausalLM.from_config(configs[name]()).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # a spread that routes tokens apart
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model
