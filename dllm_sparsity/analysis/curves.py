"""Curves of quality against achieved sparsity, paired by item with dense, and their critical sparsities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from dllm_sparsity.analysis import critical
from dllm_sparsity.analysis.flops import ffn_flops_saved
from dllm_sparsity.analysis.grouping import Group, groups_of
from dllm_sparsity.analysis.loading import Cell
from dllm_sparsity.analysis.pairing import Key, item_groups, pair
from dllm_sparsity.analysis.qualities import SCALES, Pairs, Scale, numbers, pairs
from dllm_sparsity.analysis.readings import (
    OTHER_RETENTION,
    TOO_FEW_POINTS,
    Interval,
    Reading,
    no_reading,
    readings_of,
    rng_of,
    with_answers,
)
from dllm_sparsity.analysis.statistics import (
    DRAWS,
    SEED,
    above_chance,
    group_sums,
    percentile_interval,
    resampled_sums,
)
from dllm_sparsity.study.records import PRIMITIVE_SITES, Quality

Drawn = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Point:
    """One cell on a curve; `difference` is this cell less dense, in the quality's unit."""

    cell: Cell
    sparsity: float
    sparsity_interval: Interval
    flops_saved: float | None
    quality: float
    quality_interval: Interval
    retention: float
    retention_interval: Interval
    difference: float
    difference_interval: Interval


@dataclass(frozen=True)
class Curve:
    """Quality against achieved sparsity for one model, task, rule and site.

    Intervals draw whole `clusters` of items: the number of each item's, None where items stand alone. `drawn` holds
    quality and achieved sparsity, each (1 + draws, cells): the estimate first, the cells as the group has them.
    """

    group: Group
    quality: Quality
    keys: tuple[Key, ...]
    points: tuple[Point, ...]
    readings: tuple[Reading, ...]
    drawn: Drawn = field(repr=False, compare=False)
    clusters: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def scale(self) -> Scale:
        """Return how this quality is read."""
        return SCALES[self.quality["kind"]]

    def reading(self, name: str = critical.DEFAULT_READING, retention: float = critical.DEFAULT_RETENTION) -> Reading:
        """Return one reading of the critical sparsity.

        Args:
            name: One of the four readings.
            retention: Share of the dense quality; where it was not asked for, the reading says so.
        """
        found = (own for own in self.readings if (own.reading, own.retention) == (name, retention))
        return next(found, Reading(name, retention, None, None, False, "nobody asked for this retention", np.empty(0)))


def curves_of(cells: Sequence[Cell], draws: int = DRAWS, seed: int = SEED) -> tuple[list[Curve], list[str]]:
    """Return every curve of a run, and notes on what was left out.

    Args:
        cells: Sealed cells.
        draws: Bootstrap samples.
        seed: Seed of the resampling.

    Raises:
        UserError: The items of two cells are not the same.
    """
    groups, notes = groups_of(cells)
    curves = []
    for group in groups:
        paired = pair([group.dense, *group.cells])
        notes += paired.notes
        task, model = group.dense.record["task"], group.dense.record["model"]
        if paired.left_out and not group.is_searched:  # a search has other items at each strength, and uses them all
            where = f"{task} on {model}, {group.rule} at {group.site},"
            notes.append(f"{paired.left_out} items of {where} are not in every cell and are left out")
        sites = [achieved(cell, table, group.site) for cell, table in zip(_cells(group), paired.tables, strict=True)]
        ffn = group.dense.record["ffn"]
        flops = [
            ffn_flops_saved(group.site, _primitives(cell, table), bool(ffn.get("gated", True)))
            if ffn.get("uniform", True)  # a pooled share says nothing of FFNs of several widths
            else None
            for cell, table in zip(_cells(group), paired.tables, strict=True)
        ]
        for quality in group.qualities:
            values = [pairs(quality, table, paired.tables[0]) for table in paired.tables]
            counted = np.asarray(np.isfinite(np.array(values)).all((0, 1)))
            if not counted.any():
                notes.append(f"{quality['name']} of {task} has no value for any item")
                continue
            if missing := len(counted) - int(counted.sum()):
                notes.append(
                    f"{missing} items of {task} on {model} have no finite {quality['name']} and are left out of it"
                )
            keys = tuple(key for key, kept in zip(paired.keys, counted, strict=True) if kept)
            chosen = [(top[counted], bottom[counted]) for top, bottom in values]
            sums = [(kept[counted], total[counted]) for kept, total in sites]
            clusters = item_groups(paired.tables[0].filter(pa.array(counted)))
            curves.append(_curve(group, quality, keys, chosen, sums, flops, draws, seed, clusters))
    return curves, list(dict.fromkeys(notes))


def achieved(cell: Cell, samples: pa.Table, site: str) -> Pairs:
    """Return kept and total activations of a site for every item.

    `all` adds input and intermediate, so the wider one weighs more. A dense cell without a record of the site counts as
    keeping everything; a sparse one falls back to the cell's totals, spread evenly.

    Args:
        cell: The cell.
        samples: Its items.
        site: A primitive site or `all`.
    """
    parts = ("input", "intermediate") if site == "all" else (site,)
    columns = [(f"kept_{part}", f"total_{part}") for part in parts if part in PRIMITIVE_SITES]
    kept = sum((numbers(samples, name) for name, _ in columns), np.zeros(len(samples)))
    total = sum((numbers(samples, name) for _, name in columns), np.zeros(len(samples)))
    if columns and not np.isnan(kept + total).any() and total.sum() > 0:
        return kept, total
    ones = np.ones(len(samples))
    recorded = [cell.record["totals"].get("sites", {}).get(part) or {} for part in parts]
    whole = sum(float(part.get("total", 0)) for part in recorded)
    if whole > 0 and all("kept" in part for part in recorded):
        return ones * sum(float(part["kept"]) for part in recorded) / whole, ones
    return (ones, ones) if cell.record["dense"] else (ones * math.nan, ones)


def _cells(group: Group) -> tuple[Cell, ...]:
    return (group.dense, *group.cells)


def _primitives(cell: Cell, samples: pa.Table) -> dict[str, float]:
    shares = {site: achieved(cell, samples, site) for site in PRIMITIVE_SITES}
    return {site: 1 - kept.sum() / total.sum() for site, (kept, total) in shares.items() if np.isfinite(kept).all()}


def _curve(
    group: Group,
    quality: Quality,
    keys: tuple[Key, ...],
    values: list[Pairs],
    sites: list[Pairs],
    flops: list[float | None],
    draws: int,
    seed: int,
    clusters: np.ndarray | None,
) -> Curve:
    scale = SCALES[quality["kind"]]
    columns = np.stack([np.stack([*value, *site]) for value, site in zip(values, sites, strict=True)])
    flat = columns.reshape(-1, columns.shape[-1]).T
    drawn = resampled_sums(flat, draws, seed, clusters)
    sums = np.concatenate([flat.sum(0)[None], drawn]).reshape(draws + 1, len(values), 4)
    with np.errstate(invalid="ignore", divide="ignore"):
        measured, sparsity = sums[..., 0] / sums[..., 1], 1 - sums[..., 2] / sums[..., 3]
    reason = no_reading(quality, float(measured[0, 0]), *_above(quality, float(measured[0, 0]), values[0], clusters))
    asked = retentions_of([group])
    readings = readings_of(sparsity, scale.sign * measured, scale.logarithmic, reason, asked)
    readings = _searched(readings, group, quality, reason, draws, seed)
    points = points_of(_cells(group), quality, (measured, sparsity), flops)
    return Curve(group, quality, keys, points, tuple(readings), (measured, sparsity), clusters)


def points_of(
    cells: Sequence[Cell],
    quality: Quality,
    drawn: Drawn,
    flops: Sequence[float | None],
) -> tuple[Point, ...]:
    """Return the points of a curve, dense first and the others by their sparsity.

    Args:
        cells: The cells, dense first.
        quality: The quality.
        drawn: As a curve keeps it.
        flops: Share of the FFN's FLOPs that each cell saves, None where it is not known.
    """
    measured, sparsity = drawn
    retained = SCALES[quality["kind"]].retention(measured, measured[:, :1])
    points = [
        Point(
            cell=cell,
            sparsity=float(sparsity[0, i]),
            sparsity_interval=percentile_interval(sparsity[1:, i]),
            flops_saved=flops[i],
            quality=float(measured[0, i]),
            quality_interval=percentile_interval(measured[1:, i]),
            retention=float(retained[0, i]),
            retention_interval=percentile_interval(retained[1:, i]),
            difference=float(measured[0, i] - measured[0, 0]),
            difference_interval=percentile_interval(measured[1:, i] - measured[1:, 0]),
        )
        for i, cell in enumerate(cells)
    ]
    return points[0], *sorted(points[1:], key=lambda point: point.sparsity)


def retentions_of(groups: Sequence[Group]) -> list[float]:
    """Return the shares of the dense quality that are read: the usual ones, and what searches asked for.

    Args:
        groups: Groups of cells.
    """
    return sorted({*critical.RETENTIONS, *(own["retention"] for group in groups for own in group.dense.searches)})


def _above(quality: Quality, dense: float, values: Pairs, clusters: np.ndarray | None) -> tuple[bool, str]:
    """Return whether a dense accuracy lies two standard errors above chance, and how many items say so."""
    items, chance = len(values[0]), quality["chance"] or 0.0
    if clusters is None:
        return above_chance(dense, items, chance), f"n={items}"
    # around chance, as the error of guessing is: around the accuracy it is zero where all is right
    off = group_sums((values[0] - chance * values[1])[:, None], clusters)
    error = math.sqrt(float((off**2).sum())) / values[1].sum()
    return dense - chance > 2 * error, f"n={items} in {int(clusters.max()) + 1} groups"


def _searched(
    readings: list[Reading], group: Group, quality: Quality, reason: str | None, draws: int, seed: int
) -> list[Reading]:
    """Put a search's answer in the place of the interpolated reading; a search measures too few points for others."""
    answers = {own["retention"]: own for own in group.answers if own["quality"] == quality["name"]}
    if group.is_searched:
        nothing = {"value": None, "interval": None, "censored": False}
        readings = [replace(own, **nothing, reason=reason or _unsearched(own, group, quality)) for own in readings]
    return with_answers(readings, answers, reason, draws, rng_of(group.dense, seed))


def _unsearched(reading: Reading, group: Group, quality: Quality) -> str:
    """Return why a reading of a curve that was only searched has no value."""
    if not group.answers:
        return "its search is not finished: dllm-sparsity compare goes on with it"
    if all(own["quality"] != quality["name"] for own in group.answers):
        return f"the search was on {group.headline}"
    if reading.reading != critical.DEFAULT_READING:
        return TOO_FEW_POINTS
    return OTHER_RETENTION
