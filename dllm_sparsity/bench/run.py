"""Runs the bench: from what was asked for to times as plain data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from dllm_sparsity.bench import environment, kernels
from dllm_sparsity.bench.against import Paper
from dllm_sparsity.bench.model import build
from dllm_sparsity.bench.settings import Plan, Settings, plan
from dllm_sparsity.bench.variants import race_models

_WARMUP = 3  # rounds
_SEED = 0


def bench(asked: Settings, say: Callable[[str], object] = lambda line: None) -> dict[str, Any]:
    """Time everything and return it as plain data, fit for JSON.

    Args:
        asked: What to time.
        say: Told what runs now.

    Raises:
        UserError: Something that was asked for does not exist here.
    """
    chosen = plan(asked)
    paper = Paper(asked.against, chosen.rule_name, chosen.rule.strength) if asked.against is not None else None
    with torch.cuda.device(chosen.device) if chosen.device.type == "cuda" else nullcontext():
        models = _models(chosen, paper, say)
        passes, why_not = _kernels(chosen, paper, say)
    notes = [*([chosen.shape.differs] if chosen.shape.differs else []), *([paper.note] if paper else []), *why_not]
    return {
        "environment": environment.describe(chosen.device),
        "settings": {
            **chosen.describe(),
            "against": paper and str(paper.file),
            "against_commit": paper and paper.commit,
        },
        "models": models,
        "kernels": passes,
        "notes": notes,
    }


def _models(chosen: Plan, paper: Paper | None, say: Callable[[str], object]) -> list[dict[str, Any]]:
    say(f"building {chosen.layers} layers of {chosen.name}")
    model, found = build(chosen.shape, chosen.layers, chosen.dtype, chosen.device, chosen.head), []
    for batch, tokens in chosen.batches:
        say(f"timing forward passes over {batch}x{tokens} tokens")
        generator = torch.Generator(chosen.device).manual_seed(_SEED)
        ids = torch.randint(chosen.shape.vocabulary, (batch, tokens), generator=generator, device=chosen.device)
        with torch.inference_mode():
            raced = race_models(
                model,
                ids,
                chosen.rule,
                chosen.sites,
                paper,
                graph=chosen.is_graph(batch, tokens),
                repeats=chosen.repeats,
                warmup=_WARMUP,
            )
        found.append(raced)
    return found


def _kernels(
    chosen: Plan, paper: Paper | None, say: Callable[[str], object]
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the kernel part, or the reason why there is none."""
    if chosen.device.type != "cuda":
        return None, ["kernels are timed on a GPU only, and this is a CPU"]
    if chosen.rule.fused(chosen.shape.ffn) is None:
        return None, [f"no kernel has the rule {chosen.rule_name}, so none is timed"]
    speed, found = kernels.bandwidth(chosen.device, chosen.repeats), []
    for width in sorted({chosen.shape.hidden, chosen.shape.ffn}, reverse=True):
        for count in chosen.rows:
            say(f"timing kernels on {count} rows of {width}")
            with torch.inference_mode():
                rows = kernels.make_rows(count, width, chosen.dtype, chosen.device)
                found.append(kernels.race_kernels(rows, chosen.rule, paper, speed, chosen.repeats))
    return {"bandwidth_bytes_per_second": speed, "passes": found}, []
