"""Move small values between host and device without waiting for what else the device does."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool
    from torch import Tensor


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Return a copy of host values on a device.

    Args:
        values: A tensor on the CPU.
        device: Where it goes.
    """
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class Download:
    """A value on its way to the host.

    Args:
        value: A tensor on any device.
    """

    def __init__(self, value: Tensor) -> None:
        self._host, self._event = value, None
        if value.is_cuda:
            self._host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._host.copy_(value, non_blocking=True)
            self._event = torch.cuda.current_stream(value.device).record_event()

    @property
    def arrived(self) -> bool:
        """Whether `wait` would return at once."""
        return self._event is None or self._event.query()

    def wait(self) -> Tensor:
        """Return the value on the host, once it is there; later work on the device is not waited for."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


class Poll:
    """A truth about a loop that stays true, asked of the device once a step; on a GPU it is learnt some steps late."""

    def __init__(self) -> None:
        self._sent: deque[Download] = deque()

    def says(self, value: Bool[Tensor, ""]) -> bool:
        """Return whether this value, or an earlier one, is known to be true.

        Args:
            value: As the device has it now.
        """
        self._sent.append(Download(value))
        while self._sent and self._sent[0].arrived:
            if bool(self._sent.popleft().wait()):
                return True
        return False
