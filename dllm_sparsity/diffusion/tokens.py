"""What the masked-diffusion backend has to know about a tokenizer."""

from __future__ import annotations

from typing import Any

from dllm_sparsity.errors import UserError
from dllm_sparsity.lm.items import Generation


def find_mask_id(model: Any, tokenizer: Any, given: str | int | None) -> int:
    """Return the id of the mask token.

    Args:
        model: The model; its config is asked last.
        tokenizer: Its tokenizer.
        given: What the user said: a token or an id.

    Raises:
        UserError: There is none, or what was given is not in the vocabulary.
    """
    size = model.get_input_embeddings().weight.shape[0]
    if given is not None:
        text = str(given)
        found = int(text) if text.isdecimal() else tokenizer.convert_tokens_to_ids(text)
        if found is None or not 0 <= found < size or (found == tokenizer.unk_token_id and text != tokenizer.unk_token):
            raise UserError(
                f"mask token {given!r} is not in the vocabulary", "give a token of the tokenizer, or its id"
            )
        return found
    for found in (tokenizer.mask_token_id, getattr(model.config, "mask_token_id", None)):
        if found is not None:
            return int(found)
    raise UserError("neither tokenizer nor config names a mask token", "give it with --mask-token TOKEN")


def closing_tokens(tokenizer: Any) -> int:
    """Return how many tokens a tokenizer puts behind a text; those of masked LMs close it with a separator.

    Args:
        tokenizer: A tokenizer of transformers.
    """
    bare, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    ends = (n for n in range(len(whole) - len(bare) + 1) if whole[: len(whole) - n][-len(bare) :] == bare)
    return next(ends, 0)


def up_to(tokenizer: Any, tokens: list[int], stop: str) -> list[int]:
    """Return the shortest prefix of the tokens whose text holds the stop string.

    Args:
        tokenizer: A tokenizer of transformers.
        tokens: Token ids.
        stop: The stop string.
    """
    for end in range(1, len(tokens) + 1):
        if stop in tokenizer.decode(tokens[:end], skip_special_tokens=True):
            return tokens[:end]
    return tokens


def cut_answer(tokenizer: Any, tokens: list[int], nfe: int, end: int | None, until: list[str]) -> Generation:
    """Return a canvas up to its end token or the first stop string.

    Args:
        tokenizer: A tokenizer of transformers.
        tokens: Token ids of the whole canvas.
        nfe: Forward passes that it took.
        end: Id of the end token; counted among the new tokens, and not part of the answer.
        until: Stop strings.
    """
    if end in tokens:
        tokens = tokens[: tokens.index(end) + 1]
    new_tokens = len(tokens)
    if end is not None and tokens[-1:] == [end]:
        tokens = tokens[:-1]
    for stop in until:
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if stop in text:
            tokens = up_to(tokenizer, tokens, stop)
            new_tokens = len(tokens)
    return Generation(tokens, new_tokens, nfe)
