"""A run as one JSON-able dictionary: qualities, critical sparsities with intervals, findings, notes and counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dllm_sparsity.analysis.averages import asked_of_averages, average_comparisons, averages
from dllm_sparsity.analysis.comparison import Comparison, comparisons
from dllm_sparsity.analysis.critical import DEFAULT_READING, DEFAULT_RETENTION, RETENTIONS
from dllm_sparsity.analysis.curves import Curve, Point, curves_of
from dllm_sparsity.analysis.findings import allocation_findings, findings
from dllm_sparsity.analysis.loading import Cell, Run
from dllm_sparsity.analysis.qualities import numbers
from dllm_sparsity.analysis.speed import speeds
from dllm_sparsity.analysis.statistics import DRAWS, SEED
from dllm_sparsity.analysis.verdicts import Judged, Verdict, judge

SUMMARY_VERSION = 1
_DAMAGED_TOLD, _UNFOUNDED_TOLD = 20, 3


def summary(run: Run, draws: int = DRAWS, seed: int = SEED) -> dict[str, Any]:
    """Return all findings of a run as plain JSON: no NaN and no Infinity, None in their place.

    Args:
        run: A loaded run directory.
        draws: Bootstrap samples.
        seed: Seed of the resampling.

    Raises:
        UserError: The items of two cells are not the same.
    """
    curves, notes = curves_of(run.cells, draws, seed)
    judged, limits = judge(curves, run.cells, draws, seed)
    means, told = averages(curves, run.search, seed)
    asked = _asked(run)
    retentions = sorted({*RETENTIONS, *asked})
    pairs = comparisons(curves, retentions) + average_comparisons(means, retentions)
    all_curves = [*curves, *(own.curve for own in means)]
    return clean(
        {
            "version": SUMMARY_VERSION,
            "study": run.name,
            "retentions": retentions,
            "retentions_asked": asked,
            "default_retention": asked[0],
            "default_reading": DEFAULT_READING,
            "bootstrap": {"draws": draws, "seed": seed, "level": 0.95},
            "findings": [text for retention in asked for text in findings(all_curves, pairs, retention)]
            + allocation_findings(run.search),
            "notes": _notes(run) + notes + told + limits + _further_notes(run),
            "counts": _counts(run),
            "curves": [_curve(*both) for both in zip(curves, judged, strict=True)],
            "averages": [own.told for own in means],
            "comparisons": [_comparison(pair) for pair in pairs],
            "cells": [_cell(cell) for cell in run.cells],
            "speed": speeds(run.cells),
            **({} if run.search is None else {"search": run.search}),
        }
    )


def _asked(run: Run) -> list[float]:
    """Return the retentions that a search was asked for, the default one first, else the strictest."""
    found = {own["retention"] for cell in run.cells for own in cell.searches} | asked_of_averages(run.search)
    return sorted(found or {DEFAULT_RETENTION}, key=lambda own: (own != DEFAULT_RETENTION, -own))


def clean(value: Any) -> Any:
    """Return a value with tuples as lists, numpy scalars as Python ones and non-finite numbers as None.

    Args:
        value: Nested dictionaries, lists, tuples and scalars.
    """
    if isinstance(value, dict):
        return {str(key): clean(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [clean(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _identity(cell: Cell) -> dict[str, Any]:
    return {name: cell.record[name] for name in ("paradigm", "model", "task", "output_type", "estimator")}


def _curve(curve: Curve, judged: Judged) -> dict[str, Any]:
    dense = curve.points[0]
    return {
        **_identity(curve.group.dense),
        "rule": curve.group.rule,
        "site": curve.group.site,
        "quality": curve.quality["name"],
        "kind": curve.quality["kind"],
        "chance": curve.quality["chance"],
        "headline": curve.quality["name"] == curve.group.headline,
        "higher_is_better": curve.scale.sign > 0,
        "items": len(curve.keys),
        "dense": _searched_from(curve) or {"value": dense.quality, "interval": dense.quality_interval},
        "critical": [own.told for own in curve.readings],
        "noise": vars(judged.noise) if judged.noise else None,
        "points": [_point(*both) for both in zip(curve.points, judged.verdicts, strict=True)],
        "path": [_step(own, judged) for own in next((own["path"] for own in _answers(curve)), [])],
        **_cost(curve.group.dense),
    }


def _answers(curve: Curve) -> list[dict[str, Any]]:
    return [own for own in curve.group.answers if own["quality"] == curve.quality["name"]]


def _searched_from(curve: Curve) -> dict[str, Any] | None:
    """Return the dense quality on the items that a search's answers rest on; the points of its curve have fewer."""
    answers = [own for own in _answers(curve) if own["value"] is not None]
    if not curve.group.is_searched or not answers:
        return None
    return max(answers, key=lambda own: own["items"]).get("dense")


def _point(point: Point, verdict: Verdict | None) -> dict[str, Any]:
    fields = {name: value for name, value in vars(point).items() if name != "cell"}
    record = point.cell.record
    named = {"fingerprint": record["fingerprint"], "dense": record["dense"], "strength": record["strength"]}
    return named | fields | _verdict(verdict)


def _step(step: dict[str, Any], judged: Judged) -> dict[str, Any]:
    """Return a strength of a search; what is said of it against dense, where it is none of the curve's points."""
    verdict = judged.elsewhere.get(step["strength"])
    if verdict is None:
        return step
    return step | {"dense": False, "difference": verdict.test.difference} | _verdict(verdict)


def _verdict(verdict: Verdict | None) -> dict[str, Any]:
    """Return what is said of a cell against dense; of dense against itself there is nothing to say."""
    if verdict is None:
        names = ("standard_error", "p", "p_holm", "comparisons", "test", "groups", "changed", "noise_floor", "outcome")
        return dict.fromkeys(("smallest_detectable", *names, "words", "short"))
    test, tested = verdict.test, verdict.p_holm is not None
    return {
        "difference_interval": test.interval,
        "smallest_detectable": verdict.smallest_detectable,
        "standard_error": test.standard_error,
        "p": test.p if tested else None,
        "p_holm": verdict.p_holm,
        "comparisons": verdict.comparisons,
        "test": test.test if tested else None,
        "groups": test.groups,
        "changed": test.changed,
        "noise_floor": verdict.floor,
        "outcome": verdict.outcome,
        "words": verdict.words,
        "short": verdict.short,
    }


def _comparison(pair: Comparison) -> dict[str, Any]:
    first, second = pair.autoregressive, pair.diffusion
    return {
        "task": first.group.dense.record["task"],
        "site": first.group.site,
        "rule": first.group.rule,
        "quality": first.quality["name"],
        "autoregressive": first.group.dense.record["model"],
        "diffusion": second.group.dense.record["model"],
        "retention": pair.retention,
        "difference": pair.difference,
        "interval": pair.interval,
        "paired": pair.paired,
        "bounded": pair.bounded,
        "smallest_detectable": pair.smallest_detectable,
        "items": [len(first.keys), len(second.keys)],
    }


def _cost(cell: Cell) -> dict[str, Any]:
    sums = {name: float(np.nansum(numbers(cell.samples, name))) for name in ("nfe", "new_tokens", "seconds")}
    generates = cell.record["output_type"] == "generate_until" and sums["nfe"] > 0
    return {**sums, "tokens_per_forward": sums["new_tokens"] / sums["nfe"] if generates else None}


def _cell(cell: Cell) -> dict[str, Any]:
    record = cell.record
    names = ("fingerprint", "dense", "rule", "rule_parameters", "strength", "site", "simulated", "items", "notes")
    sites = record["totals"].get("sites", {})
    achieved = {
        site: 1 - counts["kept"] / counts["total"]
        for site, counts in sites.items()
        if isinstance(counts, dict) and counts.get("total") and "kept" in counts
    }
    told = {**{name: record[name] for name in names}, "replicate": record.get("replicate", 0), "achieved": achieved}
    return {**_identity(cell), **told, **_cost(cell)}


def _counts(run: Run) -> dict[str, Any]:
    records = [cell.record for cell in run.cells]
    return {
        "cells": len(records),
        "unsealed": run.unsealed,
        "damaged": len(run.damaged),
        "items": sum(record["items"] for record in records),
        **{f"{name}s": sorted({record[name] for record in records}) for name in ("paradigm", "model", "task")},
    }


def _notes(run: Run) -> list[str]:
    records: Sequence[Any] = [cell.record for cell in run.cells]
    notes = []
    if run.unfounded:
        more = f"; and {len(run.unfounded) - _UNFOUNDED_TOLD} more" if len(run.unfounded) > _UNFOUNDED_TOLD else ""
        notes.append(
            "left out, for cells that they rest on are damaged or missing, and made again by dllm-sparsity compare: "
            + "; ".join(run.unfounded[:_UNFOUNDED_TOLD])
            + more
        )
    notes += [f"left out, and computed again by dllm-sparsity compare: {each}" for each in run.damaged[:_DAMAGED_TOLD]]
    if len(run.damaged) > _DAMAGED_TOLD:
        notes.append(f"{len(run.damaged) - _DAMAGED_TOLD} more cells are damaged and left out")
    if any(record["simulated"] for record in records if not record["dense"]):
        notes.append("no speed-up was measured; masks were simulated: the zeros were multiplied like any other number")
    for estimator in sorted(
        {own["estimator"] for own in records if own["estimator"] and own["paradigm"] == "diffusion"}
    ):
        notes.append(f"a diffusion likelihood is a bound ({estimator}), not comparable with an exact NLL")
    if run.unsealed:
        several = "cells are" if run.unsealed > 1 else "cell is"
        notes.append(f"{run.unsealed} {several} not finished and not shown")
    return notes


def _further_notes(run: Run) -> list[str]:
    weighted = []
    if any(cell.record["site"] == "all" for cell in run.cells):
        weighted = ["at site all, achieved sparsity is weighted by neurons: the wider intermediate site weighs more"]
    return [*weighted, *dict.fromkeys(str(note) for cell in run.cells for note in cell.record["notes"])]
