"""Several rules in one forward pass: it holds a copy of a request batch for each, one copy behind the other."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from dllm_sparsity.errors import UserError
from dllm_sparsity.sparsity.attachment import Attachment, make_metrics
from dllm_sparsity.sparsity.clock import Clock, Compare, Slot, TokenState
from dllm_sparsity.sparsity.unit import Unit

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor, nn

    from dllm_sparsity.sparsity.rule import Rule
    from dllm_sparsity.sparsity.sites import Act


@dataclass(frozen=True)
class Copy:
    """What a batch row of a stacked forward pass belongs to.

    Args:
        number: Of the copy, from 0.
        item: As the copy's own clock is told.
    """

    number: int
    item: Hashable


class StackClock(Clock):
    """Pass on to each copy's own clock what a loop says of all copies together.

    Items are `Copy`s, as many of each copy: all of copy 0 first, then those of copy 1, and so on.

    Args:
        copies: How many copies a forward pass holds.
    """

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.parts = [Clock() for _ in range(copies)]

    @property
    def may_share(self) -> bool:
        """Whether all copies' clocks say so."""
        return all(part.may_share for part in self.parts)

    def begin(self, items: Sequence[Hashable], forwards: int = 1, weights: Sequence[int] | None = None) -> None:
        """Start a request batch on every clock.

        Args:
            items: As in `Clock.begin`, each a `Copy`.
            forwards: As in `Clock.begin`.
            weights: As in `Clock.begin`.

        Raises:
            ValueError: The copies do not stand one behind the other, or are not of one size.
        """
        size = len(items) // len(self.parts)
        wanted = [number for number in range(len(self.parts)) for _ in range(size)]
        if [getattr(item, "number", None) for item in items] != wanted:
            raise ValueError(f"begin: {len(items)} items are not {len(self.parts)} copies, one behind the other")
        self.items, self.weights = list(items), None if weights is None else list(weights)
        for number, part in enumerate(self.parts):
            own = slice(number * size, (number + 1) * size)
            part.begin([cast("Copy", item).item for item in items[own]], forwards, weights and weights[own])

    def tick(
        self, slot: Slot | Sequence[Slot], states: Int[Tensor, "batch seq"], compare: Compare = Compare.OFF
    ) -> None:
        """Announce the next forward pass to every clock.

        A copy whose texts are all finished would have stopped by now if it were alone, so it counts as padding.

        Args:
            slot: As in `Clock.tick`.
            states: As in `Clock.tick`, of all copies.
            compare: As in `Clock.tick`.

        Raises:
            ValueError: As in `Clock.tick`.
        """
        if len(states) != len(self.items):
            raise ValueError(f"tick: states of shape {tuple(states.shape)} for a batch of {len(self.items)} items")
        size = len(states) // len(self.parts)
        for number, part in enumerate(self.parts):
            rows = slice(number * size, (number + 1) * size)
            own = states[rows]
            own = own.masked_fill((own == TokenState.AFTER_EOS).all(), TokenState.PAD)
            part.tick(slot if isinstance(slot, Slot) else slot[rows], own, compare)

    def end(self) -> None:
        """Close the request batch on every clock."""
        for part in self.parts:
            part.end()
        self.items = []

    def _clear(self) -> None:
        super()._clear()
        for part in self.parts:
            part._clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let rules act on the forward passes inside, and count none of them."""
        items, weights = self.items, self.weights
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.paused())
            try:
                yield
            finally:
                self.items, self.weights = items, weights


class Stack(Attachment):
    """Several rules on one model for one `with` block, each on its own copy of the request batches.

    A rule acts on, and counts, what it would if its copy ran alone; the units know nothing of each other.

    Args:
        model: As in `sparsify`.
        rules: One for each copy.
        sites: As in `sparsify`.
        clock: Has one clock for each copy.
        layers: As in `sparsify`.
        metrics: As in `sparsify`.

    Raises:
        UserError: As in `sparsify`, or a layer shares its rows out among experts.

    Example:
        >>> clock = StackClock(2)  # doctest: +SKIP
        >>> with Stack(model, [TopP(0.9), TopP(0.8)], "all", clock) as stack:  # doctest: +SKIP
        ...     with clock.batch([Copy(0, "a"), Copy(1, "a")]):
        ...         clock.tick(Slot(Phase.LIKELIHOOD), states.repeat(2, 1))
        ...         model(input_ids.repeat(2, 1))
        >>> [unit.read().sparsity(site="input") for unit in stack.units]  # doctest: +SKIP
    """

    clock: StackClock

    def __init__(
        self,
        model: nn.Module,
        rules: Sequence[Rule | None],
        sites: str | Sequence[str],
        clock: StackClock,
        *,
        layers: Iterable[int] | None = None,
        metrics: Sequence[str] = ("density", "overlap"),
    ) -> None:
        super().__init__(model, sites, layers)
        if any(ffn.experts for ffn in self.ffns):
            raise UserError(
                "experts take the tokens of all copies together, so that several rules cannot be told apart",
                "leave stack at 1 for this model",
            )
        self.clock = clock
        self.units = [
            Unit(self._points, rule, part, make_metrics(metrics, True))
            for rule, part in zip(rules, clock.parts, strict=True)
        ]

    def rehearse(self) -> None:
        """Attach once without a request batch, so that `checked` says what a dry run can tell.

        Raises:
            UserError: A site never fired.
        """
        self.__enter__()
        self._detach()
        for unit in self.units:
            unit.leave(keep=False)

    def _dry_run(self) -> None:
        if not self.checked:  # a stack is attached anew for each batch
            super()._dry_run()

    def _apply(self, number: int) -> Act:
        actions = [unit.actions[number] for unit in self.units]

        def apply(tensor: Tensor, *_: object) -> Tensor:
            if len(tensor) % len(actions):
                raise ValueError(f"a site of shape {tuple(tensor.shape)} does not hold {len(actions)} copies")
            copies = tensor.chunk(len(actions))
            return torch.cat([action(own) for action, own in zip(actions, copies, strict=True)])

        return apply
