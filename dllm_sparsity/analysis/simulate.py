"""Simulated studies with a known answer: how often a search's interval holds it, and what the search costs.

python -m dllm_sparsity.analysis.simulate --studies 2000 > dllm_sparsity/analysis/COVERAGE.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from dllm_sparsity.analysis.critical import PAPER_GRID, readings
from dllm_sparsity.analysis.search import LADDER, Goal, Limits, Search
from dllm_sparsity.analysis.statistics import resampled_sums
from dllm_sparsity.analysis.worlds import WORLDS, Sample, World

NARROWEST = 0.002
_DRAWS = 400


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
        cost: Mean item-evaluations in those of the grid.
        grids: Number of simulated grids.
        grid_covered: Share of grids whose bootstrap interval holds the truth.
        grid_width: Mean width of those, which the search was asked for.
    """

    world: World
    truth: float
    beyond: bool
    studies: int
    covered: float
    too_high: float
    too_low: float
    width: float
    cost: float
    grids: int
    grid_covered: float
    grid_width: float


def search_study(sample: Sample, limits: Limits) -> tuple[Goal, int]:
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


def grid_study(sample: Sample) -> tuple[float, float]:
    """Return the paired bootstrap interval of the interpolated reading on the paper's 26 values.

    Args:
        sample: The items.
    """
    world = sample.world
    columns = [sample.column(1 - p, 0, world.items) for p in PAPER_GRID]
    flat = np.stack([part for own in columns for part in (own.height, own.weight, own.kept, own.total)], axis=1)
    sums = resampled_sums(flat, _DRAWS).reshape(_DRAWS, len(PAPER_GRID), 4)
    height, sparsity = sums[..., 0] / sums[..., 1], 1 - sums[..., 2] / sums[..., 3]
    drawn = readings(sparsity, height, world.retention, world.kind == "nll")[0]["interpolated"]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def tally(world: World, studies: int, grids: int) -> Tally:
    """Simulate studies of one world.

    Args:
        world: The world.
        studies: How many searches.
        grids: How many grids; the width that is asked of the searches is their mean.
    """
    truth, beyond = world.truth()
    intervals = [grid_study(world.draw(10**6 + seed)) for seed in range(grids)]
    grid_width = float(np.mean([high - low for low, high in intervals]))
    limits = Limits(max(grid_width, NARROWEST), world.items)
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
        cost=float(np.mean(spent)) / (len(PAPER_GRID) * world.items),
        grids=grids,
        grid_covered=float(np.mean([low <= truth + 1e-9 and (truth <= high or beyond) for low, high in intervals])),
        grid_width=grid_width,
    )


def table(tallies: Sequence[Tally]) -> str:
    """Return the table in Markdown.

    Args:
        tallies: One for each world.
    """
    head = (
        "| items | n | truth | 95 % interval holds it | too low | too high | width asked | median width "
        "| evaluations: grid / search | grid's interval holds it |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|---|---|"]
    for own in tallies:
        truth = ("≥ " if own.beyond else "") + f"{100 * own.truth:.1f} %"
        lines.append(
            f"| {own.world.name} | {own.world.items} | {truth} | {100 * own.covered:.1f} % | {100 * own.too_low:.1f} % "
            f"| {100 * own.too_high:.1f} % | {100 * max(own.grid_width, NARROWEST):.1f} | {100 * own.width:.1f} "
            f"| {1 / own.cost:.1f} | {100 * own.grid_covered:.0f} % |"
        )
    return "\n".join(lines)


_TEXT = """# Does the search's interval hold the truth, and what does the search cost?

Made by `python -m dllm_sparsity.analysis.simulate --studies {studies} --grids {grids}`.
Every line is {studies} simulated studies of items whose critical sparsity at 99 % of dense is known, and {grids}
simulated grids of the paper's 26 values on as many items.

{table}

- Items of a study are drawn anew. An item's answer follows one smooth random path over the strengths, so that items
  are paired and neighbouring strengths agree. `accuracy` items flip in both directions; `NLL` items have 12 to 79
  tokens and lognormal damage. A `dip` falls below the threshold, comes back and falls again; its truth is the first
  crossing.
- The grid's interval is that of the interpolated crossing with a paired bootstrap of {draws} draws. The width asked of
  the search is the grid's mean width, at least {narrowest} points. The search has no more items than the grid, so it
  often ends with all of them used and an interval wider than asked: compare the widths before the evaluations.
- `too low` and `too high` are the shares of intervals that lie wholly below and above the truth. With {studies}
  studies, a true coverage of 95 % shows within {margin:.1f} points of it.
- Where no strength fails, the answer is one-sided, and it holds when its low end is not above the truth.
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
    text = _TEXT.format(
        studies=asked.studies,
        grids=asked.grids,
        table=table(tallies),
        draws=_DRAWS,
        narrowest=f"{100 * NARROWEST:g}",
        margin=196 * (0.95 * 0.05 / asked.studies) ** 0.5,
    )
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
