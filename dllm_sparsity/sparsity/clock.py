"""Where the current forward pass stands: phase, branch, block and step, and the state of every token in it.

The loop says so through `Clock.tick`; nothing is guessed from shapes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, cast

import torch

from dllm_sparsity.sparsity.frame import Compare, Frame, Phase, Slot, TokenState
from dllm_sparsity.sparsity.reading import NOISE_BINS
from dllm_sparsity.sparsity.transfer import upload

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

_GATHERED = (
    "an FFN saw another number of rows than the model was given, as under a cache that gathers tokens: their state is "
    "unknown, and overlap is off from there on, because nothing says which positions they are"
)
_OF_A_BATCH = ("capacity", "items", "weights", "slots", "noise", "frame", "_numbers", "_held", "_others")


class Listener(Protocol):
    """What a clock tells: a ledger."""

    by_row: bool
    """Whether its rule and counts take each row for itself."""

    def begin(self, clock: Clock) -> None:
        """Prepare for a request batch."""

    def tick(self, clock: Clock) -> None:
        """Prepare for a forward pass."""

    def end(self, clock: Clock) -> None:
        """Fold a request batch into the records."""


class Clock:
    """Tell the counters which forward pass is running.

    A loop calls `begin` for each request batch, `tick` before each forward pass, and `end` (or uses `batch` around
    both). The same clock can drive several trackers.

    Args:
        exact: Whether an FFN must see the rows that the loop announced. If not, rows of another number are counted as
            `unknown`, overlap is refused from there on, and `notes` says so.
    """

    def __init__(self, exact: bool = True) -> None:
        self.exact = exact
        self.notes: list[str] = []
        """What a reader of the counts should know."""
        self.overlap_refused = False
        self.listeners: list[Listener] = []
        self.items: list[Hashable] = []
        self.weights: list[int] | None = None
        self.slots: dict[Slot, int] = {}
        self.noise: list[Tensor] = []  # per slot: bin of the masked fraction of each batch row's canvas
        self.capacity = 1
        self.frame: Frame | None = None
        self.counting = True
        self._numbers: int | Tensor = 0  # slot of the forward pass, or of each batch row
        self._held: dict[Hashable, Frame] = {}  # rows and device -> owner of the tensors that such frames share
        self._others: dict[Hashable, Frame] = {}  # the same of this forward pass's rows of another number

    def note(self, text: str) -> None:
        """Tell the reader of the counts something, once.

        Args:
            text: One sentence.
        """
        if text not in self.notes:
            self.notes.append(text)

    @property
    def may_share(self) -> bool:
        """Whether rows may be given a weight: there is a tracker, and all take each row for itself."""
        return bool(self.listeners) and all(listener.by_row for listener in self.listeners)

    def begin(self, items: Sequence[Hashable], forwards: int = 1, weights: Sequence[int] | None = None) -> None:
        """Start a request batch.

        Args:
            items: What each batch row belongs to; rows of one item are summed in the per-item counts.
            forwards: Forward passes to make room for; more are accepted.
            weights: How many equal rows each batch row stands for; it is counted so often. None counts each once.

        Raises:
            ValueError: There is no item, or not one weight for each.
        """
        if not len(items):
            raise ValueError("begin: a request batch needs at least one item")
        if weights is not None and len(weights) != len(items):
            raise ValueError(f"begin: {len(weights)} weights for {len(items)} items")
        self.weights = None if weights is None else list(weights)
        self.items, self.capacity = list(items), max(1, forwards)
        self.slots, self.noise, self.frame = {}, [], None
        for listener in self._told():
            listener.begin(self)

    def tick(
        self, slot: Slot | Sequence[Slot], states: Int[Tensor, "batch seq"], compare: Compare = Compare.OFF
    ) -> None:
        """Announce the next forward pass.

        Args:
            slot: Where it stands; one slot a batch row where rows differ, as with guidance by batch doubling.
            states: `TokenState` of every token the model will see, padding included, on the model's device.
            compare: How overlap metrics take it; off where overlap was refused.

        Raises:
            ValueError: `begin` was not called, the batch size is not that of `begin`, or a slot was announced before in
                this batch.
        """
        if not self.items:
            raise ValueError("tick: no request batch is open; call clock.begin, or wrap the loop in clock.batch")
        if states.dim() != 2 or len(states) != len(self.items):
            raise ValueError(f"tick: states of shape {tuple(states.shape)} for a batch of {len(self.items)} items")
        row_slots = [slot] * len(states) if isinstance(slot, Slot) else list(slot)
        if len(row_slots) != len(states):
            raise ValueError(f"tick: {len(row_slots)} slots for {len(states)} rows")
        new = list(dict.fromkeys(row_slots))
        again = [slot for slot in new if slot in self.slots]
        if again:
            raise ValueError(f"tick: {again[0]} was announced before in this request batch")
        bins = _noise_bin(states)
        self.slots |= {slot: len(self.slots) + place for place, slot in enumerate(new)}
        self.noise += [bins] * len(new)
        batch, seq = states.shape
        sequence = torch.arange(batch, device=states.device).repeat_interleave(seq)
        self._numbers, self._others = self.slots[new[0]], {}
        if len(new) > 1:
            self._numbers = upload(torch.tensor([self.slots[row] for row in row_slots]), states.device)
        flat = states.reshape(-1).long()
        compare = Compare.OFF if self.overlap_refused else compare
        self.frame = self._hold(Frame(row_slots[0], compare, self._index(sequence, flat), sequence, flat))
        for listener in self._told():
            listener.tick(self)

    def _index(self, sequence: Tensor, states: Tensor) -> Tensor:
        """Return each row's line of the ledger: (slot, batch row, state)."""
        numbers = self._numbers
        slot = numbers if isinstance(numbers, int) else numbers.to(sequence.device)[sequence]
        return (slot * len(self.items) + sequence) * len(TokenState) + states

    def _hold(self, frame: Frame) -> Frame:
        """Move a frame's values into the tensors of earlier frames of its shape; the last 64 shapes are remembered."""
        key = (len(frame.index), frame.index.device)
        held = self._held.get(key)
        if held is None:
            with torch.inference_mode(False):  # else they could be written to in inference mode only
                self._held[key] = frame.on(*(tensor.clone() for tensor in frame.tensors()))
            if len(self._held) > 64:
                del self._held[next(iter(self._held))]
            return self._held[key]
        for mine, new in zip(held.tensors(), frame.tensors(), strict=True):
            mine.copy_(new)
        return frame.on(*held.tensors())

    def end(self) -> None:
        """Close the request batch: counters are read once and folded into records."""
        for listener in self._told():
            listener.end(self)
        self._clear()

    def _clear(self) -> None:
        self.items, self.slots, self.noise, self.frame = [], {}, [], None

    def _told(self) -> list[Listener]:
        return self.listeners if self.counting else []

    @contextmanager
    def batch(
        self, items: Sequence[Hashable], forwards: int = 1, weights: Sequence[int] | None = None
    ) -> Iterator[Clock]:
        """Wrap one request batch in `begin` and `end`; after an exception nothing of it is counted.

        Args:
            items: As in `begin`.
            forwards: As in `begin`.
            weights: As in `begin`.
        """
        self.begin(items, forwards, weights)
        try:
            yield self
        except BaseException:
            self._clear()
            raise
        self.end()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let rules act on the forward passes inside, and count none of them; they need no `tick`."""
        counting, before = self.counting, {name: getattr(self, name) for name in _OF_A_BATCH}
        self.counting, self.slots, self.noise, self.frame = False, dict(self.slots), list(self.noise), None
        self._held, self._others = {}, {}  # frames inside must not write into the tensors of the frame outside
        try:
            yield
        finally:
            self.counting = counting
            for name, value in before.items():
                setattr(self, name, value)

    def rows(self, count: int, device: torch.device) -> Frame | None:
        """Return the frame for an FFN call, or None where nobody announced one and none is needed.

        Args:
            count: Rows that the FFN sees.
            device: Where they are.

        Raises:
            ValueError: The count is not what the loop announced, and the clock is exact or the rows do not divide over
                the batch.
        """
        if self.frame is None:
            if self.counting:
                raise ValueError("a forward pass that the clock was not told of: call clock.tick before each one")
            return None
        if count != len(self.frame.index):
            if self.exact or not self.items or count % len(self.items):
                raise ValueError(f"the clock announced {len(self.frame.index)} rows, an FFN sees {count}")
            return self._other_rows(count, device)
        return self.frame.to(device)

    def _other_rows(self, count: int, device: torch.device) -> Frame:
        """Return a frame for rows that the loop did not announce, an equal share for each sequence."""
        if (count, device) not in self._others:
            self.overlap_refused = True
            self.note(_GATHERED)
            batch = len(self.items)
            sequence = torch.arange(batch, device=device).repeat_interleave(count // batch)
            states = torch.full_like(sequence, TokenState.UNKNOWN)
            slot = cast("Frame", self.frame).slot
            self._others[count, device] = Frame(slot, Compare.OFF, self._index(sequence, states), sequence, states)
        return self._others[count, device]


class FreeClock(Clock):
    """Stand in where no loop drives a clock: phase `forward`, state `unknown`, one item for everything."""

    def rows(self, count: int, device: torch.device) -> Frame | None:
        """Return a frame that fits any call.

        Args:
            count: Rows that the FFN sees.
            device: Where they are.
        """
        zeros = torch.zeros(count, dtype=torch.long, device=device)
        return Frame(Slot(Phase.FORWARD), Compare.OFF, zeros, zeros, zeros)

    def start(self) -> None:
        """Begin the one request batch there is."""
        self.begin([None])
        self.slots[Slot(Phase.FORWARD)] = 0
        self.noise.append(torch.zeros(1, dtype=torch.long))


def _noise_bin(states: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch"]:
    """Return the bin of the masked share of each row's canvas: all its tokens but prompt and padding."""
    masked = (states == TokenState.MASKED).sum(-1)
    canvas = ((states != TokenState.PROMPT) & (states != TokenState.PAD)).sum(-1)
    share = (masked * NOISE_BINS).div(canvas.clamp(min=1), rounding_mode="floor")  # integers: k/20 is exact
    return share.clamp(max=NOISE_BINS - 1)
