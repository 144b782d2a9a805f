"""Join several run directories into one run; what is not comparable is refused, and the field is named."""

from __future__ import annotations

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


def join(runs: Sequence[Run], path: Path) -> Run:
    """Return the cells of all runs as one run; a cell that several have is there once.

    Args:
        runs: Loaded run directories.
        path: Directory that the joined run's report belongs to.

    Raises:
        UserError: Two runs differ in a package that computes, a seed, a task, or a model of one name.
    """
    first, search = runs[0], _search(runs)
    kept: dict[str, Cell] = {}
    seen: dict[tuple[str, ...], tuple[Run, dict[str, Any]]] = {}
    for run in runs:
        for cell in run.cells:
            for key, fields in _comparable(cell):
                _same(key, *seen.setdefault(key, (run, fields)), run, fields)
            kept.setdefault(cell.record["fingerprint"], cell)
    answers = search["curves"] if search else []  # whichever dense cell is used, it has those of all runs
    elsewhere = [own for run in runs for cell in run.cells for own in cell.elsewhere]
    return Run(
        path=path,
        cells=tuple(searched_from(cell, answers, elsewhere) for cell in sorted(kept.values(), key=_order)),
        unsealed=sum(run.unsealed for run in runs),
        damaged=tuple(f"{run.name}, {each}" for run in runs for each in run.damaged),
        unfounded=tuple(f"{run.name}, {each}" for run in runs for each in run.unfounded),
        config="\n".join(f"# {run.name}\n{run.config.strip()}\n" for run in runs),
        environment=first.environment,
        search=search,
    )


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


def _same(key: tuple[str, ...], one: Run, before: dict[str, Any], other: Run, now: dict[str, Any]) -> None:
    """Refuse two runs that differ in something, by the name of the field.

    Raises:
        UserError: They differ.
    """
    difference = next(_differences(before, now), None)
    if difference is None:
        return
    field, old, new = difference
    about = {"versions": "version of ", "task": f"task {key[-1]}: ", "study": ""}.get(key[0], f"model {key[-1]}: ")
    if key[0] in ("model", "draws"):
        hint = "give one of them another label in its study; different models can be joined"
    else:
        hint = "run one of them again as the other was, or report them one by one"
    raise UserError(
        f"{one.name} and {other.name} are not comparable: {about}{field} is {_short(old)} and {_short(new)}", hint
    )


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
