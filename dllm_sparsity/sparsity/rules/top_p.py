"""top_p: keep the smallest set of entries that holds the share p of a row's L1 mass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from dllm_sparsity.errors import UserError
from dllm_sparsity.sparsity.kernels import naive
from dllm_sparsity.sparsity.rule import Cut, CutoffRule, Where

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


@dataclass(frozen=True)
class TopP(CutoffRule):
    """Keep the smallest non-empty set whose L1 mass is at least p of the row's.

    Args:
        p: Share of the mass to keep, in [0, 1]; 1 is dense, 0 keeps the largest entry.
        power: Mass of |x|**power instead of |x|; 2 is energy.
        scope: `token` takes each token's vector for itself. `sequence` takes all vectors of a sequence as one row,
            the scope of the code released with the paper for LLaDA; it differs from the paper's rule.
        ties: `keep` keeps all entries equal to the smallest kept one; `minimal` keeps the lower indices only, so that
            the set is as small as it can be.

    Source: Szatkowski et al. 2025, section 3, https://arxiv.org/abs/2509.00454.
    """

    p: float
    power: float = 1.0
    scope: Literal["token", "sequence"] = "token"
    ties: Literal["keep", "minimal"] = "keep"

    dense: ClassVar[float] = 1.0
    denser_upwards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check_range()
        if not isinstance(self.power, int | float) or not 0 < self.power < math.inf:
            raise UserError(f"top_p: power {self.power!r} is not positive", "give a power above 0, such as 1 or 2")
        if self.scope not in ("token", "sequence"):
            raise UserError(f"top_p: unknown scope {self.scope!r}", "give scope token or sequence")
        if self.ties not in ("keep", "minimal"):
            raise UserError(f"top_p: unknown ties {self.ties!r}", "give ties keep or minimal")

    @property
    def strength(self) -> float:
        """The share p."""
        return self.p

    @property
    def by_row(self) -> bool:
        """Whether the mass is a row's own."""
        return self.scope == "token"

    def score(self, rows: Float[Tensor, "rows width"], where: Where) -> Float[Tensor, "rows width"]:
        """Return |x|**power; powers other than 1 in float64, rows scaled by a power of two against overflow.

        Args:
            rows: As in `keep`.
            where: As in `keep`.
        """
        if self.power == 1.0:
            return rows.abs()
        magnitude = rows.abs().double()
        exponent = torch.frexp(magnitude.amax(-1, keepdim=True)).exponent
        return torch.ldexp(magnitude, 1 - exponent) ** self.power

    def cutoff(self, scores: Float[Tensor, "rows width"]) -> Float[Tensor, "rows 1"]:
        """Return the lowest score that is kept in each row.

        Args:
            scores: From `score`.
        """
        return naive.top_p_cutoff(scores, self.p)

    def keep(self, rows: Float[Tensor, "rows width"], where: Where) -> Bool[Tensor, "rows width"]:
        """Mark the entries that stay.

        Args:
            rows: As in `Rule.keep`.
            where: As in `Rule.keep`.
        """
        if self.scope == "sequence":
            return self._keep_by_sequence(rows, where)
        return self._keep(rows, where)

    def _keep(self, rows: Tensor, where: Where) -> Tensor:
        if self.ties == "keep":
            return super().keep(rows, where)
        scores = self.score(rows, where)
        return naive.first_in_order(scores, naive.top_p_count(naive.sorted_descending(scores), self.p))

    def _keep_by_sequence(self, rows: Tensor, where: Where) -> Tensor:
        mask = torch.ones_like(rows, dtype=torch.bool)
        for number in where.sequence.unique():
            members = where.sequence == number
            if where.counted is not None:
                members &= where.counted
            if members.any():
                flat = rows[members].reshape(1, -1)
                mask[members] = self._keep(flat, where).view(-1, rows.shape[-1])
        return mask

    def fused(self, width: int) -> Cut | None:
        """Return the cutoff for the fused kernel.

        Args:
            width: As in `Rule.fused`.
        """
        plain = self.scope == "token" and self.ties == "keep"
        return Cut("top_p", self.p, self.power) if plain else None
