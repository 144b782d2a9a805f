"""Why cells of an earlier run are not used: the fields in which two plans differ. Imports no torch."""

from __future__ import annotations

from typing import Any


def changes(before: Any, after: list[dict[str, Any]]) -> list[str]:
    """Name the fields in which planned cells differ from those that an earlier run planned under the same title.

    Args:
        before: What plan.json held; None where there was none.
        after: The plan now; one entry a cell, with its fingerprint, title and parts.
    """
    olds = [entry for entry in before if isinstance(entry, dict)] if isinstance(before, list) else []
    kept = {old.get("fingerprint") for old in olds} & {entry["fingerprint"] for entry in after}
    gone = {old.get("title"): old.get("parts") for old in olds if old.get("fingerprint") not in kept}
    found: dict[tuple[str, ...], int] = {}
    for entry in after:
        if entry["fingerprint"] not in kept and entry["title"] in gone:
            fields = tuple(_different(gone[entry["title"]], entry["parts"]))
            found[fields] = found.get(fields, 0) + 1
    return [
        f"{count} cells of the run before are of no use to this one; they differ in: {', '.join(fields)}"
        for fields, count in found.items()
    ]


def _different(before: Any, after: Any, name: str = "") -> list[str]:
    """Return the dotted names of the fields that differ."""
    if not isinstance(before, dict) or not isinstance(after, dict):
        return [] if before == after else [name]
    return [
        field
        for key in dict.fromkeys([*before, *after])
        for field in _different(before.get(key), after.get(key), f"{name}.{key}".strip("."))
    ]
