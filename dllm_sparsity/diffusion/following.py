"""Follow a loop by the token ids of its forward passes: what each pass is for, and what each token is in it."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from dllm_sparsity.diffusion.view import UNSEEN, View
from dllm_sparsity.sparsity.clock import Clock, Compare, Phase, Slot, TokenState
from dllm_sparsity.sparsity.transfer import upload

if TYPE_CHECKING:
    from torch import Tensor

_NO_MASK = -2  # no token has this id
_NOISE = "no mask token: which tokens of a canvas are noise is not to be seen, so their state is unknown"


class Follower:
    """Turn the views of successive forward passes into ticks of a clock.

    Args:
        clock: Told of every forward pass.
        mask: Id of the mask token; None where there is none.
        pad: Id of padding outside canvases; None where there is none.
        eos: Id of the end token; None where there is none.
    """

    def __init__(self, clock: Clock, mask: int | None, pad: int | None, eos: int | None) -> None:
        self.clock, self._tokens = clock, _Tokens(_NO_MASK if mask is None else mask, pad, eos)
        self._request: _Request | None = None
        self._requests = 0

    def finish(self) -> None:
        """Close the last request batch."""
        if self._request is not None:
            self.clock.end()
            self._request = None

    def see(self, view: View) -> None:
        """Announce a forward pass.

        Args:
            view: What the model is about to see.
        """
        if view.columns is None:
            self._see_unplaced(view)
        elif self._request is not None and self._request.repeats(view):
            self._tick(view, self._request, ("uncond",))
        else:
            cond = None if self._request is None else self._request.continued(view)
            if cond is None:
                cond = self._begin(view)
            request = cast("_Request", self._request)
            request.take(cond)
            self._tick(view, request, ("cond", "uncond") if request.doubled else ("cond",))

    def _begin(self, view: View) -> View:
        doubled = len(view.ids) % 2 == 0 and _without_prompt(view.half(0), view.half(1), self._tokens)
        cond, before = view.half(0) if doubled else view, self._request
        request = _Request(self._tokens, len(cond.ids), doubled)
        if before is not None and view.partial and before.batch == request.batch:
            request.table = before.table[:, : int(cond.places.min())]  # a prompt that stays in the cache
        self._open(request, len(view.ids))
        return cond

    def _open(self, request: _Request, batch: int) -> None:
        self.finish()
        self._requests += 1
        self._request = request
        items = [(self._requests, row) for row in range(request.batch)]
        self.clock.begin(items * (batch // request.batch), 64)

    def _tick(self, view: View, request: _Request, branches: tuple[str, ...]) -> None:
        """Announce the pass that the request has taken, for one branch or for both halves of a batch."""
        slots = [replace(request.slot, branch=branch) for branch in branches for _ in range(request.batch)]
        key = (view.stream, branches[0])
        before = request.compared.get(key)
        same = before is not None and torch.equal(before, view.places)
        request.compared[key], request.branch = view.places, branches[-1]
        states = upload(request.states.repeat(len(branches), 1), view.device)
        self.clock.tick(slots, states, Compare.PREVIOUS if same else Compare.START)
        if view.encodes is False and self._tokens.mask == _NO_MASK:
            self.clock.note(_NOISE)

    def _see_unplaced(self, view: View) -> None:
        """Announce a forward pass of tokens whose places are not known: what is no mask is unknown."""
        self.clock.note(view.unknown)
        request = self._request
        if request is None or request.batch * (1 + request.doubled) != len(view.ids):
            request = _Request(self._tokens, len(view.ids), False)
            self._open(request, len(view.ids))
        masked = view.ids == self._tokens.mask
        slot = request.next_slot(Phase.DENOISE if masked.any() else Phase.FORWARD)
        branches = ("cond", "uncond") if request.doubled else ("cond",)
        slots = [replace(slot, branch=branch) for branch in branches for _ in range(request.batch)]
        states = torch.where(masked, TokenState.MASKED, TokenState.UNKNOWN)
        request.compared.clear()
        self.clock.tick(slots, upload(states, view.device), Compare.OFF)


@dataclass(frozen=True)
class _Tokens:
    """The ids that mean something."""

    mask: int
    pad: int | None
    eos: int | None


class _Request:
    """What is known of a request batch: its sequences as last seen, and where its loop stands."""

    def __init__(self, tokens: _Tokens, batch: int, doubled: bool) -> None:
        self.batch, self.doubled = batch, doubled
        self.table = torch.zeros(batch, 0, dtype=torch.long)  # every column's id as last seen
        self.compared: dict[tuple[int, str], Tensor] = {}  # stream and branch -> columns of its forward pass before
        self.branch = "cond"
        self.slot, self.states = Slot(Phase.FORWARD), self.table
        self._tokens = tokens
        self._canvas = self.table.bool()  # True where a column was a mask when it was first seen
        self._guided = False  # by a forward pass of its own
        self._seen: View | None = None
        self._span: tuple[int, int] | None = None
        self._cache: Any = None
        self._left: int | None = None  # where the part of the block's columns that was computed anew began
        self._block = self._step = 0
        self._denoised = False  # in this block
        self._narrows = False  # whether blocks have passes over all columns and then passes over some
        self._counts: Counter[tuple[Phase, int]] = Counter()

    def repeats(self, view: View) -> bool:
        """Tell whether this is the pass before without its prompt: guidance by a forward pass of its own."""
        seen = self._seen
        if self.doubled or seen is None or self.branch != "cond" or view.stream != seen.stream:
            return False
        if view.ids.shape != seen.ids.shape or not torch.equal(view.places, seen.places):
            return False
        given = ~self._canvas.gather(1, view.places)
        if not torch.equal(view.ids[~given], seen.ids[~given]):
            return False
        if _without_prompt(seen, view, self._tokens):
            self._guided = True
            return True
        return self._guided and torch.equal(view.ids, seen.ids)

    def continued(self, view: View) -> View | None:
        """Return the rows of the branch `cond`, or None where the view is of another request."""
        if len(view.ids) != self.batch * (1 + self.doubled):
            return None
        cond = view.half(0) if self.doubled else view
        if self.doubled and not self._fits(cond, view.half(1)):
            return None
        return cond if self._goes_on(cond) else None

    def _fits(self, cond: View, free: View) -> bool:
        blank = ~self._canvas_at(cond) & (free.ids == self._tokens.mask)
        return torch.equal(free.ids[~blank], cond.ids[~blank])

    def _goes_on(self, cond: View) -> bool:
        ids, mask, wide = cond.ids, self._tokens.mask, self.table.shape[1]
        known, canvas = self._known(cond), self._canvas_at(cond)
        new = known == UNSEEN
        again = bool(canvas.any() and (ids[canvas] == mask).all() and (known[canvas] != mask).any())
        if cond.partial:  # only the first block can begin anew, behind a prompt that the cache still holds
            return not again or bool(self._canvas[:, : int(cond.places.min())].any())
        if cond.encodes or ids.shape[1] < wide or not torch.equal(ids[~canvas & ~new], known[~canvas & ~new]):
            return False
        if again or (ids[new] != mask).any():
            return False
        return bool(self._canvas.any()) or ids.shape[1] > wide

    def _known(self, view: View) -> Tensor:
        """Return the ids that these columns had when they were last seen."""
        more = int(view.places.max()) + 1 - self.table.shape[1]
        table = torch.nn.functional.pad(self.table, (0, max(0, more)), value=UNSEEN)
        return table.gather(1, view.places)

    def _canvas_at(self, view: View) -> Tensor:
        more = int(view.places.max()) + 1 - self._canvas.shape[1]
        return torch.nn.functional.pad(self._canvas, (0, max(0, more))).gather(1, view.places)

    def take(self, view: View) -> None:
        """Find slot and states of a forward pass of the branch `cond`, and remember it."""
        before, ids, columns = self._known(view), view.ids, view.places
        wide = max(int(columns.max()) + 1, self.table.shape[1])
        self.table = torch.nn.functional.pad(self.table, (0, wide - self.table.shape[1]), value=UNSEEN)
        self._canvas = torch.nn.functional.pad(self._canvas, (0, wide - self._canvas.shape[1]))
        noise = self._tokens.mask == _NO_MASK and not view.encodes
        began = (before == UNSEEN) & ((ids == self._tokens.mask) | noise)
        self._canvas.scatter_(1, columns, self._canvas.gather(1, columns) | began)
        self.table.scatter_(1, columns, ids)
        self.slot = self._place(view)
        self.states = self._states(view, before, noise)
        self._seen = replace(view, cache=None)  # or the cache would live on
        try:
            self._cache = None if view.cache is None else weakref.ref(view.cache)
        except TypeError:  # a tuple
            self._cache = None

    def _place(self, view: View) -> Slot:
        """Return which phase, block and step this is; a block is over when other columns are computed."""
        span = (int(view.places.min()), int(view.places.max()) + 1)
        last, self._span = self._span, span
        if last is not None and self._denoised:
            inside = span[0] >= last[0] and span[1] <= last[1]
            moved = inside and span != last and self._left not in (None, span[0])
            if not inside or moved or (self._narrows and not view.partial):
                self._block, self._denoised, self._left = self._block + 1, False, None
            if inside and span != last:
                self._left, self._narrows = span[0], True
        phase = self._phase(view, span, last)
        self._denoised |= phase is Phase.DENOISE
        return self.next_slot(phase)

    def _phase(self, view: View, span: tuple[int, int], last: tuple[int, int] | None) -> Phase:
        masked = view.ids == self._tokens.mask
        if view.idle is not None:
            masked &= ~view.idle
        if view.encodes:
            return Phase.ENCODE
        if masked.any() or self._tokens.mask == _NO_MASK:
            return Phase.DENOISE
        if not self._canvas_at(view).any() or (span[0] == 0 and span != last):
            return Phase.PREFILL
        kept = self._cache is not None and view.cache is not None and self._cache() is view.cache
        return Phase.COMMIT if span[0] or kept else Phase.CORRECT

    def next_slot(self, phase: Phase) -> Slot:
        """Number a forward pass: denoising and correcting over the request, others within their block."""
        if phase in (Phase.DENOISE, Phase.CORRECT):
            self._step += 1
            return Slot(phase, "cond", self._block, self._step - 1)
        self._counts[phase, self._block] += 1
        return Slot(phase, "cond", self._block, self._counts[phase, self._block] - 1)

    def _states(self, view: View, before: Tensor, noise: bool) -> Tensor:
        ids, tokens, canvas = view.ids, self._tokens, self._canvas_at(view)
        changed = (ids != before) | (view.encodes & canvas)
        states = torch.where(changed, TokenState.COMMITTED_NOW, TokenState.COMMITTED)
        if tokens.eos is not None:
            end = ((self.table == tokens.eos) & self._canvas).long()
            behind = (end.cumsum(-1) - end > 0).gather(1, view.places)
            states = torch.where(behind, TokenState.AFTER_EOS, states)
        states = torch.where(ids == tokens.mask, TokenState.MASKED, states)
        states = torch.where(canvas, TokenState.UNKNOWN if noise else states, TokenState.PROMPT)
        if tokens.pad is not None:
            states = torch.where((ids == tokens.pad) & ~canvas, TokenState.PAD, states)
        return states if view.idle is None else states.masked_fill(view.idle, TokenState.PAD)


def _without_prompt(cond: View, free: View, tokens: _Tokens) -> bool:
    """Tell whether `free` is `cond` with its prompt masked; some tokens of it may have been kept."""
    differs, given = cond.ids != free.ids, cond.ids != tokens.mask
    if tokens.pad is not None:
        given &= cond.ids != tokens.pad
    if cond.idle is not None:
        given &= ~cond.idle
    most = 2 * differs.sum(-1) >= given.sum(-1)
    return bool(differs.any() and (free.ids[differs] == tokens.mask).all() and most.all())
