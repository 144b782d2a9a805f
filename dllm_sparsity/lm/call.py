"""Call any transformers model with padded token rows, and get logits for the positions that are asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dllm_sparsity.sparsity.hooks import runs_on
from dllm_sparsity.sparsity.transfer import upload

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Token rows of unequal length, padded to one rectangle.

    Args:
        ids: Token ids.
        real: False at padding.
        padded: Whether there is any; known to the host, so that nobody asks the device.
    """

    ids: Int[Tensor, "batch seq"]
    real: Bool[Tensor, "batch seq"]
    padded: bool

    def to(self, device: torch.device) -> Rows:
        """Return the rows on another device.

        Args:
            device: Where they go.
        """
        return replace(self, ids=upload(self.ids, device), real=upload(self.real, device))


def pad(rows: Sequence[Sequence[int]], fill: int, side: str) -> Rows:
    """Pad rows of token ids to the longest of them, on the CPU.

    Args:
        rows: Token ids.
        fill: Id to pad with.
        side: `left` or `right`.
    """
    width = max(map(len, rows))
    gaps = [width - len(row) for row in rows]
    if side == "left":
        ids = [[fill] * gap + list(row) for gap, row in zip(gaps, rows, strict=True)]
        real = [[False] * gap + [True] * (width - gap) for gap in gaps]
    else:
        ids = [list(row) + [fill] * gap for gap, row in zip(gaps, rows, strict=True)]
        real = [[True] * (width - gap) + [False] * gap for gap in gaps]
    return Rows(torch.tensor(ids), torch.tensor(real), any(gaps))


class ModelCall:
    """A model with one way to call it, whatever its forward accepts.

    Args:
        model: A transformers model that takes `input_ids` and returns logits.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        parameters = inspect.signature(model.forward).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self._takes_positions = "position_ids" in parameters
        self._keeps = "logits_to_keep" in parameters
        self._cached = "use_cache" in parameters or (takes_any and "past_key_values" in parameters)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        embedding = self.model.get_input_embeddings()
        return runs_on(embedding) or embedding.weight.device

    @property
    def _is_spread(self) -> bool:
        """Whether layers are on several devices: accelerate brings arguments to the first, the head is on the last."""
        return len(set((getattr(self.model, "hf_device_map", None) or {}).values())) > 1

    def __call__(
        self,
        rows: Rows,
        positions: Int[Tensor, "kept"] | None = None,
        cache: Any = None,
        past: Bool[Tensor, "batch past"] | None = None,
    ) -> Float[Tensor, "batch kept vocab"]:
        """Return logits for the columns asked for.

        Args:
            rows: Token rows; with a cache, the new tokens only.
            positions: Columns to return, the same for every row; all when None.
            cache: A transformers cache that the call reads and extends.
            past: Which cached columns are real tokens.
        """
        extra = self._arguments(rows, cache, past)
        if positions is not None and self._keeps and self._is_spread:
            return self._behind(lambda hidden: hidden[:, positions.to(hidden.device)], rows, extra)
        if positions is not None and self._keeps:
            extra["logits_to_keep"] = positions
        logits = self.model(input_ids=rows.ids, **extra).logits
        return logits if positions is None or self._keeps else logits[:, positions]

    def at(
        self,
        rows: Rows,
        places: Int[Tensor, "wanted"],
        cache: Any = None,
        past: Bool[Tensor, "batch past"] | None = None,
    ) -> Float[Tensor, "wanted vocab"]:
        """Return logits for single tokens.

        The head runs on these tokens alone: it is a large part of a small model's work.

        Args:
            rows: Token rows.
            places: Which tokens of the flattened rows.
            cache: As in the call.
            past: As in the call.
        """

        def pick(hidden: Tensor) -> Tensor:
            return hidden.flatten(0, 1)[places.to(hidden.device)].unsqueeze(0)

        flat = self._behind(pick, rows, self._arguments(rows, cache, past)).flatten(0, 1)
        return flat if len(flat) == len(places) else flat[places]  # some models do not call their head as a module

    def _behind(self, pick: Callable[[Tensor], Tensor], rows: Rows, extra: dict[str, Any]) -> Tensor:
        """Return the logits of what is picked of the last hidden states; of all where the head is no module."""
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None

        def picked(module: nn.Module, args: tuple) -> tuple:
            return (pick(args[0]), *args[1:]) if args[0].shape[:2] == rows.ids.shape else args

        handle = head.register_forward_pre_hook(picked) if isinstance(head, nn.Module) else None
        try:
            return self.model(input_ids=rows.ids, **extra).logits
        finally:
            if handle is not None:
                handle.remove()

    def _arguments(
        self, rows: Rows, cache: Any = None, past: Bool[Tensor, "batch past"] | None = None
    ) -> dict[str, Any]:
        """Return what a forward pass needs besides ids; no mask where nothing is padded, for faster attention."""
        extra: dict[str, Any] = {}
        if rows.padded or past is not None:
            real = rows.real if past is None else torch.cat([past, rows.real], dim=1)
            extra["attention_mask"] = real.long()
            if self._takes_positions:
                extra["position_ids"] = (real.long().cumsum(-1) - 1).clamp(min=0)[:, -rows.ids.shape[1] :]
        if cache is not None:
            extra.update(past_key_values=cache, use_cache=True)
        elif self._cached:
            extra["use_cache"] = False
        return extra
