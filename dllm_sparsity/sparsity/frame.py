"""What one forward pass is: its phase, the state of its tokens, and what hooks read of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, cast

import torch

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


class Phase(StrEnum):
    """What a forward pass is for."""

    FORWARD = "forward"  # nobody said
    PREFILL = "prefill"
    DECODE = "decode"
    DENOISE = "denoise"
    LIKELIHOOD = "likelihood"
    ENCODE = "encode"
    COMMIT = "commit"
    CORRECT = "correct"
    DRAFT = "draft"


class TokenState(IntEnum):
    """What a token is in the current forward pass."""

    UNKNOWN = 0
    PROMPT = 1
    MASKED = 2  # also in the forward pass that decides it
    COMMITTED_NOW = 3  # visible for the first time in this forward pass
    COMMITTED = 4
    AFTER_EOS = 5
    PAD = 6


class Compare(StrEnum):
    """What overlap metrics do with a forward pass."""

    OFF = "off"
    START = "start"  # remember its kept sets as the first step's
    PREVIOUS = "previous"  # the same rows as one forward pass of this branch before

    @property
    def code(self) -> int:
        """The number that kernels read: 0, 1 or 2."""
        return list(Compare).index(self)


@dataclass(frozen=True)
class Slot:
    """One line of the ledger: forward passes that are counted together."""

    phase: Phase
    branch: str = "cond"
    block: int = 0
    step: int = 0


@dataclass
class Frame:
    """What hooks read during one forward pass; tensors have one entry a row of the FFN.

    Frames of one shape share them, so that a compiled or captured forward pass reads the step it stands at.
    """

    slot: Slot
    compare: Compare
    index: Int[Tensor, "rows"]  # row of the ledger: (slot, batch row, state)
    sequence: Int[Tensor, "rows"]  # batch row
    states: Int[Tensor, "rows"]
    code: Int[Tensor, ""] | None = None  # `compare.code`, int32, on the device
    _moved: dict[torch.device, Frame] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.branch, self.comparing = self.slot.branch, self.compare is not Compare.OFF
        if self.code is None:
            self.code = torch.full((), self.compare.code, dtype=torch.int32, device=self.index.device)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what a device holds of it."""
        return self.index, self.sequence, self.states, cast("Tensor", self.code)

    def on(self, *tensors: Tensor) -> Frame:
        """Return this frame with other tensors.

        Args:
            tensors: In the order of `tensors`.
        """
        index, sequence, states, code = tensors
        return Frame(self.slot, self.compare, index, sequence, states, code)

    def routed(self, token: Int[Tensor, "rows"]) -> Frame:
        """Return the frame of rows that are tokens of this one in another order; overlap is not counted there.

        Args:
            token: Place of each row's token in this frame.
        """
        picked = (self.index[token], self.sequence[token], self.states[token])
        return Frame(self.slot, Compare.OFF, *picked)

    def to(self, device: torch.device) -> Frame:
        """Return this frame on another device; the copy is made once a forward pass.

        Args:
            device: Where the layer lives.
        """
        if device == self.index.device:
            return self
        if device not in self._moved:
            self._moved[device] = self.on(*(tensor.to(device) for tensor in self.tensors()))
        return self._moved[device]
