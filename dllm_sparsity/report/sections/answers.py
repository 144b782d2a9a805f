"""Some answers as the models wrote them, dense beside sparse, as data and never as markup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from markupsafe import Markup

from dllm_sparsity.analysis.loading import Cell
from dllm_sparsity.analysis.pairing import pair
from dllm_sparsity.report import words
from dllm_sparsity.report.data import ReportData, StepSource
from dllm_sparsity.report.panel import Table, template
from dllm_sparsity.report.section import Section

SHOWN_ITEMS = 6
LONGEST_ANSWER = 400


class Answers(Section):
    """The first items of each generation task, at the cell nearest the critical sparsity."""

    title: ClassVar[str] = "Answers, dense beside sparse"
    order: ClassVar[int] = 70
    needs: ClassVar[tuple[str, ...]] = ("summary",)

    def render(self, data: ReportData) -> Markup:
        """Return a table for each model and generation task.

        Args:
            data: What the page is made from.
        """
        cells = [source for source in data.sources if source.cell and _generates(source.cell)]
        blocks = []
        for group in dict.fromkeys(source.group for source in cells):
            own = [source for source in cells if source.group == group]
            dense = next((source for source in own if source.cell and _is_dense(source.cell)), None)
            sparse = min((source for source in own if source.site), key=lambda source: source.distance, default=None)
            if dense and sparse:
                blocks.append((group, sparse.label, _table(dense, sparse)))
        return template("answers.html", blocks=blocks, items=SHOWN_ITEMS) if blocks else Markup("")


def _is_dense(cell: Cell) -> bool:
    return cell.record["dense"] and not cell.record.get("replicate")


def _generates(cell: Cell) -> bool:
    return cell.record["output_type"] == "generate_until"


def _table(dense: StepSource, sparse: StepSource) -> Table:
    paired = pair([cell for cell in (dense.cell, sparse.cell) if cell is not None])
    first, second = (table.slice(0, SHOWN_ITEMS).to_pylist() for table in paired.tables)
    rows = [
        [str(one["doc_id"]), _cut(one["answer"]), _mark(one["correct"]), _cut(two["answer"]), _mark(two["correct"])]
        for one, two in zip(first, second, strict=True)
    ]
    return Table(["item", "dense", "score", "sparse", "score"], rows, 5)


def _cut(answer: str | None) -> str:
    text = answer or words.NOTHING
    return text if len(text) <= LONGEST_ANSWER else text[:LONGEST_ANSWER] + "\N{HORIZONTAL ELLIPSIS}"


def _mark(correct: Sequence[float] | float | None) -> str:
    return words.NOTHING if correct is None else f"{correct:g}"
