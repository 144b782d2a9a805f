"""overlap: how much of a token's kept set was kept one step before, and at its first step."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from dllm_sparsity.sparsity.clock import Compare, TokenState
from dllm_sparsity.sparsity.kernels import naive
from dllm_sparsity.sparsity.metric import Metric

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from dllm_sparsity.sparsity.clock import Frame

_UNIT = 2.0**-32  # a Jaccard value is counted in steps of this size
_PARTS = ("rows", "inter", "union", "kept", "jaccard_sum")


class Overlap(Metric):
    """Compare each row's kept set with the set of the forward pass before and with that of the first.

    Pooled Jaccard is inter / union; per-token Jaccard is jaccard_sum / rows. Two independent sets of densities d1 and
    d2 have d1 d2 / (d1 + d2 - d1 d2). Two empty sets count as equal. Rows are compared by their place, so a loop says
    with `Compare.PREVIOUS` that they are the same tokens; in AR decoding they are not, and reports say so.

    Source: Szatkowski et al. 2025, section on LLaDA, https://arxiv.org/abs/2509.00454. Differs: token states apart.
    """

    columns: ClassVar[tuple[str, ...]] = tuple(f"{part}_{against}" for against in ("prev", "first") for part in _PARTS)
    scales: ClassVar[dict[str, float]] = {"jaccard_sum_prev": _UNIT, "jaccard_sum_first": _UNIT}
    needs_clock: ClassVar[bool] = True

    def __init__(self) -> None:
        self._memory: dict[tuple[int, str], dict[str, Tensor]] = {}

    def begin(self) -> None:
        """Forget the kept sets of the request batch before."""
        self._memory.clear()

    def count(
        self, point: int, rows: Float[Tensor, "rows width"], kept: Bool[Tensor, "rows width"], frame: Frame
    ) -> Int[Tensor, "rows 10"]:
        """Return intersections, unions, earlier sizes and Jaccard values of each row, zeros where nothing is compared.

        Args:
            point: As in `Metric.count`.
            rows: As in `Metric.count`.
            kept: As in `Metric.count`.
            frame: As in `Metric.count`.

        Raises:
            ValueError: The loop said that the rows are those of the forward pass before, and there was none, or their
                number differs.
        """
        if frame.compare is Compare.OFF:
            return torch.zeros(len(kept), len(self.columns), dtype=torch.long, device=kept.device)
        key = (point, frame.slot.branch)
        if frame.compare is Compare.START:
            packed = naive.pack_bits(kept)
            self._memory[key] = {"prev": packed, "first": packed}
            return torch.zeros(len(kept), len(self.columns), dtype=torch.long, device=kept.device)
        memory = self._memory.get(key)
        if memory is None:
            raise ValueError("overlap: Compare.PREVIOUS without a Compare.START of this branch before it in the batch")
        packed = naive.pack_bits(kept)
        if memory["prev"].shape != packed.shape:
            raise ValueError(f"overlap: {len(kept)} rows now, {len(memory['prev'])} one step before")
        size = naive.count_bits(packed)
        counts = [column for against in ("prev", "first") for column in _compare(packed, size, memory[against])]
        idle = (frame.states == TokenState.PAD).unsqueeze(-1)  # a row that waits for others keeps its last real step
        memory["prev"] = torch.where(idle, memory["prev"], packed)
        return torch.stack(counts, dim=-1)


def _compare(kept: Tensor, size: Tensor, earlier: Tensor) -> list[Tensor]:
    """Return the five parts for one earlier kept set; both are packed."""
    inter, before = naive.count_bits(kept & earlier), naive.count_bits(earlier)
    union = size + before - inter
    jaccard = torch.where(union > 0, inter.double() / union.clamp(min=1), 1.0)
    return [torch.ones_like(inter), inter, union, before, (jaccard / _UNIT).round().long()]
