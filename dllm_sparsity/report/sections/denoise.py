"""Sparsity over the denoising of diffusion models: by step, layer and token state, and by noise in likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from markupsafe import Markup

from dllm_sparsity.report.data import ReportData, StepSource
from dllm_sparsity.report.panel import Chart, Panel
from dllm_sparsity.report.section import Section
from dllm_sparsity.report.stepwise import map_chart, options_of, state_chart


class Denoise(Section):
    """Heat map by layer, and lines by token state."""

    title: ClassVar[str] = "Diffusion: sparsity by denoising step"
    order: ClassVar[int] = 40
    needs: ClassVar[tuple[str, ...]] = ("steps",)

    def render(self, data: ReportData) -> Markup:
        """Return one panel over all diffusion records.

        Args:
            data: What the page is made from.
        """
        options = options_of(data, lambda source: source.paradigm != "autoregressive", _charts)
        return Panel("denoise", "Cell and site", options).html() if options else Markup("")


def _charts(source: StepSource, site: str) -> Sequence[Chart]:
    if "denoise" in source.phases:
        steps = source.at(site, ("denoise",))
        what = "Step 0 sees the whole canvas masked; later steps see more committed tokens."
        return [map_chart(steps, "step", "step", what), state_chart(steps, "step", "step", what)] if len(steps) else []
    steps = source.at(site, ("likelihood",))
    what = "Likelihood: noise bin b holds texts of which b/20 to (b+1)/20 were masked."
    if not len(steps):
        return []
    return [map_chart(steps, "noise_bin", "noise bin", what), state_chart(steps, "noise_bin", "noise bin", what)]
