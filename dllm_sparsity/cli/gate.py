"""--fail-if: a condition on the numbers of a summary, for continuous integration."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import click

from dllm_sparsity.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from dllm_sparsity.study.config import StudyConfig

EXIT_CODE = 4
_COMPARE: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_LONGEST = 1000
_EXAMPLE = "write a condition such as: critical.easy_endings.intermediate.diffusion < 0.5"


class Gate:
    """A condition, parsed before a study runs and asked afterwards.

    Args:
        text: Names of a summary, numbers, comparisons, and, or, not.

    Raises:
        UserError: It is anything else.
    """

    def __init__(self, text: str) -> None:
        if len(text) > _LONGEST:
            raise UserError(f"the condition is longer than {_LONGEST} characters", _EXAMPLE)
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
            _check(self._tree)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise UserError(
                f"{text!r} is not a condition: {error.args[0] if error.args else error}", _EXAMPLE
            ) from error
        self.text = text

    @property
    def asked(self) -> list[str]:
        """Return the names that it asks for."""
        inner = {node.value for node in ast.walk(self._tree) if isinstance(node, ast.Attribute)}
        paths = (node for node in ast.walk(self._tree) if isinstance(node, ast.Attribute | ast.Name))
        return list(dict.fromkeys(".".join(_path(node)) for node in paths if node not in inner))

    def holds(self, summary: dict[str, Any]) -> bool:
        """Tell whether the condition holds.

        Args:
            summary: What summary.json holds.

        Raises:
            UserError: A name is not in it, or its value is not known.
        """
        return _truth(self._tree, names(summary))


def leave(context: click.Context, gate: Gate, summary: dict[str, Any]) -> None:
    """Leave with an exit code of its own where the condition holds.

    Args:
        context: The command.
        gate: The condition.
        summary: What summary.json holds.
    """
    if gate.holds(summary):
        click.echo(f"failed: {gate.text}", err=True)
        context.exit(EXIT_CODE)


def names(summary: dict[str, Any]) -> dict[str, float | None]:
    """Return the names that a condition can use, with their values; None where a value is not known.

    A curve is `TASK.SITE.PARADIGM`, followed by the model and the rule where that names several; averages stand in the
    place of a task.

    Args:
        summary: What summary.json holds.
    """
    found: dict[str, float | None] = {f"counts.{name}": summary["counts"][name] for name in ("cells", "unsealed")}
    curves = [curve for curve in summary["curves"] if curve["headline"]] + summary.get("averages", [])
    short = [_dotted(curve["task"], curve["site"], curve["paradigm"]) for curve in curves]
    for name, curve in zip(short, curves, strict=True):
        place = name if short.count(name) == 1 else f"{name}.{_dotted(curve['model'], curve['rule'])}"
        found |= _interval(f"dense.{place}", curve["dense"]["value"], curve["dense"]["interval"])
        for critical in curve["critical"]:
            if (critical["retention"], critical["reading"]) == (
                summary["default_retention"],
                summary["default_reading"],
            ):
                found |= _interval(f"critical.{place}", critical["value"], critical["interval"])
    pairs = [pair for pair in summary["comparisons"] if pair["retention"] == summary["default_retention"]]
    short = [_dotted(pair["task"], pair["site"]) for pair in pairs]
    for name, pair in zip(short, pairs, strict=True):
        more = _dotted(pair["rule"], pair["quality"], pair["autoregressive"], pair["diffusion"])
        place = name if short.count(name) == 1 else f"{name}.{more}"
        found |= _interval(f"difference.{place}", pair["difference"], pair["interval"])
    return found


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
    places = sorted({*exact, *begun})
    return [
        f"--fail-if: the summary will have no {name}{did_you_mean(name, places)}"
        for name in gate.asked
        if name not in exact
        and not name.startswith(tuple(f"{place}." for place in begun))
        and ".average of " not in name  # which tasks and qualities can be averaged, only the run tells
    ]


def _names_ahead(config: StudyConfig, tasks: Iterable[str]) -> tuple[set[str], set[str]]:
    """Return the names that a summary will have, and what others begin with: the model and the rule follow."""
    from dllm_sparsity.analysis.averages import KINDS, name_of

    exact, begun = {"counts.cells", "counts.unsealed"}, set()
    tasks = list(tasks)
    tasks += [name_of(count, kind) for count in range(2, len(tasks) + 1) for kind in (None, *KINDS)]
    layerwise = config.search is not None and config.search.layerwise  # its curves may be there, or not
    paradigms = [model.paradigm for model in config.models]
    for task, site in product(tasks, dict.fromkeys(site for rule in config.rules for site in rule.sites)):
        rules = sum(site in rule.sites for rule in config.rules)
        for paradigm, kind in product(dict.fromkeys(paradigms), ("dense", "critical")):
            place = f"{kind}.{_dotted(task, site, paradigm)}"
            alone = rules * paradigms.count(paradigm) == 1
            exact |= set(_interval(place, None, None)) if alone else set()
            begun |= set() if alone and not layerwise else {place}
        if len(set(paradigms)) > 1:
            place = f"difference.{_dotted(task, site)}"  # with several qualities theirs and the models' names follow
            exact |= set(_interval(place, None, None))
            begun.add(place)
    return exact, begun


def _interval(name: str, value: float | None, interval: Any) -> dict[str, float | None]:
    low, high = interval if interval else (None, None)
    return {name: value, f"{name}.low": low, f"{name}.high": high}


def _dotted(*parts: str) -> str:
    """Join names with dots; what no name can hold becomes an underscore, and so does a dot inside a part."""
    clean = (re.sub(r"\W", "_", str(part)) for part in parts)
    return ".".join(f"_{part}" if part[:1].isdigit() else part for part in clean)


def _check(node: ast.AST) -> None:
    """Refuse all but conditions.

    Raises:
        ValueError: It is something else.
    """
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            _check(value)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check(node.operand)
    elif isinstance(node, ast.Compare):
        for kind in node.ops:
            if type(kind) not in _COMPARE:
                raise ValueError("compare with <, <=, >, >=, == or !=")
        for side in (node.left, *node.comparators):
            _number(side, None)
    else:
        raise ValueError(f"{ast.unparse(node)[:60]} compares nothing")


def _truth(node: ast.AST, known: dict[str, float | None]) -> bool:
    if isinstance(node, ast.BoolOp):
        every = all if isinstance(node.op, ast.And) else any
        return every([_truth(value, known) for value in node.values])
    if isinstance(node, ast.UnaryOp):
        return not _truth(node.operand, known)
    if not isinstance(node, ast.Compare):
        raise TypeError(type(node).__name__)  # refused when it was parsed
    sides = [_number(side, known) for side in (node.left, *node.comparators)]
    return all([_COMPARE[type(kind)](*pair) for kind, pair in zip(node.ops, pairwise(sides), strict=True)])


def _number(node: ast.AST, known: dict[str, float | None] | None) -> float:
    """Return the value of a number or a name; with None for what is known only its form is checked."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand, known)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)  # pyright: ignore[reportArgumentType]
    name = ".".join(_path(node))
    if known is None:
        return 0.0
    if name not in known:
        some = [each for each in known if not each.endswith((".low", ".high"))]
        raise UserError(
            f"the summary has no {name}{did_you_mean(name, list(known))}",
            f"it has {', '.join(some[:8])}{' ...' if len(some) > 8 else ''}; .low and .high are the interval's ends",
        )
    value = known[name]
    if value is None:
        raise UserError(f"{name} is not known in this run", "the report says why; choose another name")
    return float(value)


def _path(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Attribute):
        yield from _path(node.value)
        yield node.attr
    elif isinstance(node, ast.Name):
        yield node.id
    else:
        raise ValueError(f"{ast.unparse(node)[:60]} is neither a number nor a name")
