"""density: how many activations are non-zero after the rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from dllm_sparsity.sparsity.kernels import naive
from dllm_sparsity.sparsity.metric import Metric

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from dllm_sparsity.sparsity.clock import Frame


class Density(Metric):
    """Count rows, kept entries and all entries.

    A natural zero is not kept. Sparsity is 1 - kept / total.

    Source: Szatkowski et al. 2025, section 3, https://arxiv.org/abs/2509.00454.
    """

    columns: ClassVar[tuple[str, ...]] = ("rows", "kept", "total")

    def count(
        self, point: int, rows: Float[Tensor, "rows width"], kept: Bool[Tensor, "rows width"], frame: Frame
    ) -> Int[Tensor, "rows 3"]:
        """Return 1, the kept entries and the width of each row.

        Args:
            point: As in `Metric.count`.
            rows: As in `Metric.count`.
            kept: As in `Metric.count`.
            frame: As in `Metric.count`.
        """
        one = torch.ones(len(kept), dtype=torch.long, device=kept.device)
        return torch.stack([one, naive.count_true(kept), one * kept.shape[-1]], dim=-1)
