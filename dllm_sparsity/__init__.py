"""Activation sparsity of autoregressive and masked-diffusion language models, measured on equal terms.

The public names are imported when they are first used, so that importing this package is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dllm_sparsity.comparison import Comparison as Comparison
    from dllm_sparsity.comparison import compare as compare
    from dllm_sparsity.diffusion.attention_mask import block_causal_mask as block_causal_mask
    from dllm_sparsity.diffusion.observe import observe as observe
    from dllm_sparsity.diffusion.pipeline_backend import pipeline_backend as pipeline_backend
    from dllm_sparsity.diffusion.pipelines import pipeline_clock as pipeline_clock
    from dllm_sparsity.errors import UserError as UserError
    from dllm_sparsity.report import save_report as save_report
    from dllm_sparsity.sparsity.clock import Clock as Clock
    from dllm_sparsity.sparsity.sparsifier import sparsify as sparsify

_NAMES = {
    "Clock": "dllm_sparsity.sparsity.clock",
    "Compare": "dllm_sparsity.sparsity.clock",
    "Comparison": "dllm_sparsity.comparison",
    "CutoffRule": "dllm_sparsity.sparsity.rule",
    "DiffusionBackend": "dllm_sparsity.diffusion.backend",
    "Layerwise": "dllm_sparsity.sparsity.rules.layerwise",
    "MaxP": "dllm_sparsity.sparsity.rules.max_p",
    "Phase": "dllm_sparsity.sparsity.clock",
    "Random": "dllm_sparsity.sparsity.rules.random",
    "Rule": "dllm_sparsity.sparsity.rule",
    "Slot": "dllm_sparsity.sparsity.clock",
    "Threshold": "dllm_sparsity.sparsity.rules.threshold",
    "TokenState": "dllm_sparsity.sparsity.clock",
    "TopK": "dllm_sparsity.sparsity.rules.top_k",
    "TopP": "dllm_sparsity.sparsity.rules.top_p",
    "UserError": "dllm_sparsity.errors",
    "block_causal_mask": "dllm_sparsity.diffusion.attention_mask",
    "compare": "dllm_sparsity.comparison",
    "observe": "dllm_sparsity.diffusion.observe",
    "pipeline_backend": "dllm_sparsity.diffusion.pipeline_backend",
    "pipeline_clock": "dllm_sparsity.diffusion.pipelines",
    "save_report": "dllm_sparsity.report",
    "sparsify": "dllm_sparsity.sparsity.sparsifier",
}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'dllm_sparsity' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
