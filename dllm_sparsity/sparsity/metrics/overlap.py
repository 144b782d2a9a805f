"""overlap: how much of a token's kept set was kept one step before, and at its first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from dllm_sparsity.sparsity.clock import Compare, TokenState
from dllm_sparsity.sparsity.kernels import fused, naive
from dllm_sparsity.sparsity.metric import Metric

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from dllm_sparsity.sparsity.clock import Frame

_UNIT = 1 / naive.JACCARD_UNITS  # a Jaccard value is counted in steps of this size
_NO_START = "overlap: Compare.PREVIOUS without a Compare.START of this branch before it in the batch"
_OTHER_ROWS = "overlap: {} rows now, {} one step before"
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
    by_place: ClassVar[bool] = True

    def __init__(self) -> None:
        self._memory: dict[tuple[int, str], dict[str, Tensor]] = {}
        self._sets: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}  # the same for the fused kernel; addresses stay
        self._started: set[tuple[int, str]] = set()

    def begin(self) -> None:
        """Forget the kept sets of the request batch before."""
        self._memory.clear()
        self._started.clear()

    def prepare(self, points: Sequence[tuple[int, torch.device] | None], frame: Frame) -> None:
        """Make room for the fused kernel's kept sets before a forward pass; where there is room, addresses stay.

        Args:
            points: Width and device of each point; None where it is not compared.
            frame: Where the forward pass stands.

        Raises:
            ValueError: As in `count`.
        """
        for point, place in enumerate(points):
            if place is None:
                continue
            width, device = place
            key, shape = (point, frame.branch), (len(frame.index), fused.words(width))
            known = self._sets.get(key)
            if frame.compare is Compare.PREVIOUS:
                if key not in self._started:
                    raise ValueError(_NO_START)
                if known is not None and known[0].shape != shape:
                    raise ValueError(_OTHER_ROWS.format(shape[0], len(known[0])))
            self._started.add(key)
            if known is None or known[0].shape != shape:
                with torch.inference_mode(False):
                    pair = [torch.zeros(shape, dtype=torch.int32, device=device) for _ in range(2)]
                self._sets[key] = (pair[0], pair[1])

    def sets(self, point: int, frame: Frame) -> tuple[Int[Tensor, "rows words"], Int[Tensor, "rows words"]]:
        """Return where the fused kernel keeps the sets of the step before and of the first step.

        Args:
            point: As in `Metric.count`.
            frame: As in `Metric.count`.
        """
        return self._sets[point, frame.branch]

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
        key = (point, frame.branch)
        if frame.compare is Compare.START:
            packed = naive.pack_bits(kept)
            self._memory[key] = {"prev": packed, "first": packed}
            return torch.zeros(len(kept), len(self.columns), dtype=torch.long, device=kept.device)
        memory = self._memory.get(key)
        if memory is None:
            raise ValueError(_NO_START)
        packed = naive.pack_bits(kept)
        if memory["prev"].shape != packed.shape:
            raise ValueError(_OTHER_ROWS.format(len(kept), len(memory["prev"])))
        size = naive.count_bits(packed)
        counts = [
            column for against in ("prev", "first") for column in naive.compare_sets(packed, size, memory[against])
        ]
        idle = (frame.states == TokenState.PAD).unsqueeze(-1)  # a row that waits for others keeps its last real step
        memory["prev"] = torch.where(idle, memory["prev"], packed)
        return torch.stack(counts, dim=-1)
