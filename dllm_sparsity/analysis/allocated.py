"""An allocation on sealed cells: what each layer loses alone, and what the allocated search found beside the other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dllm_sparsity.analysis.arrow import pc
from dllm_sparsity.analysis.column import Column, Threshold
from dllm_sparsity.analysis.loading import Cell
from dllm_sparsity.analysis.profile import Profile, profile
from dllm_sparsity.analysis.qualities import SCALES
from dllm_sparsity.analysis.search import Goal, Search
from dllm_sparsity.analysis.searched import SearchedCurve
from dllm_sparsity.analysis.slopes import Sensitivity
from dllm_sparsity.analysis.statistics import group_sums
from dllm_sparsity.analysis.steps import counted, sparsity_by

Answer = dict[str, Any]
DRAWS, SEED = 400, 0
_Read = tuple[float, float, float]
"""A value, and the ends of its interval."""
_PART = 8
"""Part of the items on which a strength must have been measured for its sparsity by layer to be told."""
_MAY_NOT_CROSS = 0.025
"""More draws without a crossing than this, and the ends of their interval would be those of the measured points."""


@dataclass(frozen=True)
class Searched:
    """One curve, searched.

    Args:
        curve: What reads its cells.
        search: The search, done.
        answers: One for each retention, as search.json has them.
    """

    curve: SearchedCurve
    search: Search
    answers: list[Answer]

    @property
    def crossings(self) -> list[float]:
        """Return the critical sparsities that were found."""
        return [own["value"] for own in self.answers if own["value"] is not None]


def smooth_quality(dense: Cell, searched: SearchedCurve) -> tuple[str, str]:
    """Return the quality on which single layers are measured, and why: one layer flips too few answers to be seen.

    Args:
        dense: A dense cell of the task.
        searched: What the search is on.
    """
    own = searched.quality["name"]
    if SCALES[searched.quality["kind"]].logarithmic:
        return own, "the quality of the search itself"
    for kind, words in (
        ("nll", "the likelihood of the right answer, for one layer changes too few answers to be told by them"),
        ("agreement", "agreement with the dense answer, for one layer changes too few scores to be told by them"),
    ):
        found = [each["name"] for each in dense.record["qualities"] if each["kind"] == kind]
        if found:
            return found[0], words
    return own, "the quality of the search itself, as the task has none that is finer"


def counts_by_layer(cells: Iterable[Cell], sites: Sequence[str]) -> dict[int, tuple[int, int]]:
    """Return kept and total activations of each layer.

    Args:
        cells: Blocks of one setting.
        sites: Primitive sites that count.
    """
    steps = pa.concat_tables([counted(cell.steps) for cell in cells], promote_options="default")
    steps = steps.filter(pc.is_in(steps["site"], value_set=pa.array(list(sites), pa.string())))
    rows = sparsity_by(steps, ("layer",)).to_pylist()
    return {row["layer"]: (row["kept"], row["total"]) for row in rows if row["total"]}


def sensitivity(
    layers: tuple[int, ...],
    dense: Column,
    columns: Mapping[float, Column],
    counts: Mapping[float | None, Mapping[int, tuple[int, int]]],
) -> Sensitivity:
    """Return what some layers lose alone.

    Args:
        layers: The layers.
        dense: The dense model's items.
        columns: Strength to the same items, these layers alone sparse; kept and total are those of the layers.
        counts: Kept and total by layer of the whole model, at strengths that it was searched at; dense at None.
    """
    whole = {at: 1 - _sum(own, layers, 0) / _sum(own, layers, 1) for at, own in counts.items()}
    order = sorted(columns, key=lambda strength: columns[strength].sparsity)
    told = [_lost(dense, columns[strength]) for strength in order]
    return Sensitivity(
        layers=layers,
        strengths=tuple(order),
        sparsity=tuple(columns[strength].sparsity for strength in order),
        losses=tuple(loss for loss, _ in told),
        errors=tuple(error for _, error in told),
        total=float(columns[order[0]].total.sum()),
        natural=whole[None],
        trail=tuple((at, place) for at, place in whole.items() if at is not None),
    )


def _sum(counts: Mapping[int, tuple[int, int]], layers: tuple[int, ...], which: int) -> int:
    return sum(counts[layer][which] for layer in layers)


def _lost(dense: Column, sparse: Column) -> tuple[float, float]:
    """Return the quality lost, paired by item, and its standard error."""
    top = dense.height.sum() / dense.weight.sum()
    value = sparse.height.sum() / sparse.weight.sum()
    pull = (sparse.height - value * sparse.weight) / sparse.weight.sum()
    pull -= (dense.height - top * dense.weight) / dense.weight.sum()
    if dense.group is not None:
        pull = group_sums(pull[:, None], dense.group)[:, 0]
    return float(top - value), math.sqrt(float(pull @ pull))


def compared(uniform: Searched, allocated: Searched, index: int) -> Answer:
    """Return what an allocation gained over the uniform rule at one retention: paired where both searches allow it.

    Args:
        uniform: The search with one strength for all layers.
        allocated: The search along the path.
        index: Which retention.
    """
    goals, answers = zip(*((own.search.goals[index], own.answers[index]) for own in (uniform, allocated)), strict=True)
    if any(answer["value"] is None for answer in answers):
        return {"value": None, "interval": None, "paired": False, "words": "one of the two searches has no answer"}
    if any(answer["censored"] for answer in answers):
        words = "one of the two curves never fell below the threshold, so their difference is not known"
        return {"value": None, "interval": None, "paired": False, "words": words}
    items = min(goal.items for goal in goals)
    shared = _shared((uniform.search, allocated.search), goals[0].threshold, items)
    if shared is not None:
        few, alike = shared
        found = [
            goal.profile if goal.items == items and goal.profile else own for goal, own in zip(goals, few, strict=True)
        ]
        value, low, high = _difference([_read(own) for own in found], alike * _from_items(found))
        # the answers stand on other items as well, and their difference may look like another
        there = " and ".join(f"{100 * own.estimate:.1f}" for own in reversed(found))
        how = f"paired on {items:,} items that both searches measured, where they reach {there} %"
    else:
        alone = [(own["value"], own["interval"][0], own["interval"][1]) for own in answers]
        value, low, high = _difference(alone, 0.0)
        how = "unpaired: from the two intervals"
    told = f"{100 * value:+.1f} points of sparsity, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}, {how}"
    verdict = "better than uniform" if low > 0 else "worse than uniform" if high < 0 else "not told from uniform"
    return {
        "value": value,
        "interval": [low, high],
        "paired": shared is not None,
        "items": items,
        "words": f"{verdict} ({told})",
    }


def _difference(answers: Sequence[_Read], correlation: float) -> _Read:
    """Return the difference of two answers with its interval, from those of both and how their errors go together.

    Args:
        answers: What is taken off, and what it is taken off from: each with its 95 % interval.
        correlation: Of their errors.

    Source: Zou 2007, Toward using confidence intervals to compare correlations, for the limits of a difference of two
        dependent estimates from those of each; Zou and Donner 2008, Construction of confidence limits about effect
        measures: a general approach.
    """
    (one, low, high), (two, least, most) = answers

    def half(first: float, second: float) -> float:
        return math.sqrt(max(first**2 + second**2 - 2 * correlation * first * second, 0.0))

    value = two - one
    return value, value - half(high - one, two - least), value + half(one - low, most - two)


def _read(found: Profile) -> _Read:
    low, high = found.interval
    return found.estimate, low, high


def _from_items(found: Sequence[Profile]) -> float:
    """Return the part of two crossings' errors that comes from the items, as a factor of their correlation.

    The other part is what a curve may do between the strengths that were measured: no sample of the items shows it, and
    two curves do not share it.
    """
    parts = [
        [np.interp(own.estimate, own.curve.mesh, line) for line in (own.curve.noise, own.curve.error)] for own in found
    ]
    return float(np.prod([min(noise / error, 1.0) if error > 0 else 0.0 for noise, error in parts]))


def _shared(searches: tuple[Search, Search], threshold: Threshold, items: int) -> tuple[list[Profile], float] | None:
    """Return both curves on shared items, and how their crossings correlate over bootstrap samples of these.

    Returns:
        None where too many samples have no crossing.
    """
    curves = [search.measured(items) for search in searches]
    rng, missed, found = np.random.default_rng(SEED), np.zeros(2), []
    members = _members(curves[0][0])
    for draw in range(DRAWS + 1):
        picked = rng.integers(0, len(members), len(members)) if draw else range(len(members))
        chosen = np.concatenate([members[number] for number in picked])
        profiles = []
        for search, (dense, sparse) in zip(searches, curves, strict=True):
            columns = [own.drawn(chosen) for own in sparse]
            columns = [own for own in columns if len(own)]
            profiles.append(profile(dense.drawn(chosen), columns, threshold, search.ended))
        missed += [not own.crosses for own in profiles]
        found.append(profiles)
    if (missed > _MAY_NOT_CROSS * DRAWS).any():
        return None
    drawn = np.array([[own.estimate for own in profiles] for profiles in found[1:]])
    return found[0], float(np.corrcoef(drawn.T)[0, 1]) if drawn.std(0).all() else 0.0


def _members(dense: Column) -> list[np.ndarray]:
    """Return the items that are drawn together: each alone, or those of a group."""
    groups = np.arange(len(dense)) if dense.group is None else dense.group
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)


def strength_at(search: Search, sparsity: float | None) -> float | None:
    """Return the strength that gives a sparsity, on a straight line between those that were measured.

    Args:
        search: The search, done.
        sparsity: An answer of it; None where there is none.
    """
    if sparsity is None or search.dense is None:
        return None
    known = sorted([(search.dense.sparsity, search.ladder[0]), *((c.sparsity, at) for at, c in search.columns.items())])
    places, strengths = zip(*known, strict=True)
    return round(float(np.interp(sparsity, places, strengths)), 5)


def nearest_strength(search: Search, goal: Goal) -> float | None:
    """Return the strength nearest the crossing of those that were measured on a good part of the items.

    Args:
        search: The search, done.
        goal: What was found for one retention.
    """
    if goal.profile is None:
        return None
    place = goal.profile.estimate
    many = [strength for strength, own in search.columns.items() if len(own) * _PART >= goal.items]
    return min(
        many or search.columns, key=lambda strength: abs(search.columns[strength].sparsity - place), default=None
    )


def overlap_words(probed: int, available: int, searched: int, gained: bool) -> tuple[int, str]:
    """Return how many of the items that chose the allocation the final search measured too, and that in words.

    Args:
        probed: Items at the end of the order on which layers were measured alone.
        available: Items there are.
        searched: Items from the start of the order that the final search measured.
        gained: Whether the allocation is better than one strength; only then may the items flatter it.
    """
    shared = max(0, searched - (available - probed))
    if not shared:
        return 0, f"none of the {probed:,} items that chose the allocation were searched on"
    told = f"{shared:,} of the {probed:,} items that chose the allocation are among the {searched:,} searched on"
    return shared, told + (": the gain may look larger than on fresh items" if gained else "")
