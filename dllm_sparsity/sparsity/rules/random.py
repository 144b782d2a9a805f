"""random: keep as many entries as another rule would, anywhere in the row: the control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from dllm_sparsity.errors import UserError
from dllm_sparsity.sparsity.kernels import naive
from dllm_sparsity.sparsity.rule import Rule, Where
from dllm_sparsity.sparsity.rules.top_p import TopP

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

_MIX = (-7046029288634856825, -4658895280553007687, -7723592293110705685)  # odd 64-bit multipliers, as in splitmix64


@dataclass(frozen=True)
class Random(Rule):
    """Keep, at random places among a row's non-zero entries, as many as `like` would keep.

    The places are a hash of the row's bits, the seed, the layer and the site, so equal rows give equal results in any
    batch.

    Args:
        p: Strength of the default `like`, which is `TopP(p)`; with another `like`, leave it out.
        like: The rule whose density is matched, row by row.
        seed: Another seed gives other places.
    """

    p: float | None = None
    like: Rule | None = None
    seed: int = 0

    dense: ClassVar[float] = 1.0
    denser_upwards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.p is None) == (self.like is None):
            raise UserError(
                "random needs either a strength or a rule to be like", "give Random(0.9) or Random(like=...)"
            )
        if self.like is None and self.p is not None:
            object.__setattr__(self, "like", TopP(self.p))

    @property
    def strength(self) -> float:
        """The strength of the rule whose density is matched."""
        return self._like.strength

    @property
    def is_dense(self) -> bool:
        """Whether the rule whose density is matched keeps everything."""
        return self._like.is_dense

    @property
    def _like(self) -> Rule:
        if self.like is None:
            raise UserError("random has no rule to be like", "give Random(0.9) or Random(like=...)")
        return self.like

    def keep(self, rows: Float[Tensor, "rows width"], where: Where) -> Bool[Tensor, "rows width"]:
        """Mark the entries that stay.

        Args:
            rows: As in `Rule.keep`.
            where: As in `Rule.keep`.
        """
        nonzero = rows != 0
        count = naive.count_true(self._like.keep(rows, where) & nonzero)
        bits = rows.detach().float().contiguous().view(torch.int32).long()
        place = torch.arange(1, rows.shape[-1] + 1, device=rows.device)
        salt = (self.seed * 1_000_003 + where.layer) * 1_009 + sum(where.site.encode())
        signed = (salt * _MIX[1] + (1 << 63)) % (1 << 64) - (1 << 63)  # a Python integer does not wrap by itself
        row_key = (bits * (place * _MIX[0] | 1)).sum(-1, keepdim=True) + signed  # int64 sums wrap, in any order
        mixed = row_key + place * _MIX[0]
        for multiplier, shift in zip(_MIX[1:], (30, 27), strict=True):
            mixed = (mixed ^ (mixed >> shift & (1 << 64 - shift) - 1)) * multiplier
        score = ((mixed >> 11) & (1 << 52) - 1).double() + 1
        return naive.first_in_order(score * nonzero, count.unsqueeze(-1)) & nonzero
