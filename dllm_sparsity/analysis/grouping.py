"""Group the sealed cells of a run into curves: one dense cell and the strengths of one rule at one site."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from dllm_sparsity.analysis.blocks import Answer, answers_of, is_block, is_of
from dllm_sparsity.analysis.loading import Cell
from dllm_sparsity.study.records import Quality


@dataclass(frozen=True)
class Group:
    """The cells of one curve.

    Args:
        dense: The cell without a rule.
        cells: The cells with the rule, by strength.
        rule: The rule; with its other parameters where the run has several sets of them.
        site: The site.
    """

    dense: Cell
    cells: tuple[Cell, ...]
    rule: str
    site: str

    @property
    def qualities(self) -> list[Quality]:
        """Return the quality measures that every cell of the curve has, the headline first."""
        shared = [{quality["name"] for quality in cell.record["qualities"]} for cell in self.cells]
        return [quality for quality in self.dense.record["qualities"] if all(quality["name"] in own for own in shared)]

    @property
    def answers(self) -> list[Answer]:
        """Return what was searched on the curve, as search.json has it."""
        return answers_of(self.dense, self.cells[0].record) if self.cells else []

    @property
    def elsewhere(self) -> list[Cell]:
        """Return the strengths that a search measured on other items than those of the cells."""
        return [cell for cell in self.dense.elsewhere if self.cells and is_of(cell.record, self.cells[0].record)]

    @property
    def is_searched(self) -> bool:
        """Whether a search measured it and no strength was given: then only the search's own answer can be read."""
        return bool(self.cells) and all(is_block(cell) for cell in self.cells)

    @property
    def headline(self) -> str:
        """Return the name of the quality that is told first: that of the search, else the task's first."""
        asked = [own["quality"] for own in self.answers] if self.is_searched else []
        return next(iter([*asked, *(quality["name"] for quality in self.qualities)]), "")


def groups_of(cells: Sequence[Cell]) -> tuple[list[Group], list[str]]:
    """Return the curves of a run, and what could not be made one, in words.

    Args:
        cells: Sealed cells.
    """
    dense: dict[tuple[str, str, str], Cell] = {}
    sparse: dict[tuple[str, ...], list[Cell]] = {}
    notes: list[str] = []
    for cell in cells:
        record = cell.record
        if record.get("replicate"):  # a further run of a dense cell, for the noise floor only
            continue
        key = (record["paradigm"], record["model"], record["task"])
        if record["dense"]:
            if key in dense:
                notes.append(f"{record['task']} on {record['model']} has several dense cells; the first one is used")
            dense.setdefault(key, cell)
        else:
            layers = json.dumps(record["layers"])
            sparse.setdefault((*key, record["rule"] or "", record["site"] or "", layers), []).append(cell)
    groups = []
    variants: dict[str, set[str]] = {}
    for key, members in sparse.items():
        variants.setdefault(key[3], set()).update(fixed for fixed, _ in _split(members))
    for (paradigm, model, task, rule, site, layers), members in sparse.items():
        if (reference := dense.get((paradigm, model, task))) is None:
            notes.append(f"{task} on {model} has no finished dense cell; its cells cannot be compared yet")
            continue
        told: dict[str, int] = {}
        for (fixed, _), own in _split(members).items():
            label = (
                rule
                + (f" ({fixed})" if fixed and len(variants[rule]) > 1 else "")
                + (f" on layers {layers}" if layers != "null" else "")
            )
            told[label] = told.get(label, 0) + 1
            label += f", no. {told[label]}" if told[label] > 1 else ""  # apart in a table that no label can hold
            groups.append(Group(reference, tuple(own), label, site))
    return groups, list(dict.fromkeys(notes))


def _split(cells: list[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """Split the cells of one rule by its parameters other than the main one, whose value is the strength.

    Returns:
        Parameters in words, without those that are tables; all parameters; and their cells.
    """
    names = {name for cell in cells for name in cell.record["rule_parameters"]}
    main = {
        name
        for name in names
        if all(cell.record["rule_parameters"].get(name) == cell.record["strength"] for cell in cells)
    }
    split: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        parameters = cell.record["rule_parameters"]
        fixed = {name: parameters[name] for name in sorted(parameters) if name not in main}
        words = ", ".join(f"{name}={value}" for name, value in fixed.items() if not isinstance(value, list))
        split.setdefault((words, json.dumps(fixed)), []).append(cell)
    return split
