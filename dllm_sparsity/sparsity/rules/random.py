"""random: keep as many entries as another rule would, anywhere in the row: the control."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from dllm_sparsity import registry
from dllm_sparsity.errors import UserError
from dllm_sparsity.sparsity.kernels import naive
from dllm_sparsity.sparsity.rule import Rule, Where

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
        p: Strength of the rule whose density is matched, where `like` is a name.
        like: That rule, row by row: its name, or a rule.
        seed: Another seed gives other places.
    """

    p: float | None = None
    like: str | Rule = "top_p"
    seed: int = 0
    _rule: Rule = field(init=False, repr=False, compare=False, default=None)  # type: ignore[assignment]

    dense: ClassVar[float] = 1.0
    denser_upwards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.p is None) == isinstance(self.like, str):
            raise UserError("random needs a strength, or a rule to be like", "say Random(0.9), or give like=a rule")
        if isinstance(self.like, str):
            object.__setattr__(self, "_rule", registry.get("rules", self.like)(self.p))
        elif isinstance(self.like, Rule):
            object.__setattr__(self, "_rule", self.like)
        else:
            raise UserError(f"random cannot be like {self.like!r}", "give like the name of a rule, or a rule")

    @property
    def strength(self) -> float:
        """The strength of the rule whose density is matched."""
        return self._rule.strength

    @property
    def is_dense(self) -> bool:
        """Whether the rule whose density is matched keeps everything."""
        return self._rule.is_dense

    def keep(self, rows: Float[Tensor, "rows width"], where: Where) -> Bool[Tensor, "rows width"]:
        """Mark the entries that stay.

        Args:
            rows: As in `Rule.keep`.
            where: As in `Rule.keep`.
        """
        nonzero = rows != 0
        count = naive.count_true(self._rule.keep(rows, where) & nonzero)
        bits = (rows.detach().float() + 0.0).contiguous().view(torch.int32).long()  # -0.0 and 0.0 are one value
        place = torch.arange(1, rows.shape[-1] + 1, device=rows.device)
        salt = (self.seed * 1_000_003 + where.layer) * 1_009 + sum(where.site.encode())
        signed = (salt * _MIX[1] + (1 << 63)) % (1 << 64) - (1 << 63)  # a Python integer does not wrap by itself
        row_key = (bits * (place * _MIX[0] | 1)).sum(-1, keepdim=True) + signed  # int64 sums wrap, in any order
        mixed = row_key + place * _MIX[0]
        for multiplier, shift in zip(_MIX[1:], (30, 27), strict=True):
            mixed = (mixed ^ (mixed >> shift & (1 << 64 - shift) - 1)) * multiplier
        score = ((mixed >> 11) & (1 << 52) - 1).double() + 1
        return naive.first_in_order(score * nonzero, count.unsqueeze(-1)) & nonzero
