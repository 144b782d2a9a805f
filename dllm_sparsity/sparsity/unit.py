"""A rule with its own counters and clock, on some layers and sites: what is attached, however it is reached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dllm_sparsity.errors import UserError
from dllm_sparsity.sparsity.action import Action
from dllm_sparsity.sparsity.clock import Clock, FreeClock
from dllm_sparsity.sparsity.ledger import Ledger, Point
from dllm_sparsity.sparsity.reading import Reading
from dllm_sparsity.sparsity.rule import Rule, acting

if TYPE_CHECKING:
    from dllm_sparsity.sparsity.metric import Metric
    from dllm_sparsity.sparsity.sites import FFN


class Unit:
    """A rule, and what is counted of it.

    Args:
        points: Layer and site of each place where it acts.
        rule: What to keep; None only counts.
        clock: Says where each forward pass stands.
        metrics: What is counted about each row.

    Raises:
        UserError: The rule is none.
    """

    def __init__(
        self, points: Sequence[tuple[FFN, str]], rule: Rule | None, clock: Clock, metrics: Sequence[Metric]
    ) -> None:
        if rule is not None and not isinstance(rule, Rule):
            raise UserError(f"{rule!r} is not a rule", "give one such as TopP(0.9), or None to count only")
        self.rule, self.clock = rule, clock
        self.ledger = Ledger(
            [Point(ffn.layer, site, ffn.device_of, ffn.points[site].width, ffn.experts) for ffn, site in points],
            metrics,
        )
        self.actions = [
            Action(number, ffn, site, ffn.points[site], acting(rule, ffn.layer), clock, self.ledger)
            for number, (ffn, site) in enumerate(points)
        ]

    def listen(self) -> None:
        """Let the clock drive the ledger."""
        self.ledger.by_row = all(action.rule is None or action.rule.by_row for action in self.actions)
        if self.clock.items and not isinstance(self.clock, FreeClock):  # a request batch is open already
            self.ledger.begin(self.clock)
            self.ledger.tick(self.clock)
        self.clock.listeners.append(self.ledger)
        if isinstance(self.clock, FreeClock):
            self.clock.start()

    def leave(self, keep: bool) -> None:
        """Let the clock go.

        Args:
            keep: Whether a request batch that is still open counts so far.
        """
        if self.ledger in self.clock.listeners:
            if keep:
                self.ledger.flush(self.clock)
            self.clock.listeners.remove(self.ledger)

    def read(self, notes: Sequence[str] = ()) -> Reading:
        """Return everything counted so far.

        Args:
            notes: What else the reader should know.

        Raises:
            NonFiniteError: An activation was NaN or infinite.
        """
        self._flush()
        return self.ledger.read([*notes, *self.clock.notes])

    def take(self, notes: Sequence[str] = ()) -> Reading:
        """Return what was counted since the last take and forget it, so that the takes of a run add up to its counts.

        Args:
            notes: As in `read`.

        Raises:
            NonFiniteError: An activation was NaN or infinite.
        """
        self._flush()
        return self.ledger.take([*notes, *self.clock.notes])

    def _flush(self) -> None:
        if self.ledger in self.clock.listeners:
            self.ledger.flush(self.clock)
