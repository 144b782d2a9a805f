"""Each cell against its dense cell, decided and put in words: worse by so much, or the least that could be seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dllm_sparsity.analysis.amounts import amount, amounts, unit
from dllm_sparsity.analysis.curves import Curve
from dllm_sparsity.analysis.grouping import Group
from dllm_sparsity.analysis.loading import Cell
from dllm_sparsity.analysis.noise import NoiseFloor, floors_of, is_one_batch, replicates_of
from dllm_sparsity.analysis.paired import PairedTest, paired_tests
from dllm_sparsity.analysis.pairing import Paired, item_groups, pair
from dllm_sparsity.analysis.qualities import SCALES, pairs
from dllm_sparsity.analysis.statistics import DRAWS, SEED, SIGNIFICANCE, holm

FEW_GROUPS = 20
_SMALLEST_TOLD = 1e-6  # of a difference with fixed digits


@dataclass(frozen=True)
class Verdict:
    """What can be said of one cell against dense on one quality.

    Args:
        test: The paired test.
        p_holm: Its p-value corrected for all cells of one task and measure; None where nothing was tested.
        comparisons: How many these are.
        smallest_detectable: Smallest true difference found with 80 % power among all of them; None where nothing says.
        floor: The noise floor in the quality's unit; None where the dense cell was run once.
        outcome: worse, better, alone (without the correction only), noise, none, same or share.
        words: The outcome in words.
        short: The same for narrow places.
    """

    test: PairedTest
    p_holm: float | None
    comparisons: int
    smallest_detectable: float | None
    floor: float | None
    outcome: str
    words: str
    short: str


@dataclass(frozen=True)
class Judged:
    """The verdicts of one curve.

    Args:
        verdicts: One for each point of the curve; None for dense.
        noise: What two dense runs differ by; None where there is one.
        elsewhere: Those of the strengths that a search measured on other items, each on its own, by strength.
    """

    verdicts: tuple[Verdict | None, ...]
    noise: NoiseFloor | None
    elsewhere: dict[float, Verdict]


def judge(
    curves: Sequence[Curve], cells: Sequence[Cell], draws: int = DRAWS, seed: int = SEED
) -> tuple[list[Judged], list[str]]:
    """Judge every cell of every curve against its dense cell.

    Args:
        curves: Curves of one run.
        cells: The cells of the run, with further runs of dense cells.
        draws: Bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        The verdicts of each curve, and notes on what limits them.

    Raises:
        UserError: The items of two cells are not the same.
    """
    tests, notes = _tests(curves, draws, seed)
    others = [_elsewhere(curve, draws, seed) for curve in curves]
    families: dict[tuple[str, str], list[PairedTest]] = {}
    for curve, own, more in zip(curves, tests, others, strict=True):
        both = [*own, *more.values()]
        families.setdefault(_family(curve), []).extend(test for test in both if test and _tested(curve, test))
    corrected = {
        id(test): (p, len(family))
        for family in families.values()
        for test, p in zip(family, holm([test.p for test in family]), strict=True)
    }
    judged = []
    for curve, own, more in zip(curves, tests, others, strict=True):
        replicates, told = replicates_of(curve.group.dense, cells)
        notes += told
        noise = floors_of(curve.group.dense, replicates, curve.quality, draws, seed)
        if noise:
            notes.append(_noise_note(curve, noise, all(map(is_one_batch, replicates))))

        def verdict(test: PairedTest, curve: Curve = curve, noise: NoiseFloor | None = noise) -> Verdict:
            return _verdict(curve, test, *corrected.get(id(test), (None, 0)), noise)

        found = tuple(None if test is None else verdict(test) for test in own)
        judged.append(Judged(found, noise, {strength: verdict(test) for strength, test in more.items()}))
    return judged, list(dict.fromkeys(notes))


def _tests(curves: Sequence[Curve], draws: int, seed: int) -> tuple[list[list[PairedTest | None]], list[str]]:
    """Return the test of each point of each curve, None for dense."""
    found: list[list[PairedTest | None]] = []
    notes: list[str] = []
    last: tuple[Group, Paired] | None = None
    for curve in curves:
        group = curve.group
        if last is None or last[0] is not group:  # the qualities of one group stand together
            last = group, pair([group.dense, *group.cells])
        kept = set(curve.keys)
        mask = pa.array([key in kept for key in last[1].keys])
        tables = [table.filter(mask) for table in last[1].tables]
        groups = item_groups(tables[0])
        dense, *others = (pairs(curve.quality, table, tables[0]) for table in tables)
        tests = dict(zip(map(id, group.cells), paired_tests(dense, others, groups, draws, seed), strict=True))
        found.append([tests.get(id(point.cell)) for point in curve.points])
        if groups is not None:
            notes += _group_notes(group.dense, int(groups.max()) + 1)
    return found, notes


def _elsewhere(curve: Curve, draws: int, seed: int) -> dict[float, PairedTest]:
    """Return the tests of the strengths that a search on this quality measured on other items, each on its own."""
    group, found = curve.group, {}
    if all(own["quality"] != curve.quality["name"] for own in group.answers):
        return {}
    for cell in group.elsewhere:
        tables = pair([group.dense, cell]).tables
        values = [pairs(curve.quality, table, tables[0]) for table in tables]
        counted = np.isfinite(np.array(values)).all((0, 1))
        if counted.any():
            dense, other = ((top[counted], bottom[counted]) for top, bottom in values)
            groups = item_groups(tables[0].filter(pa.array(counted)))
            found[cell.record["strength"]] = paired_tests(dense, [other], groups, draws, seed)[0]
    return found


def _group_notes(dense: Cell, count: int) -> list[str]:
    task = dense.record["task"]
    notes = [f"the items of {task} fall into {count} groups: intervals draw whole groups, and tests are clustered"]
    if count < FEW_GROUPS:
        notes.append(f"{count} groups in {task} are few: clustered intervals tend to be too narrow")
    return notes


def _noise_note(curve: Curve, noise: NoiseFloor, one_batch: bool) -> str:
    record, kind = curve.group.dense.record, curve.quality["kind"]
    size = amount(noise.floor, kind) if noise.floor >= _SMALLEST_TOLD else f"{noise.floor:.1g}{unit(kind)}"
    name = curve.quality["name"]
    moved = f"moves {name} by up to {size}" if noise.changed else f"does not move {name}"
    how = "in the same batch, its only one," if one_batch else "in another batch order"
    return (
        f"dense run again {how} {moved} on {record['task']}, {record['model']}"
        f" ({noise.changed} of {noise.items} items change)"
    )


def _family(curve: Curve) -> tuple[str, str]:
    return curve.group.dense.record["task"], curve.quality["name"]


def _tested(curve: Curve, test: PairedTest) -> bool:
    # dense agrees with itself by definition, so "no difference" is not in doubt there
    return curve.quality["kind"] != "agreement" and math.isfinite(test.p)


def _verdict(
    curve: Curve, test: PairedTest, p_holm: float | None, comparisons: int, noise: NoiseFloor | None
) -> Verdict:
    kind, floor = curve.quality["kind"], noise.floor if noise else None
    outcome = _outcome(kind, test, p_holm, floor)
    loss = -SCALES[kind].sign * test.difference
    size, low, high = amounts((abs(loss), *_sided(loss, SCALES[kind].sign, test.interval)), kind)
    told = f"{'worse' if loss > 0 else 'better'} by {size}{unit(kind)} [{low}, {high}]"
    smallest = test.smallest_detectable(comparisons) if comparisons else None
    among = f" among {comparisons} comparisons" if comparisons > 1 else ""

    def least(place: str) -> str:
        return "" if smallest is None else f"; smallest detectable{place} {amount(smallest, kind)}"

    words = {
        "same": f"no difference: all {test.items} items give the same{least(among)}",
        "share": f"{size} % of answer tokens differ [{low}, {high}]",
        "noise": f"within noise: {told}, and dense run again moves by up to {amount(floor or 0.0, kind)}",
        "alone": f"{told} if it stood alone, not{among}{least(' among these')}",
        "none": f"no difference detectable{least(among)}",
    }.get(outcome, told)
    bare = f"{size} [{low}, {high}]"
    short = {
        "same": "no item changed",
        "share": f"{bare} % differ",
        "noise": f"{bare}, within noise",
        "none": "none detectable",
        "alone": f"none among {comparisons}",
    }.get(outcome, f"{outcome} by {bare}")
    return Verdict(test, p_holm, comparisons, smallest, floor, outcome, words, short)


def _sided(loss: float, sign: int, interval: tuple[float, float]) -> tuple[float, float]:
    """Return the interval of the loss, or of the gain, the lower end first."""
    turn = -sign if loss > 0 else sign
    low, high = sorted(turn * end for end in interval)
    return low, high


def _outcome(kind: str, test: PairedTest, p_holm: float | None, floor: float | None) -> str:
    if not test.changed:
        return "same"
    if kind == "agreement":
        return "noise" if floor is not None and abs(test.difference) <= floor else "share"
    if p_holm is None or test.p > SIGNIFICANCE:
        return "none"
    if floor is not None and abs(test.difference) <= floor:
        return "noise"
    if p_holm > SIGNIFICANCE:
        return "alone"
    return "worse" if SCALES[kind].sign * test.difference < 0 else "better"
