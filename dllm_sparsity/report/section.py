"""The contract of a report section: its title, its place, what it needs, and how it becomes HTML."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from markupsafe import Markup

from dllm_sparsity.report.data import ReportData


class Section(ABC):
    """One section of the page; one section is one file in report/sections/.

    `title` is its heading, `order` its place on the page. `needs` names what the data must hold: `summary` for a study,
    `steps` for step records, `steps.<column>` for a column that at least one step record must have.
    """

    title: ClassVar[str]
    order: ClassVar[int]
    needs: ClassVar[tuple[str, ...]] = ()

    def missing(self, data: ReportData) -> str | None:
        """Return a sentence that says why this section cannot be shown, or None.

        Args:
            data: What the page is made from.
        """
        for need in self.needs:
            kind, _, column = need.partition(".")
            if kind == "summary" and data.summary is None:
                return "It needs a study's cells; this page was made from one recorded loop."
            if kind == "steps" and not data.sources:
                return "It needs step records, and none were given."
            if column and not any(column in source.columns for source in data.sources):
                return f"It needs the column {column}, which no step record holds: the metric was off."
        return None

    @abstractmethod
    def render(self, data: ReportData) -> Markup:
        """Return the section's HTML, or an empty string when nothing in the data belongs to it.

        Args:
            data: What the page is made from.
        """
