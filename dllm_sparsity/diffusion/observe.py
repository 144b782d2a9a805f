"""observe(): drive a clock for a denoising loop that somebody else wrote, from the token ids its model sees."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dllm_sparsity.diffusion.following import Follower
from dllm_sparsity.diffusion.view import UNSEEN, View, look, named
from dllm_sparsity.errors import UserError
from dllm_sparsity.sparsity.clock import Clock

if TYPE_CHECKING:
    from torch import Tensor

_OTHER_TOWERS = re.compile(r"vision|visual|audio", re.IGNORECASE)
_ENCODER = re.compile(r"(?:^|[._])encoder[._]")
_EMBEDDED = "a forward pass began with embeddings instead of token ids: the state of its tokens is unknown"


@contextmanager
def observe(
    model: nn.Module,
    mask_token_id: int | None,
    *,
    pad_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> Iterator[Clock]:
    """Drive a clock for a denoising loop; the loop stays as it is.

    Before each forward pass the token ids say what is masked, what was committed since the pass before, and whether a
    new request began; they are looked at once, before the first layer. Where a cache holds a part of the sequence, its
    length, `replace_position` or `position_ids` say which positions the tokens have. So phases are told apart: prefill,
    denoise, commit (a block without masks goes into the cache), correct (a forward pass over a canvas without masks)
    and encode. The second half of a batch, or a forward pass of its own, that is the one before with its prompt masked
    is classifier-free guidance: branch `uncond`. Steps count denoising and correcting forward passes of a request; a
    block is known by the columns that are computed, so without a cache or a growing window there is only block 0.

    Overlap compares a forward pass with the one before of its branch if both see the same positions; else it starts
    anew. Where positions are not known, it is refused, rows count as `unknown`, and `clock.notes` says why.

    Args:
        model: A model with an input embedding that takes token ids.
        mask_token_id: Id of the mask token; None for an encoder and decoder that denoise without one.
        pad_token_id: Id of padding outside the canvas, left out of every count, as is what a `[batch, seq]` attention
            mask leaves out; None where there is no padding.
        eos_token_id: Id of the end token; committed tokens behind it count as `after_eos`.

    Yields:
        The clock, to be given to `sparsify`.

    Raises:
        UserError: The model has no input embedding that can be watched, or there is no mask token and no encoder.

    Example:
        with observe(model, MASK) as clock, sparsify(model, TopP(0.9), "all", clock=clock) as tracker:
            their_generate(model, prompt)
        save_report(tracker.read(), "report.html")
    """
    names = _embeddings(model)
    if mask_token_id is None and not any(_ENCODER.search(name) for name in names):
        raise UserError(
            f"without a mask token, a canvas of {type(model).__name__} is not to be told from its prompt",
            "give mask_token_id, or drive a Clock from the loop: clock.tick(...)",
        )
    follower = Follower(Clock(exact=False), mask_token_id, pad_token_id, eos_token_id)
    handles = [handle for number, name in enumerate(names) for handle in _Stream(model, name, number, follower).watch()]
    try:
        yield follower.clock
        follower.finish()
    finally:
        for handle in handles:
            handle.remove()


def _embeddings(model: nn.Module) -> list[str]:
    """Return the paths of the embeddings that take token ids; an encoder and a decoder may have one each."""
    find: Any = getattr(model, "get_input_embeddings", None)
    first = None if find is None else find()
    if not isinstance(first, nn.Module):
        raise UserError(
            f"{type(model).__name__} has no input embedding to watch", "drive a Clock from the loop: clock.tick(...)"
        )
    modules = dict(model.named_modules())
    path = next(name for name, module in modules.items() if module is first)
    shape = getattr(getattr(first, "weight", None), "shape", None)
    twins = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Embedding) and module is not first and module.weight.shape == shape
    ]
    return [path, *(name for name in twins if name.rpartition(".")[2] == path.rpartition(".")[2])]


class _Stream:
    """One input embedding, the block that comes first behind it, and the modules around both."""

    def __init__(self, model: nn.Module, name: str, number: int, follower: Follower) -> None:
        self._follower, self._number, self._encodes = follower, number, bool(_ENCODER.search(name))
        self._embedding = model.get_submodule(name)
        parts = name.split(".")
        self._around = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
        lists = next((found for module in reversed(self._around) if (found := _block_lists(module))), [])
        self._block = max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))[0] if lists else None
        self._announce: Any = torch.compiler.disable(self._tell)  # the counters are told before compiled code runs
        self._ids: Tensor | None = None
        self._mask: Tensor | None = None

    def watch(self) -> list[RemovableHandle]:
        """Hook all of them; what says most about positions comes last and announces the forward pass."""
        hooks = [(module, self._see_mask) for module in self._around] + [(self._embedding, self._see_ids)]
        if self._block is not None:
            hooks.append((self._block, self._see_block))
        return [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]

    def _see_mask(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        mask = named(module, args, kwargs).get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and not mask.is_floating_point():
            self._mask = mask

    def _see_ids(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        if ids is None or ids.dim() != 2:
            return
        self._ids = ids
        if self._block is None:
            self._announce({}, ids)

    def _see_block(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        self._announce(named(module, args, kwargs), hidden)

    def _tell(self, arguments: dict[str, Any], hidden: Tensor) -> None:
        (ids, self._ids), (mask, self._mask) = (self._ids, None), (self._mask, None)
        if not self._follower.clock.counting:
            return
        if ids is None:
            nothing = torch.full(hidden.shape[:2], UNSEEN)
            self._follower.see(View(nothing, None, hidden.device, unknown=_EMBEDDED))
            return
        self._follower.see(look(ids, arguments, mask, hidden.device, self._number, self._encodes))


def _block_lists(module: nn.Module) -> list[nn.ModuleList]:
    return [
        found
        for name, found in module.named_modules()
        if isinstance(found, nn.ModuleList) and len(found) and not _OTHER_TOWERS.search(name)
    ]
