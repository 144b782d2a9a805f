"""The search for critical sparsity: which strength is measured next, on which items, and when it is enough."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from dllm_sparsity.analysis.column import Column, Threshold
from dllm_sparsity.analysis.profile import Profile, profile

FIRST_ITEMS = 64
LADDER = (0.0, 0.05, 0.15, 0.3, 0.5, 0.75, 1.0)
"""Shares of the way from dense to the sparsest strength."""
_GROWTH, _LEAP, _SPARE = 1.25, 1.4, 1.1
"""All items after a round, in those before it: at least, at most, and beyond what the width seems to need."""
LEAST_BLOCK, _BLOCKS = 16, 16
"""Items of the smallest block; and no block is larger than this part of the items, unless that is smaller still."""
_TURNS, _QUARTER = 3, 0.25
"""How often the items are gone through where strengths change other items, and the part of them in a later round."""
_MOST = 4
"""Strengths that a round may measure for one retention."""
_GAIN, _LATE_GAIN = 0.06, 0.045
"""Share of the doubt that another strength must take away: on items at hand, and in a later turn."""
_NEAR = 0.1
"""How near a measured strength serves a place, in widths."""
_BESIDE = 0.5
"""How far from the interval a strength may be measured, in widths."""
_STEEP = 1.6
"""How much wider the interval may be, were its upper end as sure as three standard errors."""


@dataclass(frozen=True)
class Ask:
    """A block of items to be measured at one strength.

    Args:
        strength: None asks for the dense model.
        start: First item, in the search's order.
        stop: One behind the last.
    """

    strength: float | None
    start: int
    stop: int


@dataclass(frozen=True)
class Limits:
    """When a search ends.

    Args:
        width: The interval is narrow enough, in sparsity.
        items: Items there are.
        budget: Most item-evaluations, dense ones included; None for no limit.
        least: Items of the smallest block.
    """

    width: float
    items: int
    budget: int | None = None
    least: int = LEAST_BLOCK


@dataclass
class Goal:
    """What is found for one retention; changes while the search goes on.

    Args:
        threshold: What is asked.
        profile: The curve around the crossing; None before the first answer.
        items: Items behind it.
        stopped: Why it ended: `width`, `items`, `budget` or `values`; empty while it goes on.
    """

    threshold: Threshold
    profile: Profile | None = None
    items: int = 0
    stopped: str = ""


class OutOfBudget(Exception):
    """The next block costs more than what is left."""


class OutOfValues(Exception):
    """No item that was measured at a strength has a value, or none of one task."""


def boundaries(items: int, least: int = LEAST_BLOCK) -> list[int]:
    """Return where blocks of items end: the same for every strength and site, so that sealed blocks are shared.

    Args:
        items: Items there are.
        least: Items of the smallest block, if there are so many.
    """
    ends, size = [], float(max(FIRST_ITEMS, 2 * least))
    while round(size) + least <= items:
        ends.append(round(size))
        size += max(least, min(size * (_GROWTH - 1), items / _BLOCKS))
    return [*ends, items]


class Search:
    """Look for the critical sparsity of one curve at one or several retentions.

    Few items are measured up a ladder of strengths until one fails beyond doubt. Then rounds follow, each on new items:
    they are measured at the strength that is likely to take away most doubt of where the curve crosses the threshold,
    and at another one where that still takes away a good part. The crossing is read from a smooth curve through all
    strengths, each on the items it has, all paired with dense. Rounds go on while the interval is wider than asked.
    Where an answer is right or wrong, other strengths change other items, and the items are gone through again. The
    stop looks at the width alone, never at the place, which leaves the interval its coverage.

    Args:
        ladder: Strengths from dense on, each sparser than the one before; the first is dense.
        thresholds: One for each retention.
        limits: When to end.

    Source: Chow and Robbins 1965, On the asymptotic theory of fixed-width sequential confidence intervals for the mean.
    """

    def __init__(self, ladder: Sequence[float], thresholds: Sequence[Threshold], limits: Limits) -> None:
        self.ladder, self.limits = tuple(ladder), limits
        self.goals = [Goal(threshold) for threshold in thresholds]
        self.dense: Column | None = None
        self.columns: dict[float, Column] = {}
        self.spent = 0
        self._ends = boundaries(limits.items, limits.least)
        self._turn, self._turns = 1, _TURNS if all(own.bounded for own in thresholds) else 1
        self._round, self._here = range(0), set[float]()  # the items at hand, and strengths measured on some of them

    def run(self) -> Generator[Ask, Column, list[Goal]]:
        """Yield what is to be measured, be sent what came out, return what was found."""
        try:
            yield from self._rounds()
        except (OutOfBudget, OutOfValues) as end:
            why = "budget" if isinstance(end, OutOfBudget) else "values"
            for goal in self.goals:
                narrow = goal.profile is not None and self._is_narrow(goal.profile)
                goal.stopped = goal.stopped or ("width" if narrow else why)
        return self.goals

    def _rounds(self) -> Generator[Ask, Column, None]:
        yield from self._open_round(0, self._ends[0])
        yield from self._climb()
        while True:
            for goal in self._open():
                yield from self._settle(goal)
            for goal in self._open():
                if goal.profile is not None and self._is_narrow(goal.profile):
                    goal.stopped = "width"
                elif self._round.stop == self.limits.items and self._turn == self._turns:
                    goal.stopped = "items"
            if not self._open():
                return
            start = self._round.stop
            if start == self.limits.items:
                self._turn, start = self._turn + 1, 0
            yield from self._open_round(start, self._next_stop(start))

    def _open_round(self, start: int, stop: int) -> Generator[Ask, Column, None]:
        self._round = range(start, stop)
        self._here = {at for at, own in self.columns.items() if ((own.items >= start) & (own.items < stop)).any()}
        for block in self._blocks() if self._turn == 1 else []:
            answer = yield from self._take(Ask(None, *block))
            self.dense = _valued(self.dense.joined(answer) if self.dense else answer)

    def _is_narrow(self, found: Profile) -> bool:
        """Tell whether a width can be believed: few items may fake a fall, but not one of three standard errors."""
        wide = found.sure - found.low > _STEEP * self.limits.width and found.crosses
        return found.width <= self.limits.width and not wide

    def _open(self) -> list[Goal]:
        return [goal for goal in self.goals if not goal.stopped]

    def _next_stop(self, start: int) -> int:
        """Return where the next round ends: by what the narrowest open interval needs, as far as the budget allows."""
        ends = [end for end in self._ends if end > start]
        if self._turn > 1:
            target = start + _QUARTER * self.limits.items
        else:
            wanted = min(goal.profile.width for goal in self._open() if goal.profile is not None) / self.limits.width
            target = start * min(_LEAP, max(_GROWTH, _SPARE * wanted**2))
        chosen = next((end for end in ends if end >= target), ends[-1])
        if self.limits.budget is None:
            return chosen
        left, each = self.limits.budget - self.spent, 2 if self._turn == 1 else 1
        fitting = [end for end in ends if end <= chosen and each * (end - start) <= left]
        if not fitting:
            raise OutOfBudget
        return fitting[-1]

    def _measure(self, strength: float) -> Generator[Ask, Column, None]:
        for block in self._blocks():
            answer = yield from self._take(Ask(strength, *block))
            before = self.columns.get(strength)
            self.columns[strength] = _valued(before.joined(answer) if before else answer)
        self._here.add(strength)

    def _take(self, ask: Ask) -> Generator[Ask, Column, Column]:
        self.spent += ask.stop - ask.start
        if self.limits.budget is not None and self.spent > self.limits.budget:
            self.spent -= ask.stop - ask.start
            raise OutOfBudget
        answer = yield ask
        return replace(answer, item=np.arange(ask.start, ask.stop))

    def _blocks(self) -> list[tuple[int, int]]:
        inside = [end for end in self._ends if self._round.start < end <= self._round.stop]
        return list(pairwise([self._round.start, *inside]))

    def _climb(self) -> Generator[Ask, Column, None]:
        """Go up the ladder until a strength misses every threshold beyond doubt."""
        for strength in self.ladder[1:]:
            yield from self._measure(strength)
            own = [profile(self._base(), [self.columns[strength]], goal.threshold) for goal in self.goals]
            if all(each.fails for each in own):
                return

    def _base(self) -> Column:
        if self.dense is None:
            raise RuntimeError("dense comes first")
        return self.dense

    def _settle(self, goal: Goal) -> Generator[Ask, Column, None]:
        """Measure strengths on the items at hand until another would not take away much doubt."""
        found = self._look(goal)
        for _ in range(_MOST):
            strength = self._strength(found)
            if strength is None:
                return
            yield from self._measure(strength)
            found = self._look(goal)

    def _look(self, goal: Goal) -> Profile:
        dense, sparse = self.measured(len(self._base()))
        goal.profile, goal.items = profile(dense, sparse, goal.threshold, self.ended, self._round), len(dense)
        return goal.profile

    def measured(self, items: int) -> tuple[Column, list[Column]]:
        """Return dense and the strengths that a curve on the first items is read from.

        Args:
            items: How many.
        """
        columns = [own.first(items) for own in self.columns.values()]
        return self._base().first(items), [own for own in columns if len(own)]

    @property
    def ended(self) -> bool:
        """Whether the sparsest strength there is was measured."""
        return self.ladder[-1] in self.columns

    def _strength(self, found: Profile) -> float | None:
        """Return the strength that is measured next on the items at hand, a known one where it is close."""
        place = self._place(found)
        if place is None:
            return None
        order = sorted(self.columns, key=lambda strength: self.columns[strength].sparsity)
        places = [self.columns[strength].sparsity for strength in order]
        for strength, known in zip(order, places, strict=True):
            if strength not in self._here and abs(known - place) <= _NEAR * found.width:
                return strength
        if place > places[-1] + 1e-9:
            return next((rung for rung in self.ladder[1:] if rung not in self.columns), None)
        strength = round(float(np.interp(place, [0.0, *places], [self.ladder[0], *order])), 5)
        return None if strength == self.ladder[0] or strength in self._here else strength

    def _place(self, found: Profile) -> float | None:
        """Return the sparsity at which a point takes away most doubt, or None where none takes away enough.

        Of an interval that is narrow, an end that was drawn between points far off is measured before it is believed.
        """
        if found.crosses and self._is_narrow(found):
            return found.unseen
        last = found.points[-1]
        if not found.fails and not self.ended and found.high >= last:
            return found.beyond
        here = np.array([self.columns[strength].sparsity for strength in self._here])
        width = found.high - found.low
        least, most = max(found.low - _BESIDE * width, 1e-9), min(found.high + _BESIDE * width, last)
        near = [n for n, place in enumerate(found.candidates) if least <= place <= most]
        free = [n for n in near if (abs(here - found.candidates[n]) > _NEAR * width).all()]
        enough = _LATE_GAIN if self._turn > 1 else _GAIN if self._here else 0.0
        left = {n: found.doubt(n) for n in free}
        best = min(free, key=lambda n: left[n], default=None)
        return None if best is None or left[best] >= (1 - enough) * found.doubt() else float(found.candidates[best])


def _valued(column: Column) -> Column:
    """Return a column of which every task has a value, so that there is a quality."""
    stratum = np.zeros(len(column), dtype=np.int64) if column.stratum is None else column.stratum
    if not np.bincount(stratum, column.weight).all():
        raise OutOfValues
    return column
