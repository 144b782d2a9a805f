"""Which tokens a model lets see which, and how a model trained block by block is made to see as in training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dllm_sparsity.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

_BLOCK_TRAINED = ("llada2", "sdar")
_WORDS = {"full": "sees all tokens", "causal": "sees only earlier tokens", "refused": "refuses the mask"}


class AttentionMaskWarning(UserWarning):
    """A model is run with another attention mask than it was trained with."""


def is_block_trained(model: nn.Module) -> bool:
    """Tell whether a model was trained to see its own and earlier blocks; nothing in its form says so, its names do.

    Args:
        model: A transformers model.
    """
    config = getattr(model, "config", None)
    names = f"{type(model).__name__} {getattr(config, 'model_type', '')}".lower().replace("_", "")
    return any(name in names for name in _BLOCK_TRAINED) or isinstance(getattr(config, "block_length", None), int)


@torch.no_grad()
def attention_regime(model: nn.Module, block_length: int, *, tail: bool = False) -> str:
    """Find out, by changing tokens of two blocks, what a model makes of a 2-D attention mask.

    Args:
        model: A model that takes `input_ids`, `attention_mask` and `position_ids`.
        block_length: Tokens of a block; 2 or more.
        tail: Whether the mask hides the last token, as where a text does not fill its last block.

    Returns:
        `full`, `causal`, `block_causal`, or `refused` where the model raises.
    """
    weight: Any = model.get_input_embeddings().weight  # pyright: ignore[reportCallIssue]
    length = 2 * block_length
    ids = (torch.arange(length, device=weight.device) % (weight.shape[0] - 1)).unsqueeze(0)
    mask, positions = torch.ones_like(ids), torch.arange(length, device=ids.device).unsqueeze(0)
    last = length - 1 - int(tail)
    mask[:, last + 1 :] = 0

    def first(changed: int | None) -> Tensor:
        there = ids.clone()
        if changed is not None:
            there[:, changed] = weight.shape[0] - 1
        return model(there, attention_mask=mask, position_ids=positions).logits[:, 0].float()

    try:
        plain = first(None)
        near, far = (bool((first(n) - plain).abs().max() > 1e-6 * plain.abs().max()) for n in (block_length - 1, last))
    except (ValueError, RuntimeError, TypeError):
        return "refused"
    return "full" if far else "block_causal" if near else "causal"


def warn_of_mask(model: nn.Module, block_length: int) -> list[str]:
    """Warn where a model trained block by block would see otherwise under the 2-D masks of a pipeline.

    Args:
        model: The model, with its hooks; `block_causal_mask` must be on already to be seen.
        block_length: Tokens of a block.

    Returns:
        What was said, as notes.
    """
    if not is_block_trained(model) or block_length < 2:
        return []
    whole, part = attention_regime(model, block_length), attention_regime(model, block_length, tail=True)
    if whole == part == "block_causal":
        return []
    words = [_WORDS.get(regime, "sees its own and earlier blocks") for regime in (whole, part)]
    note = (
        f"attention is not as in training: {type(model).__name__} was trained to see its own and earlier blocks; with "
        f"the pipeline's 2-D mask it {words[0]}, and it {words[1]} where the mask has zeros (padding, or a last block "
        f"that is not full). Mend it with: block_causal_mask(pipe.model, {block_length})"
    )
    warnings.warn(note, AttentionMaskWarning, stacklevel=4)
    return [note]


@contextmanager
def block_causal_mask(model: nn.Module, block_length: int, *, open_tail: bool = True) -> Iterator[None]:
    """Turn 2-D attention masks into 4-D additive ones in which a token sees its own and earlier blocks.

    Blocks are counted from position 0. The diagonal stays open, so that no row is hidden from everything.

    Args:
        model: A model without a cache that takes `attention_mask` by name and adds a 4-D one to its scores.
        block_length: Tokens of a block.
        open_tail: Whether zeros behind the last one count as masked tokens, not as padding: a pipeline hides what
            lies behind the wanted length, but a model denoises its last block whole.

    Raises:
        UserError: A block length below 1, or a forward pass that continues a cache.

    Example:
        with block_causal_mask(pipe.model, 32), pipeline_clock(pipe) as clock:
            pipe(prompt)
    """
    if block_length < 1:
        raise UserError(
            f"block length {block_length} is not positive", "give the block length the model was trained with"
        )

    def mend(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return None
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is not None and ids.shape[1] != mask.shape[1]:
            raise UserError("a forward pass that continues a cache", "block_causal_mask is for loops without a cache")
        dtype = next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
        return args, {**kwargs, "attention_mask": _block_causal(mask, block_length, open_tail, dtype)}

    handle = model.register_forward_pre_hook(mend, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _block_causal(
    mask: Int[Tensor, "batch seq"], block_length: int, open_tail: bool, dtype: torch.dtype
) -> Float[Tensor, "batch one seq seq"]:
    real = mask.bool()
    if open_tail:
        real = real | (real.flip(-1).long().cumsum(-1).flip(-1) == 0)  # nothing real at or behind it
    place = torch.arange(mask.shape[1], device=mask.device)
    block = place // block_length
    seen = (block <= block.unsqueeze(-1)) & real.unsqueeze(1) | (place == place.unsqueeze(-1))
    lowest = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(~seen, lowest).unsqueeze(1)
