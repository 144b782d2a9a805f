"""What one forward pass of a model sees, read from its token ids and from what its first block is called with."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor

UNSEEN = -1
"""Stands for an id that nobody saw."""
_CACHES = ("past_key_values", "past_key_value", "layer_past", "layers_past", "past", "kv_cache", "cache")
_UNREADABLE = (
    "the length of a {} cannot be read: positions are unknown, so overlap is off, and only masks are told apart"
)


@dataclass(frozen=True)
class View:
    """What one forward pass of a model sees.

    Args:
        ids: Token ids, on the host.
        columns: Place of each token in its sequence, on the host; None where it cannot be known.
        device: Where the model is.
        partial: Whether a cache holds other tokens of these sequences.
        idle: True where the attention mask leaves a token out; None without such a mask.
        stream: Number of the input embedding; an encoder and a decoder have one each.
        encodes: Whether that is an encoder's.
        cache: The loop's cache, if there is one.
        unknown: Why `columns` is None.
    """

    ids: Int[Tensor, "batch seq"]
    columns: Int[Tensor, "batch seq"] | None
    device: torch.device
    partial: bool = False
    idle: Bool[Tensor, "batch seq"] | None = None
    stream: int = 0
    encodes: bool = False
    cache: Any = None
    unknown: str = ""

    @property
    def places(self) -> Int[Tensor, "batch seq"]:
        """Columns, where they are known."""
        return cast("Tensor", self.columns)

    def half(self, number: int) -> View:
        """Return one half of the batch.

        Args:
            number: 0 or 1.
        """
        idle = None if self.idle is None else self.idle.chunk(2)[number]
        return replace(self, ids=self.ids.chunk(2)[number], columns=self.places.chunk(2)[number], idle=idle)


def look(
    ids: Int[Tensor, "batch seq"],
    arguments: dict[str, Any],
    mask: Tensor | None,
    device: torch.device,
    stream: int,
    encodes: bool,
) -> View:
    """Return what a forward pass sees; the one look at the device.

    Args:
        ids: Token ids.
        arguments: What the first block is called with, by name.
        mask: An attention mask over columns, if there is one.
        device: As in `View`.
        stream: As in `View`.
        encodes: As in `View`.
    """
    seen = ids.detach().cpu().long()
    columns, partial, unknown = _columns(arguments, *seen.shape)
    idle = _idle(mask, columns)
    return View(seen, columns, device, partial, idle, stream, encodes, _cache(arguments)[1], unknown)


def named(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a module's forward by name.

    Args:
        module: The module.
        args: Positional arguments of a call.
        kwargs: Its other arguments.
    """
    try:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return kwargs
    return {**bound, **kwargs}


def _cache(arguments: dict[str, Any]) -> tuple[str, Any]:
    return next(((name, arguments[name]) for name in _CACHES if arguments.get(name) is not None), ("", None))


def _columns(arguments: dict[str, Any], batch: int, seq: int) -> tuple[Tensor | None, bool, str]:
    """Return each token's column, whether a cache holds other columns, and why columns are unknown."""
    replaced = arguments.get("replace_position")
    if isinstance(replaced, torch.Tensor) and replaced.any():
        place = replaced.detach().cpu().bool().nonzero()
        if len(place) in (seq, batch * seq):
            return place[:, -1].view(-1, seq).expand(batch, seq).contiguous(), True, ""
    name, cache = _cache(arguments)
    length = _length(cache)
    if length is None:
        return None, True, _UNREADABLE.format(f"{name} of type {type(cache).__name__}")
    columns = torch.arange(length, length + seq).repeat(batch, 1)
    given = arguments.get("position_ids")
    if length == 0 and isinstance(given, torch.Tensor) and given.shape[-1] == seq and given.dim() == 2:
        rows = given.detach().cpu().long()
        if (rows == rows[:1]).all() and (rows[0].diff() == 1).all() and rows[0, 0] > 0:
            return rows[:1].repeat(batch, 1), True, ""
    return columns, length > 0, ""


def _length(cache: Any) -> int | None:
    """Return how many columns a cache holds, or None where it does not say."""
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    while isinstance(cache, list | tuple) and cache:
        cache = cache[0]
    if isinstance(cache, torch.Tensor):
        return cache.shape[-2] if cache.dim() > 2 else None
    return None if cache else 0


def _idle(mask: Tensor | None, columns: Tensor | None) -> Tensor | None:
    """Return where an attention mask leaves out the tokens of these columns."""
    if mask is None or columns is None or len(mask) not in (1, len(columns)):
        return None
    left_out = (mask.detach().cpu() == 0).expand(len(columns), -1)
    if left_out.shape[1] == columns.shape[1]:
        return left_out
    return left_out.gather(1, columns) if left_out.shape[1] > int(columns.max()) else None
