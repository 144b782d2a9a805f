"""Tiny models for the stand-in loops: one in LLaDA's form with caches of its own, stock ones, and a cache that gathers."""

from __future__ import annotations

from types import SimpleNamespace

import tiny
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Qwen3Config


class Block(nn.Module):
    def __init__(self, wide=32, inner=64, heads=4):
        super().__init__()
        self.heads, self.act = heads, nn.SiLU()
        self.attn_norm, self.ff_norm = nn.RMSNorm(wide), nn.RMSNorm(wide)
        self.att_proj, self.attn_out = nn.Linear(wide, 3 * wide, bias=False), nn.Linear(wide, wide, bias=False)
        self.ff_proj, self.up_proj = nn.Linear(wide, inner, bias=False), nn.Linear(wide, inner, bias=False)
        self.ff_out = nn.Linear(inner, wide, bias=False)

    def attend(self, x, layer_past=None, replace_position=None):
        q, k, v = self.att_proj(self.attn_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        place = torch.arange(x.shape[1])
        if replace_position is not None:
            place = replace_position[0].nonzero().squeeze(-1)
        elif layer_past is not None:
            place = place + layer_past[0].shape[-2]
        angle = torch.outer(place, 1e4 ** (-torch.arange(0, q.shape[-1], 2) / q.shape[-1])).repeat(1, 2)

        def turn(heads):
            first, second = heads.chunk(2, dim=-1)
            return heads * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()

        q, k = turn(q), turn(k)
        if replace_position is not None:
            old = [tensor.clone() for tensor in layer_past]
            old[0][:, :, place], old[1][:, :, place] = k, v
            k, v = old
        elif layer_past is not None:
            k, v = (torch.cat(pair, dim=-2) for pair in zip(layer_past, (k, v), strict=True))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.attn_out(mixed.transpose(1, 2).flatten(2)), (k, v)

    def feed(self, x):
        return self.ff_out(self.act(self.ff_proj(x)) * self.up_proj(x))

    def forward(self, x, layer_past=None, use_cache=False, replace_position=None):
        x, past = self.attend(x, layer_past, replace_position)
        return x + self.feed(self.ff_norm(x)), past if use_cache else None


class Backbone(nn.Module):
    def __init__(self, layers):
        super().__init__()
        parts = {"wte": nn.Embedding(100, 32), "ln_f": nn.RMSNorm(32), "ff_out": nn.Linear(32, 100, bias=False)}
        self.transformer = nn.ModuleDict({**parts, "blocks": nn.ModuleList(Block() for _ in range(layers))})

    def forward(self, input_ids, past_key_values=None, use_cache=False, replace_position=None):
        x, kept = self.transformer.wte(input_ids), []
        for number, block in enumerate(self.transformer.blocks):
            past = None if past_key_values is None else past_key_values[number]
            x, new = block(x, layer_past=past, use_cache=use_cache, replace_position=replace_position)
            kept.append(new)
        logits = self.transformer.ff_out(self.transformer.ln_f(x))
        return SimpleNamespace(logits=logits, past_key_values=kept if use_cache else None)


class Blocks(nn.Module):
    """A model in the form of LLaDA's, with the caches of Fast-dLLM; the backbone's own hooks never fire."""

    def __init__(self, layers=2):
        super().__init__()
        self.model = Backbone(layers)

    def get_input_embeddings(self):
        return self.model.transformer.wte

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False, replace_position=None):
        del attention_mask
        return self.model.forward(input_ids, past_key_values, use_cache, replace_position)


def blocks(layers=2, seed=0):
    model = tiny.randomize(Blocks(layers), seed=seed)
    with torch.no_grad():
        model.model.transformer.ff_out.weight[tiny.MASK] = 0
    return model


def qwen3(seed=0):
    model = tiny.randomize(AutoModelForCausalLM.from_config(Qwen3Config(**tiny.SHAPE)), seed=seed)
    with torch.no_grad():
        model.lm_head.weight[tiny.MASK] = 0
    return model


def gather_tokens(model, prompt_width, every=4):
    """Make all layers but the first compute some tokens' FFN only, and take the others' from a cache of outputs.

    Everything is computed anew each `every` steps, all behind the prompt half way between, and else the two tokens of
    each row whose input changed most.
    """
    for block in model.model.transformer.blocks[1:]:
        memory = {"step": 0}

        def forward(x, layer_past=None, use_cache=False, replace_position=None, block=block, memory=memory):
            x, _ = block.attend(x)
            normed, turn = block.ff_norm(x), memory["step"] % every
            memory["step"] += 1
            if turn == 0:
                memory["output"], memory["input"] = block.feed(normed), normed
            else:
                alike = F.cosine_similarity(normed, memory["input"], dim=-1)
                place = (-alike).topk(2, dim=-1).indices
                if turn == every // 2:
                    place = torch.arange(prompt_width, x.shape[1]).expand(len(x), -1)
                place = place.unsqueeze(-1).expand(-1, -1, x.shape[-1])
                memory["input"] = memory["input"].scatter(1, place, normed.gather(1, place))
                memory["output"] = memory["output"].scatter(1, place, block.feed(normed.gather(1, place)))
            return x + memory["output"], None

        block.forward = forward
    return model
