"""observe(): drive a clock for a denoising loop that somebody else wrote, from the token ids its model sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dllm_sparsity.errors import UserError
from dllm_sparsity.sparsity.clock import Clock, Compare, Phase, Slot, TokenState

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


@contextmanager
def observe(
    model: nn.Module, mask_token_id: int, *, pad_token_id: int | None = None, eos_token_id: int | None = None
) -> Iterator[Clock]:
    """Drive a clock for a loop that denoises a whole canvas in each forward pass.

    The loop stays as it is. Before each forward pass the token ids say what is masked, what was committed since the
    pass before, and whether a new request began; one look at the ids a pass, before the first layer. A batch whose
    second half is the first with its prompt masked is classifier-free guidance, and that half is branch `uncond`.
    A loop with a cache, which does not show the prompt again, has to drive a `Clock` itself.

    Args:
        model: A model with an input embedding that takes token ids.
        mask_token_id: Id of the mask token.
        pad_token_id: Id of padding in prompts, left out of every count; None where there is no padding.
        eos_token_id: Id of the end token; committed tokens behind it count as `after_eos`.

    Yields:
        The clock, to be given to `sparsify`.

    Raises:
        UserError: The model has no input embedding that can be watched.

    Example:
        with observe(model, MASK) as clock, sparsify(model, TopP(0.9), "all", clock=clock) as tracker:
            their_generate(model, prompt)
        save_report(tracker.read(), "report.html")
    """
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(embedding, nn.Module):
        raise UserError(
            f"{type(model).__name__} has no input embedding to watch", "drive a Clock from the loop: clock.tick(...)"
        )
    watcher = _Watcher(Clock(), mask_token_id, pad_token_id, eos_token_id)
    handle = embedding.register_forward_pre_hook(watcher.see, with_kwargs=True)
    try:
        yield watcher.clock
        watcher.finish()
    finally:
        handle.remove()


class _Watcher:
    """Turn the ids of successive forward passes into ticks."""

    def __init__(self, clock: Clock, mask: int, pad: int | None, eos: int | None) -> None:
        self.clock, self._mask, self._pad, self._eos = clock, mask, pad, eos
        self._before: Tensor | None = None
        self._canvas: Tensor | None = None  # True where the request began with a mask
        self._step = self._request = 0
        self._guided = False

    def finish(self) -> None:
        """Close the last request batch."""
        if self._before is not None:
            self.clock.end()
            self._before = None

    def see(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Announce the forward pass that begins with these token ids."""
        if not self.clock.counting:
            return
        ids = args[0] if args else next(value for value in kwargs.values() if isinstance(value, torch.Tensor))
        ids = ids.detach()
        self._guided = guided = self._is_guided(ids)
        cond = ids[: len(ids) // 2] if guided else ids
        if self._is_new(cond):
            self.finish()
            self._canvas, self._step = cond == self._mask, 0
            self._request += 1
            items = [(self._request, row) for row in range(len(cond))]
            self.clock.begin(items * (2 if guided else 1), 64)
        elif len(self.clock.items) != len(ids):
            raise UserError("the loop changed its batch size within a request", "drive a Clock from the loop")
        states = self._states(cond)
        if guided:
            slots = [Slot(Phase.DENOISE, branch, 0, self._step) for branch in ("cond", "uncond") for _ in cond]
            states = states.repeat(2, 1)
        else:
            slots = [Slot(Phase.DENOISE, "cond", 0, self._step)] * len(cond)
        same = self._before is not None and self._before.shape == cond.shape and self._step > 0
        self.clock.tick(slots, states, Compare.PREVIOUS if same else Compare.START)
        self._before = cond.clone()
        self._step += 1

    def _is_new(self, ids: Int[Tensor, "batch seq"]) -> bool:
        """Tell whether the prompt is another one, or the whole canvas is masked again."""
        before, canvas = self._before, self._canvas
        if before is None or canvas is None or len(before) != len(ids) or ids.shape[1] < before.shape[1]:
            return True
        old = before.shape[1]
        if not torch.equal(ids[:, :old][~canvas], before[~canvas]):
            return True
        all_masked = bool((ids[:, :old][canvas] == self._mask).all())
        new = bool(all_masked and (before[canvas] != self._mask).any())
        if not new and ids.shape[1] > old:  # a window that grows block by block
            self._canvas = torch.cat([canvas, ids[:, old:] == self._mask], dim=1)
            self._before = torch.cat([before, ids[:, old:]], dim=1)
        return new

    def _states(self, ids: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
        before, canvas = self._before, self._canvas
        states = torch.where(ids == self._mask, TokenState.MASKED, TokenState.COMMITTED)
        if before is not None and before.shape == ids.shape:
            fresh = (before == self._mask) & (ids != self._mask)
            states = torch.where(fresh, TokenState.COMMITTED_NOW, states)
        if self._eos is not None:
            end = ((ids == self._eos) & canvas).long()
            behind = (end.cumsum(-1) - end > 0) & canvas & (ids != self._mask)
            states = torch.where(behind, TokenState.AFTER_EOS, states)
        states = torch.where(canvas, states, TokenState.PROMPT)
        if self._pad is not None:
            states = torch.where((ids == self._pad) & ~canvas, TokenState.PAD, states)
        return states

    def _is_guided(self, ids: Int[Tensor, "batch seq"]) -> bool:
        """Tell whether the second half of the batch is the first without its prompt: all mask when a request begins."""
        if len(ids) % 2:
            return False
        cond, free = ids.chunk(2)
        if bool((free == self._mask).all() and (cond != self._mask).any()):
            return True
        canvas = self._canvas
        if not self._guided or canvas is None or len(canvas) != len(cond) or canvas.shape[1] > cond.shape[1]:
            return False
        blank = cond.clone()
        blank[:, : canvas.shape[1]].masked_fill_(~canvas, self._mask)
        return torch.equal(free, blank)
