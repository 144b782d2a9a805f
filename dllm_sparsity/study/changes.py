"""What of an earlier run a run does not use: the fields in which two plans differ. Imports no torch."""

from __future__ import annotations

import json
from typing import Any

_SAID = {"name": "label"}
"""Fields that users know under another name."""
_IDENTITY = ("weights", "rule", "block", "replicate", "probe", "average")


def plan_of(found: Any) -> list[dict[str, Any]] | None:
    """Return the cells of a plan; None where it is not what a run writes.

    Args:
        found: What plan.json holds.
    """
    kinds = {"fingerprint": str, "title": str, "parts": dict}
    is_plan = isinstance(found, list) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in kinds.items())
        for entry in found
    )
    return found if is_plan else None


def changes(before: list[dict[str, Any]], after: list[dict[str, Any]], searches: bool = False) -> list[str]:
    """Name the fields in which planned cells differ from those that an earlier run planned, and count those left over.

    A cell's fellow has its title, or else its weights, task and rule: a title holds the model's label.

    Args:
        before: Cells of the earlier plan, each with its fingerprint, title and parts.
        after: The plan now.
        searches: Whether more cells are planned later, as a search asks for them.
    """
    kept = {old["fingerprint"] for old in before} & {entry["fingerprint"] for entry in after}
    gone = [old for old in before if old["fingerprint"] not in kept]
    titles, alike = {old["title"]: old for old in gone}, {_identity(old["parts"]): old for old in gone}
    found: dict[tuple[str, ...], int] = {}
    used: set[str] = set()
    for entry in after:
        old = titles.get(entry["title"]) or alike.get(_identity(entry["parts"]))
        if entry["fingerprint"] not in kept and old is not None:
            used.add(old["fingerprint"])
            fields = tuple(_SAID.get(name, name) for name in _different(old["parts"], entry["parts"]))
            if "block" not in entry["parts"]:
                found[fields] = found.get(fields, 0) + 1
            else:  # told once, however many a search asks for
                found[("block", *fields)] = 0
    told = []
    for fields, count in found.items():
        whose = f"{count} cells of the run before are" if count else "what the search of the run before measured is"
        names = ", ".join(fields if count else fields[1:])
        told.append(f"{whose} of no use to this one; they differ in: {names}")
    over = [old for old in gone if old["fingerprint"] not in used and not (searches and "block" in old["parts"])]
    if over:
        told.append(
            f"{len(over)} cells of the run before are not in this study; they stay in cells/, and are not reported"
        )
    return told


def _identity(parts: dict[str, Any]) -> str:
    task = parts.get("task")
    own = [parts.get(name) for name in _IDENTITY] + [task.get("name") if isinstance(task, dict) else task]
    return json.dumps(own, sort_keys=True)


def _different(before: Any, after: Any, name: str = "") -> list[str]:
    """Return the dotted names of the fields that differ."""
    if not isinstance(before, dict) or not isinstance(after, dict):
        return [] if before == after else [name]
    return [
        field
        for key in dict.fromkeys([*before, *after])
        for field in _different(before.get(key), after.get(key), f"{name}.{key}".strip("."))
    ]
