"""--fail-if: a condition on the numbers of a summary, for continuous integration."""

from __future__ import annotations

import ast
import difflib
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise, product
from typing import Any

import click

from dllm_sparsity.cli.gate_names import Range, names
from dllm_sparsity.errors import UserError, did_you_mean

EXIT_CODE = 4
_ORDER: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_EQUAL = (ast.Eq, ast.NotEq)
_NEAREST = 8
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
        return _names(self._tree)

    def holds(self, summary: dict[str, Any]) -> bool:
        """Tell whether the condition holds.

        Args:
            summary: What summary.json holds.

        Raises:
            UserError: A name is not in it, its value is not known, or it is only a bound, which does not decide this.
        """
        known = names(summary)
        found = _truth(self._tree, known)
        if found is None:
            # neither code 4, for nothing was seen to fail, nor 0, for nothing was seen to hold
            raise UserError(
                f"whether {self.text} is not known: {_bounds(self._tree, known)}",
                "measure sparser strengths, or ask for something that the bound decides",
            )
        return found


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
            if type(kind) not in (*_ORDER, *_EQUAL):
                raise ValueError("compare with <, <=, >, >=, == or !=")
        for side in (node.left, *node.comparators):
            _number(side, None)
    else:
        raise ValueError(f"{ast.unparse(node)[:60]} compares nothing")


def _names(tree: ast.AST) -> list[str]:
    """Return the names in a condition."""
    inner = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    paths = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name))
    return list(dict.fromkeys(".".join(_path(node)) for node in paths if node not in inner))


def _truth(node: ast.AST, known: Mapping[str, Range | None]) -> bool | None:
    """Return whether a condition holds; None where what is only a bound does not decide it."""
    if isinstance(node, ast.BoolOp):
        found = [_truth(value, known) for value in node.values]  # all are asked, so that none is unknown unseen
        return _joined(found, isinstance(node.op, ast.Or))
    if isinstance(node, ast.UnaryOp):
        return _turned(_truth(node.operand, known))
    if not isinstance(node, ast.Compare):
        raise TypeError(type(node).__name__)  # refused when it was parsed
    sides = [_number(side, known) for side in (node.left, *node.comparators)]
    return _joined([_compared(kind, *pair) for kind, pair in zip(node.ops, pairwise(sides), strict=True)], False)


def _joined(found: list[bool | None], decides: bool) -> bool | None:
    """Return `decides` where one of several is it, what is not known where one is not, and else the contrary."""
    return decides if decides in found else None if None in found else not decides


def _turned(found: bool | None) -> bool | None:
    return None if found is None else not found


def _compared(kind: ast.cmpop, first: Range, second: Range) -> bool | None:
    if isinstance(kind, _EQUAL):
        apart = _joined([_compared(way, first, second) for way in (ast.Lt(), ast.Gt())], True)
        return apart if isinstance(kind, ast.NotEq) else _turned(apart)
    found = {_ORDER[type(kind)](*ends) for ends in product(first, second)}
    return found.pop() if len(found) == 1 else None


def _bounds(tree: ast.AST, known: Mapping[str, Range | None]) -> str:
    """Return what is only a bound in a condition, in words."""
    told = []
    for name in _names(tree):
        low, high = known[name] or (0.0, 0.0)
        if low == high:
            continue
        bounds = [f"at least {low:.4g}"] if math.isfinite(low) else []
        bounds += [f"at most {high:.4g}"] if math.isfinite(high) else []
        told.append(f"{name} is only known to be {bounds[0]}" if bounds else f"{name} has no bound")
    return ", ".join(told)


def _number(node: ast.AST, known: Mapping[str, Range | None] | None) -> Range:
    """Return where a number or a name lies; with None for what is known only its form is checked."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        low, high = _number(node.operand, known)
        return -high, -low
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = float(node.value)  # pyright: ignore[reportArgumentType]
        return value, value
    name = ".".join(_path(node))
    if known is None:
        return 0.0, 0.0
    if name not in known:
        near = difflib.get_close_matches(name, known, n=_NEAREST, cutoff=0.0)
        raise UserError(
            f"the summary has no {name}{did_you_mean(name, list(known))}",
            f"nearest are {', '.join(near)}; .low and .high are the interval's ends",
        )
    place = known[name]
    if place is None:
        raise UserError(f"{name} is not known in this run", "the report says why; choose another name")
    return place


def _path(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Attribute):
        yield from _path(node.value)
        yield node.attr
    elif isinstance(node, ast.Name):
        yield node.id
    else:
        raise ValueError(f"{ast.unparse(node)[:60]} is neither a number nor a name")
