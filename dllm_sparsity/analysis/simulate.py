"""Simulated studies with a known answer: how often a search's interval holds it, and what the search costs.

python -m dllm_sparsity.analysis.simulate --studies 400 > dllm_sparsity/analysis/COVERAGE.md
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from dllm_sparsity.analysis.catalogue import WORLDS
from dllm_sparsity.analysis.critical import PAPER_GRID
from dllm_sparsity.analysis.search import LADDER, Goal, Limits, Search
from dllm_sparsity.analysis.simulated_grids import DRAWS, Grid, grids
from dllm_sparsity.analysis.worlds import Blend, BlendedSample, Sample, World, only_falls

NARROWEST, WIDEST = 0.002, 0.25
"""Between these a search is asked for an interval."""
_SIXTH, _WEAK = 6.0, 0.9


@dataclass(frozen=True)
class Tally:
    """What many simulated studies of one world came to; shares and means over studies.

    Args:
        world: The world.
        truth: Its critical sparsity.
        beyond: Whether no strength fails, so that the truth is the end of the range.
        studies: Number of simulated studies.
        covered: Share of searches whose interval holds the truth.
        too_high: Share whose interval lies above it.
        too_low: Share whose interval lies below it.
        width: Median width of the intervals.
        spent: Mean item-evaluations in the number of items.
        grid: What grids of the paper's values on as many items give.
    """

    world: World | Blend
    truth: float
    beyond: bool
    studies: int
    covered: float
    too_high: float
    too_low: float
    width: float
    spent: float
    grid: Grid

    @property
    def asked(self) -> float:
        """Return the width of the grid's intervals, drawn out until 95 % hold the truth."""
        return max(self.grid.width * self.grid.stretch, NARROWEST)

    @property
    def cheaper(self) -> float:
        """Return the grid's item-evaluations in those of the search."""
        return len(PAPER_GRID) * self.grid.items / (self.spent * self.world.items)

    def at_width(self, width: float) -> float:
        """Return the same for a grid that has a width with all its items, and needs fewer where the search is wider.

        Args:
            width: The grid's; a width falls with the square root of the items.
        """
        return self.cheaper / max(1.0, self.width / max(width, NARROWEST)) ** 2


def search_study(sample: Sample | BlendedSample, limits: Limits) -> tuple[Goal, int]:
    """Search one simulated study; return what was found and the item-evaluations spent.

    Args:
        sample: Its items.
        limits: When to end.
    """
    search = Search(LADDER, [sample.world.threshold], limits)
    asks = search.run()
    try:
        ask = next(asks)
        while True:
            ask = asks.send(sample.column(ask.strength or 0.0, ask.start, ask.stop))
    except StopIteration as end:
        return end.value[0], search.spent


def tally(world: World | Blend, studies: int, count: int) -> Tally:
    """Simulate studies of one world.

    Args:
        world: The world.
        studies: How many searches.
        count: How many grids; the width that is asked of the searches is theirs, once 95 % hold the truth.
    """
    truth, beyond = world.truth()
    grid = grids(world, count)
    asked = min(max(grid.width * grid.stretch, NARROWEST), WIDEST)
    limits = Limits(asked, world.items, least=world.least)
    sides, widths, spent = [], [], []
    for seed in range(studies):
        goal, evaluations = search_study(world.draw(seed), limits)
        spent.append(evaluations)
        if goal.profile is None:
            raise RuntimeError("a search without a budget ends with an answer")
        low, high = goal.profile.interval
        sides.append(1 if low > truth else -1 if high < truth and goal.profile.fails else 0)
        widths.append(high - low)
    side = np.array(sides)
    return Tally(
        world,
        truth,
        beyond,
        studies,
        covered=float((side == 0).mean()),
        too_high=float((side > 0).mean()),
        too_low=float((side < 0).mean()),
        width=float(np.median(widths)),
        spent=float(np.mean(spent)) / world.items,
        grid=grid,
    )


def table(tallies: Sequence[Tally]) -> str:
    """Return the table in Markdown.

    Args:
        tallies: One for each world.
    """
    head = (
        "| items | n | truth | studies, grids | search holds it | too low | too high | grid holds it | grid's width "
        "| width at 95 % | search's width | evaluations: grid / search | at the width at 95 % | at the grid's width |"
    )
    lines = [head, "|" + "---|" * 14]
    for own in tallies:
        name = own.world.name + (" (held out)" if own.world.held_out else "")
        truth = ("≥ " if own.beyond else "") + f"{100 * own.truth:.1f} %"
        lines.append(
            f"| {name} | {own.world.items} | {truth} | {own.studies}, {own.grid.count} "
            f"| {100 * own.covered:.1f} % | {100 * own.too_low:.1f} % | {100 * own.too_high:.1f} % "
            f"| {100 * own.grid.covered:.0f} % | {100 * own.grid.width:.1f} | {100 * own.asked:.1f} "
            f"| {100 * own.width:.1f} | {own.cheaper:.1f} | {own.at_width(own.asked):.1f} "
            f"| {own.at_width(own.grid.width):.1f} |"
        )
    return "\n".join(lines)


_TEXT = """# Does the search's interval hold the truth, and what does the search cost?

Made by `python -m dllm_sparsity.analysis.simulate --studies {studies} --grids {grids}`.
A line stands on so many simulated studies of items whose critical sparsity is known, at 99 % of dense unless said
otherwise, and on so many simulated grids of the paper's 26 values on as many items. Seeds are fixed.

{table}

- Items of a study are drawn anew. An item's answer follows one smooth random path over the strengths, so that items
  are paired and neighbouring strengths agree. `accuracy` items flip in both directions; `NLL` items have 12 to 79
  tokens and lognormal damage. A `dip` falls below the threshold, comes back and falls again; its truth is the first
  crossing. Items of a group share half the variance of difficulty and change, and are counted together.
- An `average` is that of the tasks' quality against that of their sparsity, every task counting the same, whatever
  its items. A search takes them in an order of which every stretch holds all tasks, and of a large task at most eight
  times the items of the smallest; the grid takes them all.
- The search's constants were chosen by all lines but those marked as held out, which were drawn after them; a last
  step, in how many errors an end of the interval takes, was made when those had been seen once.
  `NLL, to and fro` falls short of the threshold by little and comes back, and is why an interval reaches back to any
  earlier place that may be a miss.
- The grid's values are moved by at most half a step, in each study by another part, as no curve knows where they lie.
  Its interval is that of the interpolated crossing with a paired bootstrap of {draws} draws. Where it holds the truth
  less often than 95 %, it is too narrow: `width at 95 %` is its mean width, drawn out about the reading until 95 % of
  the grids hold the truth. This is asked of the search, but at least {narrowest} points and at most {widest}: asked for
  a wider interval, it may end on so few items that a curve close to the threshold is misread.
- The last three columns are the grid's item-evaluations in those of the search: as they are; for a grid with only as
  many items as give the search's median width, where that is wider than `width at 95 %` (a width falls with the square
  root of the items); and the same against the width that the grid claims.
- At the width at 95 %, {cheap} of {lines} lines cost at most a sixth of the grid (6.0); at the median it is 1 in
  {median:.1f}, of all lines together 1 in {together:.1f}. The others have gone through all items while the interval is
  still wider than the grid's: it is read off few strengths, most of them measured on some of the items.
- `too low` and `too high` are the shares of intervals that lie wholly below and above the truth. In {studies}
  studies, a true 95 % shows within {within:.1f} points of it, in 19 lines of 20. All lines together hold it in
  {held:.1f} %: the {falling} of which quality only falls in {monotone:.1f} %, the other {rising} in {others:.1f} %.
- A search takes for granted that the curve is smooth, the more so where little is dropped: it reads a place from what
  was measured beside it. An early, narrow and shallow fall that comes back, as in `accuracy, wavy`, is often not told
  from a miss, and the interval then reaches from there to the last crossing; to tell takes most items at several low
  strengths, as a grid spends them.
- Behind the last point before half the dense margin is surely lost, the last of them where it surely is not, or the
  last before a sure miss, the curve may bend ten to two hundred times as much, where the points say so: else a long
  flat part, as in the lines with a cliff or a ledge, would put the fall right behind the last strength that was
  measured before it. An end of a narrow interval is measured before it is believed, where no strength lies near it, as
  of `NLL, break`.
- A curve that runs close above the threshold for long, as in the lines with a ledge, has many places at which it may
  come out as a miss. The upper end of an interval allows for them, after a bound on the chance that errors fall so
  low anywhere on the way. Held in less than 90 %: {weak}.
- Where no strength fails, the answer is one-sided, and it holds when its low end is not above the truth.
- A search goes through the items {passes:.1f} times for a curve, on the mean of the lines.
- Widths and sparsities are in points of a hundred.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print COVERAGE.md.

    Args:
        arguments: Of the command line; None takes the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--grids", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    asked = parser.parse_args(arguments)
    with ProcessPoolExecutor(asked.processes) as pool:
        pending = [pool.submit(tally, world, asked.studies, asked.grids) for world in WORLDS]
        tallies = [each.result() for each in pending]
    sys.stdout.write(page(tallies, asked.studies, asked.grids))


def page(tallies: Sequence[Tally], studies: int, count: int) -> str:
    """Return COVERAGE.md.

    Args:
        tallies: One for each world.
        studies: Searches of each.
        count: Grids of each.
    """
    ratios, spent, covered = np.array([(own.at_width(own.asked), own.spent, own.covered) for own in tallies]).T
    falls = np.array([only_falls(own.world.margin) for own in tallies])
    return _TEXT.format(
        studies=studies,
        grids=count,
        table=table(tallies),
        draws=DRAWS,
        passes=float(spent.mean()),
        together=float((ratios * spent).sum() / spent.sum()),
        held=100 * float(covered.mean()),
        falling=int(falls.sum()),
        monotone=100 * float(covered[falls].mean()),
        rising=int((~falls).sum()),
        others=100 * float(covered[~falls].mean()),
        cheap=int((ratios >= _SIXTH).sum()),
        lines=len(ratios),
        median=float(np.median(ratios)),
        narrowest=f"{100 * NARROWEST:g}",
        widest=f"{100 * WIDEST:g}",
        weak=", ".join(f"`{own.world.name}` ({100 * own.covered:.0f} %)" for own in tallies if own.covered < _WEAK)
        or "none",
        within=196 * math.sqrt(0.95 * 0.05 / studies),
    )


if __name__ == "__main__":
    main()
