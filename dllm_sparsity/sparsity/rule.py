"""The contract of a rule: which activations of a row are kept."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from dllm_sparsity.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class Where:
    """Where the rows come from.

    Args:
        layer: Index of the layer.
        site: A primitive site name.
        weight: Weight of the linear that consumes the rows, `[out, width]`; None where the family knows none.
        sequence: Batch row that each row belongs to.
        counted: False for padding; padding must not influence other rows.
    """

    layer: int
    site: str
    weight: Tensor | None
    sequence: Int[Tensor, "rows"]
    counted: Bool[Tensor, "rows"] | None


@dataclass(frozen=True)
class Cut:
    """How a rule finds a row's cutoff on magnitudes, in the form that the fused kernel knows.

    Args:
        kind: `top_p`, `top_k`, `max_p` or `threshold`.
        value: p, the number of entries, p, or the threshold.
        power: For top_p: mass of |x|**power.
    """

    kind: Literal["top_p", "top_k", "max_p", "threshold"]
    value: float
    power: float = 1.0


class Rule(ABC):
    """Choose the activations that stay; the others become zero.

    Subclasses are frozen dataclasses. The first field is the main parameter, named as in the literature and called
    `strength` on the command line.
    """

    dense: ClassVar[float]
    """Strength at which the model is untouched, bit for bit."""
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0
    open_low: ClassVar[bool] = False
    """Whether `low` itself is out of range."""
    denser_upwards: ClassVar[bool]
    """Whether a larger strength keeps more."""

    @property
    @abstractmethod
    def strength(self) -> float:
        """The main parameter."""

    @property
    def is_dense(self) -> bool:
        """Whether this rule keeps everything."""
        return self.strength == self.dense

    @property
    def by_row(self) -> bool:
        """Whether what is kept of a row depends on that row alone, and on its last bits hardly.

        One row may then stand for several that are equal but for rounding. A rule has to say so.
        """
        return False

    @abstractmethod
    def keep(self, rows: Float[Tensor, "rows width"], where: Where) -> Bool[Tensor, "rows width"]:
        """Mark the entries that stay.

        Args:
            rows: One token's vector a row. Never holds padding only; rows with NaN or Inf are put back afterwards.
            where: Where the rows come from.
        """

    def at(self, layer: int) -> Rule:
        """Return the rule that acts in a layer: this one, unless a rule tells layers apart.

        Args:
            layer: Index of the layer.
        """
        return self

    def fused(self, width: int) -> Cut | None:
        """Return the cutoff for the fused kernel, or None where only `keep` knows.

        Args:
            width: Entries of a row.
        """
        return None

    def check_range(self) -> None:
        """Refuse a strength that this rule does not know.

        Raises:
            UserError: It is out of range or not a number.
        """
        value, name = self.strength, type(self).__name__
        if (
            not isinstance(value, int | float)
            or not math.isfinite(value)
            or not self.low <= value <= self.high
            or (self.open_low and value == self.low)
        ):
            left = "(" if self.open_low else "["
            right = "inf)" if math.isinf(self.high) else f"{self.high:g}]"
            raise UserError(
                f"strength {value!r} is out of range for {name}",
                f"give a number in {left}{self.low:g}, {right}; {self.dense:g} is dense",
            )


def acting(rule: Rule | None, layer: int) -> Rule | None:
    """Return what acts in a layer; None where everything is kept, so that the layer is left alone.

    Args:
        rule: As a user gave it.
        layer: Index of the layer.
    """
    own = None if rule is None or rule.is_dense else rule.at(layer)
    return None if own is None or own.is_dense else own


class CutoffRule(Rule):
    """Keep what scores at least the row's cutoff, ties included; this is the form that kernels fuse."""

    @property
    def by_row(self) -> bool:
        """True: score and cutoff are a row's own."""
        return True

    def score(self, rows: Float[Tensor, "rows width"], where: Where) -> Float[Tensor, "rows width"]:
        """Return what entries are ranked by; the magnitude unless a rule says otherwise.

        Args:
            rows: As in `keep`.
            where: As in `keep`.
        """
        return rows.abs()

    @abstractmethod
    def cutoff(self, scores: Float[Tensor, "rows width"]) -> Float[Tensor, "rows 1"]:
        """Return the lowest score that is kept in each row.

        Args:
            scores: From `score`.
        """

    def keep(self, rows: Float[Tensor, "rows width"], where: Where) -> Bool[Tensor, "rows width"]:
        """Mark the entries that stay.

        Args:
            rows: As in `Rule.keep`.
            where: As in `Rule.keep`.
        """
        scores = self.score(rows, where)
        return scores >= self.cutoff(scores)
