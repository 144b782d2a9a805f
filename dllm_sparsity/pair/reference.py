"""Scores generated text under the dense autoregressive twin, loaded once in a process."""

from functools import cache
from typing import Any

from dllm_sparsity.pair import folder


@cache
def _twin() -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = folder("autoregressive")
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(where, local_files_only=True)


def reference_loglikelihood(prompt: str, continuation: str) -> float:
    """Return the mean log-likelihood per token, in nats, of a continuation under the dense autoregressive twin.

    An empty continuation is scored as the end token. Repetitive text scores high, so read it beside the text itself.

    Args:
        prompt: Text the continuation follows.
        continuation: Generated text; what does not fit the twin's positions is left out.
    """
    import torch

    model, tokenizer = _twin()
    context = tokenizer.encode(prompt) or [tokenizer.bos_token_id]
    target = tokenizer.encode(continuation) or [tokenizer.eos_token_id]
    ids = torch.tensor([context + target])[:, : model.config.max_position_embeddings]
    with torch.inference_mode():
        scores = model(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
    return scores.gather(1, ids[0, len(context) :, None]).mean().item()
