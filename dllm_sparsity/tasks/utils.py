"""What the task files of this folder refer to: reading the items beside them, and scoring answers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def build_items(items: str, **_: Any) -> dict[str, Any]:
    """Read the items of one task from the file beside this one.

    Args:
        items: Name of the jsonl file, without its ending.

    Returns:
        The only split, `test`, in the file's order, so that a limit takes a fair sample.
    """
    from datasets import Dataset

    lines = (Path(__file__).parent / f"{items}.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def choose_per_token(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Compare the choices by log-likelihood per token (`acc_token`) and by its sum (`acc`).

    Args:
        doc: An item; its `tokens` are the choices' lengths under the pair's tokenizer.
        results: Log-likelihood of each choice, and whether it is the greedy one.
    """
    sums = [loglikelihood for loglikelihood, _ in results]
    means = [total / tokens for total, tokens in zip(sums, doc["tokens"], strict=True)]
    return {
        "acc_token": float(means.index(max(means)) == doc["gold"]),
        "acc": float(sums.index(max(sums)) == doc["gold"]),
    }


def score_continuation(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score generated text by its log-likelihood per token under the dense autoregressive twin."""
    from dllm_sparsity.pair.reference import reference_loglikelihood

    return {"ar_loglikelihood": reference_loglikelihood(doc["prompt"], results[0])}
