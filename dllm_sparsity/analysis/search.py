"""The search for critical sparsity: which strength is measured next, on which items, and when it is enough."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dllm_sparsity.analysis.profile import Column, Profile, Threshold, profile

FIRST_ITEMS = 64
LADDER = (0.0, 0.05, 0.15, 0.3, 0.5, 0.75, 1.0)
"""Shares of the way from dense to the sparsest strength."""
_GROWTH, _LEAP, _SPARE = 1.25, 2.0, 1.1
"""Items of a round, in those of the round before: at least, at most, and beyond what the width seems to need."""
_MOST, _MOST_AT_LAST = 12, 4
"""Strengths that a round may measure for one retention; the last round, on all items, is the dear one."""
_PART = 16
"""A strength counts in a round when it was measured on this part of its items."""
_OUT = 0.9
"""Where strengths are put, in shares of the way from the estimate to the ends of the interval."""
_NEAR, _SAME, _CLOSE = 0.3, 0.2, 0.1
"""In widths: how near a strength serves a place, may be taken in its stead, and serves an end where a gap costs."""
_LOSS = 0.15
"""What a gap between strengths may cost, in widths."""
_STEEP = 1.6
"""How much wider the interval may be, were its upper end as sure as three standard errors."""
_DOUBT = 1.0
"""A place may be a miss when its margin is so few standard errors above zero."""


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
    """

    width: float
    items: int
    budget: int | None = None


@dataclass
class Goal:
    """What is found for one retention; changes while the search goes on.

    Args:
        threshold: What is asked.
        profile: The curve around the crossing; None before the first answer.
        items: Items behind it.
        stopped: Why it ended: `width`, `items` or `budget`; empty while it goes on.
    """

    threshold: Threshold
    profile: Profile | None = None
    items: int = 0
    stopped: str = ""


class OutOfBudget(Exception):
    """The next block costs more than what is left."""


def boundaries(items: int) -> list[int]:
    """Return where blocks of items end: the same for every strength and site, so that sealed blocks are shared.

    Args:
        items: Items there are.
    """
    ends, size = [], float(FIRST_ITEMS)
    while round(size) < items:
        ends.append(round(size))
        size *= _GROWTH
    return [*ends, items]


class Search:
    """Look for the critical sparsity of one curve at one or several retentions.

    Few items are measured up a ladder of strengths until one fails beyond doubt. Then rounds follow, each on more
    items: two or three strengths near the ends of the interval are measured on all items of the round, placed by what
    the round before told, and the crossing is read from a smooth curve through all strengths measured so far. A round
    is followed by another while the interval is wider than asked. All comparisons are paired by item; a strength left
    behind keeps its say by the items it has, and is measured again where it may be a miss below the crossing. The stop
    looks at the width alone, never at the place, which leaves the interval its coverage.

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
        self._ends = boundaries(limits.items)

    def run(self) -> Generator[Ask, Column, list[Goal]]:
        """Yield what is to be measured, be sent what came out, return what was found."""
        try:
            yield from self._rounds()
        except OutOfBudget:
            for goal in self.goals:
                goal.stopped = goal.stopped or "budget"
        return self.goals

    def _rounds(self) -> Generator[Ask, Column, None]:
        items = self._ends[0]
        yield from self._dense(items)
        yield from self._climb(items)
        while True:
            for goal in self._open():
                yield from self._settle(goal, items)
            for goal in self._open():
                if goal.profile is not None and self._is_narrow(goal.profile):
                    goal.stopped = "width"
                elif items == self.limits.items:
                    goal.stopped = "items"
            if not self._open():
                return
            items = self._next_items(items)
            yield from self._dense(items)

    def _is_narrow(self, found: Profile) -> bool:
        """Tell whether a width can be believed: few items may fake a fall, but not one of three standard errors."""
        wide = found.sure - found.low > _STEEP * self.limits.width and found.crosses
        return found.width <= self.limits.width and not wide

    def _open(self) -> list[Goal]:
        return [goal for goal in self.goals if not goal.stopped]

    def _next_items(self, items: int) -> int:
        """Return how many items the widest open interval needs, as far as the budget allows."""
        wanted = max(goal.profile.width for goal in self._open() if goal.profile is not None) / self.limits.width
        target = items * min(_LEAP, max(_GROWTH, _SPARE * wanted**2))
        ends = [end for end in self._ends if end > items]
        chosen = next((end for end in ends if end >= target), ends[-1])
        if _SPARE * wanted**2 * items > chosen > ends[-1] / 2:
            chosen = ends[-1]  # no round that would be followed by one little larger
        if self.limits.budget is None:
            return chosen
        left = self.limits.budget - self.spent
        fitting = [end for end in ends if end <= chosen and 2 * end - items <= left]
        if not fitting:
            raise OutOfBudget
        return fitting[-1]

    def _dense(self, items: int) -> Generator[Ask, Column, None]:
        for start, stop in self._blocks(len(self.dense) if self.dense else 0, items):
            block = yield from self._take(Ask(None, start, stop))
            self.dense = self.dense.joined(block) if self.dense else block

    def _measure(self, strength: float, items: int) -> Generator[Ask, Column, None]:
        for start, stop in self._blocks(len(self.columns.get(strength, ())), items):
            block = yield from self._take(Ask(strength, start, stop))
            before = self.columns.get(strength)
            self.columns[strength] = before.joined(block) if before else block

    def _take(self, ask: Ask) -> Generator[Ask, Column, Column]:
        self.spent += ask.stop - ask.start
        if self.limits.budget is not None and self.spent > self.limits.budget:
            self.spent -= ask.stop - ask.start
            raise OutOfBudget
        return (yield ask)

    def _blocks(self, have: int, items: int) -> list[tuple[int, int]]:
        ends = [have, *(end for end in self._ends if have < end <= items)]
        return list(pairwise(ends))

    def _climb(self, items: int) -> Generator[Ask, Column, None]:
        """Go up the ladder until a strength misses every threshold beyond doubt."""
        for strength in self.ladder[1:]:
            yield from self._measure(strength, items)
            own = [profile(self._base(items), [self.columns[strength]], goal.threshold) for goal in self.goals]
            if all(each.fails for each in own):
                return

    def _base(self, items: int) -> Column:
        if self.dense is None:
            raise RuntimeError("dense comes first")
        return self.dense.first(items)

    def _settle(self, goal: Goal, items: int) -> Generator[Ask, Column, None]:
        """Measure strengths on all items of the round until more would not narrow the interval much."""
        found = self._profile(goal, items)
        for _ in range(_MOST_AT_LAST if items == self.limits.items else _MOST):
            if found is not None and self._is_narrow(found):
                break
            target = self._target(found, goal, items)
            strength = None if target is None else self._strength(target, found or goal.profile, items)
            if strength is None:
                break
            yield from self._measure(strength, items)
            found = self._profile(goal, items)
        if found is not None:
            goal.profile, goal.items = found, items

    def _profile(self, goal: Goal, items: int) -> Profile | None:
        if all(len(column) < items for column in self.columns.values()):
            return None
        return profile(*self.measured(items), goal.threshold, self.ended)

    def measured(self, items: int) -> tuple[Column, list[Column]]:
        """Return dense and the strengths that a curve on the first items is read from, ascending in sparsity.

        Args:
            items: How many; some strength was measured on all of them.
        """
        ordered = sorted(self.columns.values(), key=lambda column: column.sparsity)
        chosen = [column.first(items) for column in ordered if len(column) * _PART >= items]
        beyond = [column for column in ordered if column.sparsity > chosen[-1].sparsity][:1]
        return self._base(items), chosen + beyond

    @property
    def ended(self) -> bool:
        """Whether the sparsest strength there is was measured."""
        return self.ladder[-1] in self.columns

    def _target(self, found: Profile | None, goal: Goal, items: int) -> float | None:
        """Return the sparsity at which a point is missing, or None where nothing is."""
        curve, shrunk = found, 1.0
        if curve is None:
            curve, shrunk = goal.profile, math.sqrt(goal.items / items)
        if curve is None:
            return None
        low, high = (curve.estimate + shrunk * (end - curve.estimate) for end in curve.within_reach)
        last, width = float(curve.points[-1]), max(high - low, self.limits.width / 2)
        if not curve.fails and not self.ended and high >= last:
            return _above(curve)
        if items < self.limits.items and (doubtful := self._doubtful(curve, items)):
            return doubtful[0]
        whole = [column.sparsity for column in self.columns.values() if len(column) >= items]
        lost = sorted([(low - curve.low, low), (curve.high - high, high)], reverse=True)
        places = [(curve.estimate + _OUT * (end - curve.estimate), _NEAR) for _, end in lost]
        if items == self.limits.items:
            places += [(end, _CLOSE) for loss, end in lost if loss > _LOSS * width]
        for place, reach in places:
            place = min(place, last)
            if min((abs(own - place) for own in whole), default=math.inf) > reach * width:
                return place
        return None

    def _doubtful(self, curve: Profile, items: int) -> list[float]:
        """Return measured places below the estimate that may be a miss, and with it the first one."""
        near = curve.points[(curve.margins < _DOUBT * curve.errors) & (curve.points < curve.estimate)]
        few = [column.sparsity for column in self.columns.values() if len(column) < items]
        return sorted(own for own in few if np.isclose(own, near).any())

    def _strength(self, target: float, near: Profile | None, items: int) -> float | None:
        """Return the strength that gives a sparsity, a measured one where it is close; None where there is no other."""
        order = sorted(self.columns, key=lambda strength: self.columns[strength].sparsity)
        places = np.array([0.0, *(self.columns[strength].sparsity for strength in order)])
        width = near.width if near is not None else 0.0
        for strength, place in zip(order, places[1:], strict=True):
            if len(self.columns[strength]) < items and abs(place - target) <= _SAME * width:
                return strength
        if target > places[-1] + 1e-9:
            return next((rung for rung in self.ladder[1:] if rung not in self.columns), None)
        strength = round(float(np.interp(target, places, [self.ladder[0], *order])), 5)
        return None if strength == self.ladder[0] or len(self.columns.get(strength, ())) >= items else strength


def _above(found: Profile) -> float:
    """Return a place beyond the last point, where its margin is likely to be a clear miss."""
    run = found.points[-1] - found.points[-2]
    slope = (found.margins[-2] - found.margins[-1]) / run if run > 0 else 0.0
    short = found.margins[-1] + 2.3 * found.errors[-1]
    step = short / slope if slope > 0 else run
    return float(found.points[-1] + np.clip(step, 0.25 * run, 2 * run))
