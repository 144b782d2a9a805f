"""Join several run directories into one run; what is not comparable is refused, and the field is named."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dllm_sparsity.analysis.blocks import searched_from
from dllm_sparsity.analysis.loading import Cell, Run
from dllm_sparsity.errors import UserError

_OF_A_TASK = ("task", "limit", "num_fewshot", "chat_template")
_OF_A_MODEL = ("model", "weights")
_OF_AN_ANSWER = (
    "paradigm",
    "model",
    "task",
    "tasks",
    "rule",
    "rule_parameters",
    "layers",
    "site",
    "quality",
    "retention",
)


_MOST_TOLD = 6
_HASH = re.compile("[0-9a-f]{16,}")
_Difference = tuple[tuple[str, ...], str, Any, Any]
"""What two runs differ in: what it is about, the field, and both values."""


def join(runs: Sequence[Run], path: Path) -> Run:
    """Return the cells of all runs as one run; a cell that several have is there once.

    Args:
        runs: Loaded run directories.
        path: Directory that the joined run's report belongs to.

    Raises:
        UserError: Two runs differ in a package that computes, a seed, a task, or a model of one name.
    """
    search = _search(runs)
    kept: dict[str, Cell] = {}
    seen: dict[tuple[str, ...], tuple[Run, dict[str, Any]]] = {}
    for run in runs:
        found: dict[str, list[_Difference]] = {}
        for cell in run.cells:
            for key, fields in _comparable(cell):
                before, old = seen.setdefault(key, (run, fields))
                found.setdefault(before.name, []).extend((key, *own) for own in _differences(old, fields))
            kept.setdefault(cell.record["fingerprint"], cell)
        for before, differences in found.items():
            if differences:
                _refuse(before, run.name, differences)
    answers = search["curves"] if search else []  # whichever dense cell is used, it has those of all runs
    elsewhere = [own for run in runs for cell in run.cells for own in cell.elsewhere]
    return Run(
        path=path,
        cells=tuple(searched_from(cell, answers, elsewhere) for cell in sorted(kept.values(), key=_order)),
        unsealed=sum(run.unsealed for run in runs),
        damaged=tuple(f"{run.name}, {each}" for run in runs for each in run.damaged),
        unfounded=tuple(f"{run.name}, {each}" for run in runs for each in run.unfounded),
        config="\n".join(f"# {run.name}\n{run.config.strip()}\n" for run in runs),
        environment=_together({_label(runs, number): run.environment for number, run in enumerate(runs)}),
        search=search,
    )


def _label(runs: Sequence[Run], number: int) -> str:
    """Return a run's name; with a number where an earlier run of another folder has it too."""
    again = sum(run.name == runs[number].name for run in runs[:number])
    return runs[number].name + (f", no. {again + 1}" if again else "")


def _together(values: dict[str, Any]) -> Any:
    """Return what all runs have in common, and under each run's name what they do not."""
    first, *others = values.values()
    if all(own == first for own in others):
        return first
    if not all(isinstance(own, dict) for own in values.values()):
        return values
    names = dict.fromkeys(name for own in values.values() for name in own)
    return {name: _together({run: own.get(name) for run, own in values.items()}) for name in names}


def _search(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Return what was searched in all runs; of two answers on one curve, or one average, the first."""
    found: dict[str, list[Any]] = {"curves": [], "averages": []}
    for name, kept in found.items():
        answers = [own for run in runs if run.search is not None for own in run.search.get(name, [])]
        kept += {repr([own.get(each) for each in _OF_AN_ANSWER]): own for own in reversed(answers)}.values()
        kept.reverse()
    return found if any(found.values()) else None


def _comparable(cell: Cell) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Give what has to be the same in all runs, each under what it is about."""
    record: Any = cell.record
    parts = record.get("parts") or {}
    yield ("versions",), parts.get("versions") or {}
    yield ("study",), {"seed": parts.get("seed")}
    yield ("task", record["task"]), {name: parts.get(name) for name in _OF_A_TASK}
    about = {name: parts.get(name) for name in _OF_A_MODEL}
    # `mc` may be set by the task
    settings = {name: value for name, value in (about["model"] or {}).items() if name != "mc"}
    yield ("model", record["paradigm"], record["model"]), {**about, "model": settings}
    if record["paradigm"] == "diffusion":
        own = {"model": {"mc": (about["model"] or {}).get("mc")}}
        yield ("draws", record["task"], record["model"]), own


def _refuse(one: str, other: str, found: Sequence[_Difference]) -> None:
    """Refuse two runs that differ in something: what a person chose is named first, and hashes only as differing.

    Raises:
        UserError: Always.
    """
    told = list(dict.fromkeys(_told(*own) for own in sorted(found, key=lambda own: _is_hashed(*own[2:]))))
    more = f"; and {len(told) - _MOST_TOLD} more" if len(told) > _MOST_TOLD else ""
    if all(own[0][0] in ("model", "draws") for own in found):
        hint = "give one of them another label in its study; different models can be joined"
    else:
        hint = "run one of them again as the other was, or report them one by one"
    raise UserError(f"{one} and {other} are not comparable: {'; '.join(told[:_MOST_TOLD])}{more}", hint)


def _told(key: tuple[str, ...], field: str, old: Any, new: Any) -> str:
    about = {"versions": "version of ", "task": f"task {key[-1]}: ", "study": ""}.get(key[0], f"model {key[-1]}: ")
    return f"{about}{field} " + ("differs" if _is_hashed(old, new) else f"is {_short(old)} and {_short(new)}")


def _is_hashed(*values: Any) -> bool:
    return any(isinstance(value, str) and _HASH.fullmatch(value) for value in values)


def _differences(before: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Give the fields that differ, the inner ones of those that hold fields."""
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}", old, new


def _short(value: Any) -> str:
    return "not given" if value is None else str(value)[:40]


def _order(cell: Cell) -> tuple[Any, ...]:
    record = cell.record
    strength = record["strength"] if record["strength"] is not None else 0.0
    names = (record["paradigm"], record["model"], record["task"])
    sites = -len(record["sites_recorded"])  # of several dense cells the analysis takes the first
    return (
        *names,
        not record["dense"],
        record.get("replicate", 0),
        record["rule"] or "",
        record["site"] or "",
        strength,
        sites,
        record["fingerprint"],
    )
