"""layerwise: another rule with a strength of its own in every layer, on a path from dense to the sparsest there is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from dllm_sparsity import registry
from dllm_sparsity.errors import UserError
from dllm_sparsity.sparsity.rule import Rule, Where

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

_SHORT_OF_THE_END = 0.99


@dataclass(frozen=True)
class Layerwise(Rule):
    """Give each layer the base rule at the strength that a path has for it at t.

    Args:
        t: How far along the path, in [0, 1]; 0 is dense, 1 the sparsest.
        base: Name of the rule that acts in every layer.
        path: A table of strengths: rows from dense to the sparsest at even steps of t, straight lines between them; one
            column for each layer, or each group of layers. None takes all layers from dense to the sparsest alike.
        groups: The layers that each column stands for; column i is layer i when None.
        parameters: The base rule's other parameters, by name.

    Source: Liu et al. 2024 (TEAL), https://arxiv.org/abs/2408.14690, for a greedy allocation of sparsity to parts of a
        model. Differs: a rule holds any allocation, whole layers are its parts, and how one is found is not its matter.
    """

    t: float
    base: str = "top_p"
    path: tuple[tuple[float, ...], ...] | None = None
    groups: tuple[tuple[int, ...], ...] | None = None
    parameters: Any = ()
    _columns: dict[int, int] | None = field(init=False, repr=False, compare=False, default=None)

    dense: ClassVar[float] = 0.0
    denser_upwards: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.check_range()
        if not isinstance(self.base, str) or self._kind is Layerwise:
            raise UserError(f"layerwise cannot act through {self.base!r}", "give base the name of another rule")
        object.__setattr__(self, "parameters", _pairs(self.parameters))
        if self.path is not None:
            object.__setattr__(self, "path", _table(self.path, "path", float))
        elif self.groups is not None:
            raise UserError("layerwise: groups without a path", "give the path whose columns they are")
        if self.groups is not None:
            object.__setattr__(self, "groups", _table(self.groups, "groups", int))
        object.__setattr__(self, "_columns", self._placed())
        self._check_path()

    @property
    def _kind(self) -> type[Rule]:
        return registry.get("rules", self.base)

    @property
    def strength(self) -> float:
        """How far along the path."""
        return self.t

    def at(self, layer: int) -> Rule:
        """Return the base rule at a layer's strength.

        Args:
            layer: Index of the layer.

        Raises:
            UserError: The path has no column for the layer.
        """
        return self._based(self._strength(layer))

    def keep(self, rows: Float[Tensor, "rows width"], where: Where) -> Bool[Tensor, "rows width"]:
        """Mark the entries that stay.

        Args:
            rows: As in `Rule.keep`.
            where: As in `Rule.keep`.
        """
        return self.at(where.layer).keep(rows, where)

    def _strength(self, layer: int) -> float:
        kind = self._kind
        if self.path is None or self._columns is None:
            return kind.dense + self.t * (_sparsest(kind) - kind.dense)
        if layer not in self._columns:
            raise UserError(
                f"layerwise: the path has no column for layer {layer}", f"it has {sorted(self._columns)}; mend the path"
            )
        place = self.t * (len(self.path) - 1)
        row = min(int(place), len(self.path) - 2)
        start, end = (self.path[index][self._columns[layer]] for index in (row, row + 1))
        return end if place == row + 1 else start + (place - row) * (end - start)  # a layer that stays dense is exact

    def _based(self, strength: float) -> Rule:
        try:
            return self._kind(strength, **dict(self.parameters))  # pyright: ignore[reportCallIssue]
        except TypeError as error:
            raise UserError(f"layerwise: {self.base} takes no such parameters ({error})", "mend parameters") from error

    def _placed(self) -> dict[int, int] | None:
        """Return layer -> column."""
        if self.path is None:
            return None
        groups = self.groups if self.groups is not None else tuple((layer,) for layer in range(len(self.path[0])))
        columns = {layer: column for column, group in enumerate(groups) for layer in group}
        if len(groups) != len(self.path[0]) or len(columns) != sum(map(len, groups)):
            raise UserError("layerwise: groups do not fit the path", "give each column its layers, each layer once")
        return columns

    def _check_path(self) -> None:
        kind = self._kind
        if self.path is None:
            if not math.isfinite(_sparsest(kind)):
                raise UserError(f"layerwise: the strength of {self.base} has no upper end", "give a path")
            return
        if len(self.path) < 2 or len({len(row) for row in self.path}) > 1:
            raise UserError("layerwise: the path is no table", "give two rows or more, of one length")
        if any(value != kind.dense for value in self.path[0]):
            raise UserError(f"layerwise: the path does not begin dense ({kind.dense:g})", "mend its first row")
        for value in {value for row in self.path for value in row}:
            self._based(value)  # the base rule says what it does not know


def _sparsest(kind: type[Rule]) -> float:
    if not kind.denser_upwards:
        return kind.high
    return kind.dense + _SHORT_OF_THE_END * (kind.low - kind.dense) if kind.open_low else kind.low


def _table(rows: Iterable[Iterable[Any]], name: str, kind: type) -> tuple[tuple[Any, ...], ...]:
    """Return rows as tuples of numbers; a study's YAML has lists."""
    try:
        return tuple(tuple(kind(value) for value in row) for row in rows)
    except (TypeError, ValueError) as error:
        raise UserError(f"layerwise: {name} is no table of numbers", "give rows of numbers") from error


def _pairs(parameters: Any) -> tuple[tuple[str, Any], ...]:
    """Return named parameters in a form that has a hash."""
    pairs = parameters.items() if isinstance(parameters, Mapping) else parameters
    try:
        return tuple(sorted((str(name), value) for name, value in pairs))
    except (TypeError, ValueError) as error:
        raise UserError("layerwise: parameters are no names with values", "give a mapping") from error
