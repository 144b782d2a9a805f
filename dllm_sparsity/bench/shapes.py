"""The shapes that `bench` knows by name: widths and layer counts of published models; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from dllm_sparsity.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Shape:
    """What a model of random weights needs to cost what a published model costs.

    Args:
        form: Model class in transformers, without its ending: `Llama`, `Qwen2`, `Gemma2`.
        hidden: Width of the residual stream and of the site `input`.
        ffn: Width of the sites `gate`, `up` and `intermediate`.
        layers: Layers of the published model.
        heads: Attention heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        vocabulary: Tokens.
        causal: False for a masked-diffusion model, whose attention looks both ways.
        differs: What the shape leaves out of the published model.
    """

    form: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    causal: bool = True
    differs: str = ""


SHAPES = {
    "llama-3.1-8b": Shape("Llama", 4096, 14336, 32, 32, 8, 128, 128256),
    "llada-8b": Shape("Llama", 4096, 12288, 32, 32, 32, 128, 126464, causal=False),
    "qwen2.5-7b": Shape("Qwen2", 3584, 18944, 28, 28, 4, 128, 152064),
    "dream-7b": Shape("Qwen2", 3584, 18944, 28, 28, 4, 128, 152064, causal=False),
    "gemma-2-9b": Shape(
        "Gemma2", 3584, 14336, 42, 16, 8, 256, 256000, differs="attention has no soft cap and no sliding window"
    ),
    "embedded": Shape("Llama", 320, 896, 5, 5, 5, 64, 8192),
}


def find(name: str) -> Shape:
    """Return the shape of a name.

    Args:
        name: As on the command line.

    Raises:
        UserError: There is no such shape.
    """
    if name not in SHAPES:
        raise UserError(f"unknown shape {name!r}{did_you_mean(name, list(SHAPES))}", f"shapes are: {', '.join(SHAPES)}")
    return SHAPES[name]
