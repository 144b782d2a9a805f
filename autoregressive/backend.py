"""autoregressive: any causal language model of transformers as an lm-eval LM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

from autoregressive.decode import Sampling, decode
from autoregressive.likelihood import score
from autoregressive.shared import PAYS, Read, by_context, continues, cost, forwards
from dllm_sparsity.errors import UserError
from dllm_sparsity.lm.base import Generation, PromptBatch, Score, SparsityLM, Target
from dllm_sparsity.sparsity.transfer import Download

_SAMPLING = {"do_sample", "temperature", "top_k", "top_p"}


class AutoregressiveBackend(SparsityLM):
    """Likelihood and generation of a causal model, with its sparsity clock driven.

    Args:
        model: A causal model of transformers.
        tokenizer: Its tokenizer.
        batch_size: Sequences in one forward pass.
        max_length: Longest sequence; from the model's config when None.
        seed: Seed of sampling.
        share_context: Whether the options of an item share the reading of their context, where a tracker that takes
            each row for itself counts on this backend's clock; it counts as if each had read it.

    Example:
        >>> lm = AutoregressiveBackend(model, tokenizer)  # doctest: +SKIP
        >>> with sparsify(lm.model, TopP(0.9), clock=lm.clock) as tracker:  # doctest: +SKIP
        ...     lm_eval.simple_evaluate(lm, tasks=["arc_easy"])
    """

    bidirectional, stacks = False, True

    def __init__(self, model: Any, tokenizer: Any, *, share_context: bool = True, **settings: Any) -> None:
        super().__init__(model, tokenizer, **settings)
        self.share_context = share_context

    @property
    def estimator(self) -> str | None:
        """How likelihoods are estimated; None, for they are exact."""
        return None

    def _score(self, targets: Sequence[Target]) -> list[Score]:
        share = self.share_context and self.clock.may_share
        return score(self.call, self.clock, targets, self.max_length, self.pad_id, share, share and self._continues)

    def forwards(self, targets: Sequence[Target]) -> list[tuple[list[int], list[int], int]]:
        """Return what scoring a batch takes where rows may be shared.

        Of each forward pass: the tokens of its rows, how many tokens each can see, and the positions that get logits.

        Args:
            targets: The batch.
        """
        return forwards([Read.of(target, self.max_length) for target in targets], self.share_context, self._continues)

    @cached_property
    def _continues(self) -> bool:
        return continues(self.model)

    def _batches(self, order: list[int], targets: list[Target]) -> Iterable[list[int]]:
        """Keep targets of one context together where that makes less work; the requests decide it, not the rule."""
        plain = list(super()._batches(order, targets))
        if not self.share_context:
            return plain
        reads = {number: Read.of(targets[number], self.max_length) for number in order}
        together = list(self._together(order, reads))

        def work(plan: list[list[int]]) -> int:
            return sum(cost([reads[number] for number in batch], self._continues)[0] for batch in plan)

        return together if work(together) <= PAYS * work(plain) else plain

    def _together(self, order: list[int], reads: dict[int, Read]) -> Iterator[list[int]]:
        batch: list[int] = []
        for group in by_context([reads[number] for number in order]):
            for start in range(0, len(group), self.batch_size):
                own = [order[place] for place in group[start : start + self.batch_size]]
                if len(batch) + len(own) > self.batch_size:
                    yield batch
                    batch = []
                batch += own
        if batch:
            yield batch

    def _generate(self, batch: PromptBatch) -> list[Generation]:
        sampling = _sampling(batch.options)
        generators = [self._generator(draw) for draw in batch.draws]
        answers: list[list[int]] = [[] for _ in batch.prompts]
        stopped = [False] * len(batch.prompts)
        counts = [0] * len(batch.prompts)
        with self.clock.batch(batch.items, batch.length):
            for tokens in decode(
                self.call, self.clock, batch.prompts, batch.length, self.pad_id, sampling, generators, lambda: stopped
            ):
                for row, token in enumerate(Download(tokens).wait().tolist()):  # stop strings are found in text
                    if stopped[row]:
                        continue
                    counts[row] += 1
                    if token in self._stop_ids:
                        stopped[row] = True
                    else:
                        answers[row].append(token)
                        stopped[row] = self._has_stop(answers[row], batch.until)
                if all(stopped):
                    break
        return [Generation(answer, count, count) for answer, count in zip(answers, counts, strict=True)]

    @property
    def _stop_ids(self) -> set[int]:
        """End-of-text ids of the tokenizer and of the model's generation config, where `generate` stops as well."""
        configured = self.model.generation_config.eos_token_id
        more = configured if isinstance(configured, list) else [configured]
        return {token for token in (self.eot_token_id, *more) if token is not None}

    def _has_stop(self, answer: list[int], until: list[str]) -> bool:
        if not until:
            return False
        tail = self.tokenizer.decode(answer[-(max(map(len, until)) + 8) :], skip_special_tokens=True)
        return any(stop in tail for stop in until)


def _sampling(options: dict[str, Any]) -> Sampling:
    unknown = sorted(set(options) - _SAMPLING)
    if unknown:
        raise UserError(
            f"generation arguments not supported: {', '.join(unknown)}",
            f"the task may use: {', '.join(sorted(_SAMPLING))}",
        )
    if not options.get("do_sample"):
        return Sampling()
    return Sampling(options.get("temperature") or 1.0, options.get("top_k") or 0, options.get("top_p") or 1.0)
