"""What searches are likely to take, before they run: a guess from what simulated ones took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from dllm_sparsity.study.config import FEWEST_LAYERWISE_ITEMS, SearchConfig
from dllm_sparsity.study.tasks import LoadedTask

FIRST_ITEMS, LEAST_BLOCK = 64, 16
FIRST_PASSES, LATER_PASSES = 6.5, 2.4
"""How often a curve goes through its first items, up the ladder, and through the others, dense included."""
_MORE = 0.4
"""What twice as many retentions add."""
_DENSE = 3
"""At most one evaluation in so many is dense."""
LAYER_GROUPS, _LAYER_STRENGTHS = 12, 4
_LARGEST, _SMALLEST_SHARE = 8, 8  # of tasks in an average, and items of its smallest task in a block


def blocks(items: int, least: int = LEAST_BLOCK) -> list[int]:
    """Return how many items each block of a search has.

    Args:
        items: Items there are.
        least: Items of the smallest block.
    """
    ends, size = [0], float(max(FIRST_ITEMS, 2 * least))
    while round(size) + least <= items:
        ends.append(round(size))
        size += max(least, min(size * 0.25, items / 16))
    ends.append(items)
    return [stop - start for start, stop in pairwise(ends)]


def curve_evaluations(search: SearchConfig, items: int, least: int = LEAST_BLOCK) -> float:
    """Return how many item-evaluations one curve is likely to take, dense ones included.

    Args:
        search: What is asked.
        items: Items there are.
        least: Items of the smallest block.
    """
    first = blocks(items, least)[0]
    found = (FIRST_PASSES * first + LATER_PASSES * (items - first)) * (1 + _MORE * math.log2(len(search.retentions)))
    return min(found, search.budget or math.inf)


def evaluations(search: SearchConfig, items: int, curves: int, together: Sequence[int]) -> float:
    """Return how many items all searches of a model are likely to run on a task; dense ones serve all its curves.

    Args:
        search: What is asked.
        items: Items of the task.
        curves: Rules and sites.
        together: Items of each task that may be averaged with it, its own included.
    """
    if not items or not all(together):
        return 0.0
    alone = curve_evaluations(search, items)
    dense = min(items, alone / _DENSE)
    found = curves * alone - (curves - 1) * dense
    if search.layerwise:
        found += curves * (alone - dense)  # along the allocation
    if search.average and len(together) > 1:
        used = [min(size, _LARGEST * min(together)) for size in together]
        shared = curve_evaluations(search, sum(used), math.ceil(_SMALLEST_SHARE * sum(used) / min(used)))
        mine = min(items, _LARGEST * min(together)) / sum(used)
        found += mine * shared * (curves - (curves - 1) / _DENSE)
    return found


def alike(task: LoadedTask, tasks: Sequence[LoadedTask]) -> list[int]:
    """Return the items of each task that is likely to be on the same kind of quality, a task named twice once.

    Args:
        task: One of them.
        tasks: All of a study.
    """
    rolling = "loglikelihood_rolling"
    same = {own.name: own.items for own in tasks if (own.output_type == rolling) == (task.output_type == rolling)}
    return [*same.values()]


def layer_cells(search: SearchConfig, items: int, curves: int, layers: int | None) -> list[tuple[float, int]]:
    """Return how many cells measure layers alone, and on how many items each.

    Args:
        search: What is asked.
        items: Items of the task.
        curves: Rules and sites.
        layers: Of the model; None where that is not known.
    """
    each = min(LAYER_GROUPS, layers or LAYER_GROUPS) * _LAYER_STRENGTHS + 1
    measured = int(min(search.layerwise_items, items, (search.budget or math.inf) // each))
    if not search.layerwise or measured < FEWEST_LAYERWISE_ITEMS:
        return []
    return [(curves * each, measured)]


def cells(items: int, evaluated: float) -> list[tuple[float, int]]:
    """Return about how many cells searches run, and on how many items each: those of a first block, and later ones.

    Args:
        items: Items of the task.
        evaluated: As `evaluations` returned them.
    """
    if not items or not evaluated:
        return []
    first, *later = blocks(items)
    weight = FIRST_PASSES * first
    share = weight / (weight + LATER_PASSES * (items - first))
    found = [(share * evaluated / first, first)]
    if later:
        size = round(sum(later) / len(later))
        found.append(((1 - share) * evaluated / size, size))
    return found


def words(search: SearchConfig, several: bool) -> str:
    """Return what the guess stands on.

    Args:
        search: What is asked.
        several: Whether the study has several tasks.
    """
    said = (
        f"a search is taken to measure the first {FIRST_ITEMS} items {FIRST_PASSES:g} times for each rule and site, "
        f"and the others {LATER_PASSES:g} times, as simulated ones do on average; one may take half or twice as many"
    )
    said += ", more for several retentions" if len(search.retentions) > 1 else ""
    said += f", and no more than its budget of {search.budget:,} item-evaluations" if search.budget else ""
    more = ["layers alone, the search along the allocation"] if search.layerwise else []
    more += ["the average over tasks"] if search.average and several else []
    return said + (f"; on top: {', '.join(more)}" if more else "")
