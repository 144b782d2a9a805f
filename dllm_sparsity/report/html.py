"""The page: one file, one policy that forbids the network, one packed copy of plotly.js, the sections in order."""

from __future__ import annotations

import base64
import gzip
from functools import cache
from importlib.resources import files

from markupsafe import Markup

from dllm_sparsity.registry import get, names
from dllm_sparsity.report.data import ReportData
from dllm_sparsity.report.panel import template
from dllm_sparsity.report.section import Section


def page(data: ReportData) -> str:
    """Return the whole page.

    Args:
        data: What it is made from.
    """
    sections, skipped = [], []
    for name, section in _sections():
        why = section.missing(data)
        body = Markup("") if why else section.render(data)
        if body:
            sections.append({"name": name, "title": section.title, "body": body})
        else:
            skipped.append((section.title, why or "Nothing that was recorded belongs to it."))
    return template(
        "page.html",
        title=data.title,
        study=data.summary is not None,
        paradigms=sorted({source.paradigm for source in data.sources if source.paradigm}),
        sections=sections,
        skipped=skipped,
        style=_asset("report.css"),
        script=_asset("report.js"),
        plotly=_plotly(),
    )


def _sections() -> list[tuple[str, Section]]:
    made = [(name, get("sections", name)()) for name in names("sections")]
    return sorted(made, key=lambda entry: entry[1].order)


def _asset(name: str) -> Markup:
    return Markup((files("dllm_sparsity.report") / "assets" / name).read_text(encoding="utf-8"))


@cache
def _plotly() -> str:
    """Return plotly.js as base64 of gzip: 2 MB in the place of 5."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()
