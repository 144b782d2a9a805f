"""The side of an lm-eval LM that is about text: special tokens, the chat template, and text to token ids."""

from __future__ import annotations

from typing import Any

from lm_eval.models.utils import has_bos_prefix

from dllm_sparsity.errors import UserError
from dllm_sparsity.lm.shared import SharedLM


class TextLM(SharedLM):
    """What lm-eval asks of a model's tokenizer."""

    tokenizer: Any
    _template: str | None = None

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-text token; of the separator where a masked LM has no other."""
        end = self.tokenizer.eos_token_id
        return end if end is not None else self.tokenizer.sep_token_id

    @property
    def prefix_token_id(self) -> int:
        """Id that stands before a text without context."""
        known = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.cls_token_id)
        return next((token for token in known if token is not None), self.pad_id)

    @property
    def pad_id(self) -> int:
        """Id to pad with; it is masked wherever it could be seen."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in known if token is not None)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for lm-eval's caches."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Choose the template that `apply_chat_template` uses, and return its text; see lm-eval.

        Args:
            chat_template: True for the tokenizer's default, or the name of one of several.
        """
        self._template = super().chat_template(chat_template)
        return self._template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation with the tokenizer's chat template.

        Args:
            chat_history: Messages with `role` and `content`.
            add_generation_prompt: Whether the assistant speaks next; otherwise the last message is continued.
        """
        if not self.tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template", "turn chat_template off for this model")
        return self.tokenizer.apply_chat_template(
            chat_history,
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Turn text into token ids, with the tokenizer's own special tokens unless told otherwise.

        Args:
            string: The text; one that begins with the BOS token gets no second one.
            add_special_tokens: As in transformers; None leaves it to the tokenizer.
            kwargs: Ignored; other lm-eval models take more.
        """
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        extra = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **extra)
