"""The table of compare --dry-run: a line for each model and task, and how its numbers are written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dllm_sparsity.study.dry_run import Part

_NUMBERS = ("cells", "items", "forwards", "FLOPs", "FFN", "GB", "time")
_NAME, _GAP = 9, 2


def table(parts: Sequence[Part], width: int) -> Any:
    """Return the table; names are broken between words where it is wider than the console.

    Args:
        parts: By model and task.
        width: Of the console.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = [
        (_clean(part.model), _clean(part.task.rsplit("/", 1)[-1]), [*map(_clean, _numbers(part))]) for part in parts
    ]
    taken = [max(map(len, own)) for own in zip(_NUMBERS, *(numbers for *_, numbers in rows), strict=True)]
    gap = _GAP if sum(taken) + len(taken) * _GAP + 2 * _NAME < width - 8 else 1
    room = width - sum(taken) - gap * (len(taken) + 1) - 1
    models, tasks = ({row[column] for row in rows} for column in (0, 1))
    longest = max((len(word) for name in tasks for word in _words(name)), default=0)
    task = max(longest, room - max(_NAME, *map(len, models)), room // 2) if rows else _NAME
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, gap - 1, 0, 0))
    shown.add_column("model", overflow="fold")
    shown.add_column("task", overflow="fold", min_width=min(task, max(map(len, tasks), default=0)))
    for name in _NUMBERS:
        shown.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    for model, name, numbers in rows:
        shown.add_row(Text(model), Text(_broken(name, task)), *map(Text, numbers))
    return shown


def _numbers(part: Part) -> list[str]:
    work = part.work
    bound = "<=" if work is not None and work.bounded else ""
    share = part.ffn_flops / part.flops if part.ffn_flops and part.flops else None
    about = "~" if part.searched else ""
    return [
        f"{about}{part.cells + part.searched:,}",
        "-" if work is None else f"{work.items:,}",
        "-" if part.forwards is None else f"{bound}{short(part.forwards)}",
        "-" if part.flops is None else f"{bound}{short(part.flops)}",
        "-" if share is None else f"{share:.0%}",
        "-" if part.peak is None else f"{max(part.measured_peak or 0, part.peak) / 1e9:.2g}",
        "-" if part.seconds is None else f"{bound}{duration(part.seconds)}",
    ]


def _clean(text: str) -> str:
    return "".join(sign for sign in text if sign.isprintable())


def _words(name: str) -> list[str]:
    return re.findall(r"[^_\-.]*[_\-.]?", name)


def _broken(name: str, width: int) -> str:
    """Break a name between its words into lines of a width."""
    lines = [""]
    for word in _words(name):
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += word
    return "\n".join(lines)


def short(value: float) -> str:
    """Write a number with a prefix, such as 1.2 T.

    Args:
        value: Not negative.
    """
    for size, sign in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {sign}"
    return f"{value:,.0f}" if value < 1e4 else f"{value / 1e3:.3g} k"


def duration(seconds: float) -> str:
    """Write a time in the unit that people would use.

    Args:
        seconds: How long.
    """
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.2g} {unit}" if seconds < 9.95 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.2g} s" if seconds >= 0.1 else "<0.1 s"
