"""The names that --fail-if may use: those of a summary, with where their values lie, and those known before a run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from itertools import product, zip_longest
from typing import TYPE_CHECKING, Any

from dllm_sparsity.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from dllm_sparsity.cli.gate import Gate
    from dllm_sparsity.study.config import StudyConfig

Range = tuple[float, float]
"""Where a number may lie: twice the same where it is known, to infinity where it is only a bound."""
_FREE = ("MODEL", "RULE", "QUALITY", "AUTOREGRESSIVE", "DIFFUSION")


def names(summary: dict[str, Any]) -> dict[str, Range | None]:
    """Return the names that a condition can use, with where their values lie; None where nothing is known.

    A curve is `TASK.SITE.PARADIGM.MODEL.RULE`, on the headline quality; a difference is
    `TASK.SITE.RULE.QUALITY.AUTOREGRESSIVE.DIFFUSION`, the two models last. `TASK.SITE.PARADIGM`, and `TASK.SITE` on the
    headline quality, do where they name one alone. Averages stand in the place of a task.

    Args:
        summary: What summary.json holds.
    """
    found: dict[str, Range | None] = {
        f"counts.{name}": (summary["counts"][name],) * 2 for name in ("cells", "unsealed")
    }
    averages = summary.get("averages", [])
    curves = [curve for curve in summary["curves"] if curve["headline"]] + averages
    default = (summary["default_retention"], summary["default_reading"])
    short = [_dotted(curve["task"], curve["site"], curve["paradigm"]) for curve in curves]
    for name, curve in zip(short, curves, strict=True):
        for place in _places(name, _dotted(curve["model"], curve["rule"]), short.count(name) == 1):
            found |= _interval(f"dense.{place}", curve["dense"]["value"], curve["dense"]["interval"])
            for critical in curve["critical"]:
                if (critical["retention"], critical["reading"]) == default:
                    above = critical["censored"]
                    found |= _interval(f"critical.{place}", critical["value"], critical["interval"], above=above)
    told = {_of(curve, curve["paradigm"], curve["model"]) for curve in curves}
    censored = {
        _of(curve, curve["paradigm"], curve["model"]): critical["censored"]
        for curve in [*summary["curves"], *averages]
        for critical in curve["critical"]
        if (critical["retention"], critical["reading"]) == default
    }
    pairs = [pair for pair in summary["comparisons"] if pair["retention"] == summary["default_retention"]]
    ends = [[_of(pair, paradigm, pair[paradigm]) for paradigm in ("autoregressive", "diffusion")] for pair in pairs]
    first_told = [told.issuperset(own) for own in ends]
    short = [_dotted(pair["task"], pair["site"]) for pair, is_told in zip(pairs, first_told, strict=True) if is_told]
    for pair, (first, second), is_told in zip(pairs, ends, first_told, strict=True):
        name = _dotted(pair["task"], pair["site"])
        more = _dotted(pair["rule"], pair["quality"], pair["autoregressive"], pair["diffusion"])
        # more that autoregressive may reach makes the difference less
        below, above = censored.get(first, False), censored.get(second, False)
        for place in _places(name, more, is_told and short.count(name) == 1):
            found |= _interval(f"difference.{place}", pair["difference"], pair["interval"], below, above)
    return found


def _places(name: str, more: str, is_alone: bool) -> list[str]:
    return [name, f"{name}.{more}"] if is_alone else [f"{name}.{more}"]


def _of(entry: dict[str, Any], *model: str) -> tuple[str, ...]:
    """Return what tells a curve of a model from all others of a summary."""
    return *(entry[name] for name in ("task", "site", "rule", "quality")), *model


def refuse_ahead(gate: Gate, config: StudyConfig) -> None:
    """Refuse a condition before a run whose summary could not have its names.

    Args:
        gate: The condition.
        config: The study.

    Raises:
        UserError: A name is unknown, or a task cannot be loaded.
    """
    from dllm_sparsity.cli.silence import silence
    from dllm_sparsity.study.tasks import load_tasks

    with silence():
        tasks = [task.name for spec in config.tasks for task in load_tasks(spec, config.seed)]
    if unknown := unknown_ahead(gate, config, tasks):
        raise UserError(unknown[0], f"tasks of this study are: {', '.join(dict.fromkeys(tasks))}")


def unknown_ahead(gate: Gate, config: StudyConfig, tasks: Iterable[str]) -> list[str]:
    """Return what a condition asks for that no summary of a study will have, each in a sentence.

    Args:
        gate: The condition.
        config: The study.
        tasks: Its tasks, by lm-eval's names.
    """
    exact, begun = _names_ahead(config, tasks)
    unknown = []
    for name in gate.asked:
        whole = name.removesuffix(".low").removesuffix(".high")
        if name in exact or any(_follows(whole, f"{place}.{more}") for place, more in begun.items()):
            continue
        told = f": several share that name; write {whole}.{begun[whole]}" if whole in begun else ""
        unknown.append(
            f"--fail-if: the summary will have no {name}{told or did_you_mean(name, sorted(exact | {*begun}))}"
        )
    return unknown


def _follows(name: str, pattern: str) -> bool:
    """Tell whether a name is a pattern whose parts in capitals stand for any other."""
    pairs = zip_longest(name.split("."), pattern.split("."), fillvalue="")
    return all(part and (part == own or own in _FREE) for part, own in pairs)


def _names_ahead(config: StudyConfig, tasks: Iterable[str]) -> tuple[set[str], dict[str, str]]:
    """Return the names that a summary will have, and what others begin with, with what follows there."""
    from dllm_sparsity.analysis.averages import KINDS, name_of

    exact, begun = {"counts.cells", "counts.unsealed"}, {}
    tasks = list(tasks)
    tasks += [name_of(count, kind) for count in range(2, len(tasks) + 1) for kind in (None, *KINDS)]
    layerwise = config.search is not None and config.search.layerwise  # its curves may be there, or not
    paradigms = [model.paradigm for model in config.models]
    for task, site in product(tasks, dict.fromkeys(site for rule in config.rules for site in rule.sites)):
        rules = len({rule.identity for rule in config.rules if site in rule.sites})
        for paradigm, kind in product(dict.fromkeys(paradigms), ("dense", "critical")):
            place = f"{kind}.{_dotted(task, site, paradigm)}"
            alone = rules * paradigms.count(paradigm) == 1 and not layerwise
            exact |= set(_interval(place, None, None)) if alone else set()
            begun[place] = "MODEL.RULE"
        if len(set(paradigms)) > 1:
            place = f"difference.{_dotted(task, site)}"
            exact |= set(_interval(place, None, None)) if rules * len(paradigms) == 2 and not layerwise else set()
            begun[place] = "RULE.QUALITY.AUTOREGRESSIVE.DIFFUSION"
    return exact, begun


def _interval(
    name: str, value: float | None, interval: Any, below: bool = False, above: bool = False
) -> dict[str, Range | None]:
    """Return a value and the ends of its interval under their names.

    Args:
        name: Of the value.
        value: The value, or None.
        interval: Its interval, or None.
        below: Whether the truth may lie anywhere below the value, and above an end that is no lower than it.
        above: Likewise above it.
    """

    def reach(end: float | None) -> Range | None:
        if end is None or value is None:
            return None
        return (-math.inf if below and end <= value else end), (math.inf if above and end >= value else end)

    low, high = interval if interval else (None, None)
    return {name: reach(value), f"{name}.low": reach(low), f"{name}.high": reach(high)}


def _dotted(*parts: str) -> str:
    """Join names with dots; what no name can hold becomes an underscore, and so does a dot inside a part."""
    clean = (re.sub(r"\W", "_", str(part)) for part in parts)
    return ".".join(f"_{part}" if part[:1].isdigit() else part for part in clean)
