"""The table at the end of a run, in 80 columns, readable without colour."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dllm_sparsity.analysis.amounts import amounts
from dllm_sparsity.analysis.findings import allocation_findings, first_worse
from dllm_sparsity.analysis.headline import headline, without_answer
from dllm_sparsity.analysis.searched import ends
from dllm_sparsity.report import words

_SHORT = {"autoregressive": "AR", "diffusion": "diffusion"}
_UNITS = {"accuracy": "right", "nll": "NLL", "loglikelihood": "log-lik.", "agreement": "equal"}
_AGAINST = (
    "First cell worse: by how much and at which sparsity, where the loss stays significant after Holm's correction."
    " Detectable: the least loss that would have shown so in the cell before it, in 4 of 5 studies."
    " Points of accuracy, or nats per token."
)
_NOTES = 3
_FEW = 20
"""Items below which a bootstrap of them is known to be too narrow."""
_STYLES = {"autoregressive": "blue", "diffusion": "dark_orange3"}


def render(summary: dict[str, Any]) -> Group:
    """Return what the terminal shows of a study.

    Args:
        summary: What `analysis.summary` returned.
    """
    rows = headline(summary)
    asked = list(dict.fromkeys(row["retention"] for row in rows))
    kept = " or ".join(f"{100 * own:g} %" for own in asked)
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold", expand=False)
    table.add_column("task", max_width=22, overflow="fold")
    table.add_column("", max_width=9, overflow="fold")
    for name, width in (("dense", 16), (f"sparsity at {kept}" if len(asked) == 1 else "sparsity", 21), ("tok/fwd", 7)):
        table.add_column(name, justify="right", max_width=width, overflow="fold")
    several_rules, called = len({row["rule"] for row in rows}) > 1, _names(summary, rows)
    task = previous = model = None
    for row in rows:
        place = (row["task"], row["site"], row["rule"])
        again, model = model == (*place, row["paradigm"], row["model"]), (*place, row["paradigm"], row["model"])
        at = f"{100 * row['retention']:g} %: " if len(asked) > 1 else ""
        if row["task"] != task:
            table.add_row(_text(row["task"], style="bold"))
            task = row["task"]
        shown = "  " + ", ".join([row["site"], *([row["rule"]] if several_rules else [])])
        dense = f"{words.quality(row['dense'], row['kind'])} {_UNITS.get(row['kind'], '')}".rstrip()
        table.add_row(
            _text("" if place == previous else shown),
            _text("" if again else called[row["paradigm"], row["model"]], style=_STYLES.get(row["paradigm"], "")),
            _text("" if again else dense),
            _text(
                at + words.critical(row | {"value": row["critical"]}).replace(" %", "").replace(words.NOTHING, "none")
            ),
            _text("" if again or row["tokens_per_forward"] is None else f"{row['tokens_per_forward']:.2f}"),
        )
        previous = place
    explained = (
        f"Sparsity in percent: the highest that keeps {kept} of the dense quality, with its 95 % interval;"
        " \N{GREATER-THAN OR EQUAL TO} where no measured point fell below. NLL and log-lik. in nats per token."
    )
    if summary.get("averages"):
        explained += " Averages: of the tasks' quality and sparsity at one strength, each task counting the same."
        tasks = {curve["task"] for curve in summary["curves"]}
        some = {own["task"]: own["tasks"] for own in summary["averages"] if len(own["tasks"]) < len(tasks)}
        explained += "".join(f" {name[:1].upper()}{name[1:]}: {', '.join(own)}." for name, own in some.items())
    if few := {row["task"]: row["items"] for row in rows if row["items"] < _FEW}:
        told = ", ".join(f"{task} ({items})" for task, items in few.items())
        explained += f" On so few items an interval is rough: {told}."
    reasons = without_answer(
        (row["task"], called[row["paradigm"], row["model"]], row["site"], _why(row)) for row in rows
    )
    told, more = summary["notes"][:_NOTES], len(summary["notes"][_NOTES:])
    told += [f"the report has {more} more note{'s'[: more - 1]}"] if more else []
    notes = [_text(f"note: {note}") for note in [*reasons, *told]]
    if not rows:
        nothing = _text("no curve yet: a dense cell and a cell with a rule must both be finished")
        return Group(Padding(nothing, (0, 0, 1, 0)), *_ends(summary, several_rules, called), *notes)
    once = [row for row in rows if row["retention"] == asked[0]]
    against = _against_dense(summary, once, several_rules, called)
    layerwise = [Padding(_text(words), (0, 0, 1, 0)) for words in allocation_findings(summary.get("search"))]
    return Group(
        table,
        Padding(_text(explained), (1, 0, 1, 0)),
        *layerwise,
        *_ends(summary, several_rules, called),
        against,
        Padding(_text(_AGAINST), (1, 0, 0, 0)),
        *notes,
    )


def _why(row: dict[str, Any]) -> str | None:
    return row["reason"] and row["reason"] + (": shown by NLL" if row["stands_in_for"] else "")


def _names(summary: dict[str, Any], rows: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """Return what each model is called: its paradigm where it is alone there, else its name."""
    models = list(dict.fromkeys((row["paradigm"], row["model"]) for row in [*rows, *ends(summary.get("search"))]))
    count = Counter(paradigm for paradigm, _ in models)
    return {own: own[1] if count[own[0]] > 1 else str(_SHORT.get(own[0], own[0])) for own in models}


def _ends(summary: dict[str, Any], several_rules: bool, called: dict[tuple[str, str], str]) -> list[Padding]:
    """Return why each search stopped and what it took; nothing where there was none."""
    rows = ends(summary.get("search"))
    several = len({row["retention"] for row in rows}) > 1
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold", expand=False)
    table.add_column("search", max_width=25, overflow="fold")
    table.add_column("", max_width=9, overflow="fold")
    table.add_column("ended by (width in points)", max_width=31, overflow="fold")
    table.add_column("evaluations", justify="right", max_width=22, overflow="fold")
    task = None
    for row in rows:
        if row["task"] != task:
            table.add_row(_text(row["task"], style="bold"))
            task = row["task"]
        at = f"{100 * row['retention']:g} %: " if several else ""
        shown = "  " + ", ".join([row["site"], *([row["rule"]] if several_rules else [])])
        told = (shown, called[row["paradigm"], row["model"]], at + row["ended"], row["evaluations"])
        table.add_row(*map(_text, told))
    return [Padding(table, (0, 0, 1, 0))] if rows else []


def _against_dense(
    summary: dict[str, Any], rows: list[dict[str, Any]], several_rules: bool, called: dict[tuple[str, str], str]
) -> Table:
    """Return the least sparse cell of each row that is worse than dense, and what the cell before it could show."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold", expand=False)
    table.add_column("against dense", max_width=20, overflow="fold")
    table.add_column("", max_width=9, overflow="fold")
    table.add_column("first cell worse", justify="right", max_width=36, overflow="fold")
    table.add_column("detectable", justify="right", max_width=10, overflow="fold")
    task = previous = None
    for row in rows:
        names = ("task", "site", "rule", "paradigm", "model", "quality")
        curve = next((own for own in summary["curves"] if all(own[name] == row[name] for name in names)), None)
        if curve is None:  # an average: its cells are those of its tasks
            continue
        worse, before = first_worse(curve)
        if row["task"] != task:
            table.add_row(_text(row["task"], style="bold"))
            task = row["task"]
        place = (row["task"], row["site"], row["rule"])
        shown = "  " + ", ".join([row["site"], *([row["rule"]] if several_rules else [])])
        at = "" if worse is None else f"{worse['short'].removeprefix('worse ')} at {words.percent(worse['sparsity'])}"
        least = None if before is None else before["smallest_detectable"]
        table.add_row(
            _text("" if place == previous else shown),
            _text(called[row["paradigm"], row["model"]], style=_STYLES.get(row["paradigm"], "")),
            _text(at or "none"),
            _text(words.NOTHING if least is None else amounts([least], row["kind"])[0]),
        )
        previous = place
    return table


def _text(content: str, style: str = "") -> Text:
    """Return foreign text without control characters: a result file must not steer the terminal."""
    return Text("".join(mark for mark in content if mark.isprintable()), style=style)
