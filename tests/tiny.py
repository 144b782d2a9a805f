"""Tiny random models and a character tokenizer for tests; nothing is downloaded."""

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

SPECIAL = ["<pad>", "<bos>", "<eos>", "<mask>", "<unk>"]
PAD, BOS, EOS, MASK = 0, 1, 2, 3
SHAPE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def tokenizer():
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *map(chr, range(32, 127))])}
    inner = Tokenizer(token_models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "mask_token", "unk_token"), SPECIAL, strict=True))
    made = PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **names)
    made.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return made


def randomize(model, std=0.3, seed=0):
    """Give weights a spread that makes predictions differ; the default initialisation hardly does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def llama(causal=True, seed=0, forbid_mask=False, **changes):
    config = LlamaConfig(**{**SHAPE, **changes})
    if not causal:
        config.is_causal = False
    model = randomize(AutoModelForCausalLM.from_config(config), seed=seed)
    if forbid_mask:  # a random model would commit the mask token; a trained one does not
        with torch.no_grad():
            model.lm_head.weight[MASK] = 0
    return model


def causal_lm(name):
    """A tiny causal model of another form than Llama's, or llama."""
    configs = {
        "qwen3": Qwen3Config(**SHAPE),
        "gemma3": Gemma3TextConfig(**SHAPE, sliding_window=8),
        "gpt2": GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2),
        "opt": OPTConfig(
            vocab_size=100, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=32, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    }  # fmt: skip
    return llama() if name == "llama" else randomize(AutoModelForCausalLM.from_config(configs[name]))
