"""The lm-eval side that both backends share: tokens, batches, and what is logged about each item."""

from __future__ import annotations

import random
import zlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dllm_sparsity.errors import UserError
from dllm_sparsity.lm.call import ModelCall
from dllm_sparsity.lm.distributed import each_once
from dllm_sparsity.lm.items import MAX_NEW_TOKENS, Generation, ItemLog, PromptBatch, Score, Target
from dllm_sparsity.lm.journal import Journal, Work, answers
from dllm_sparsity.lm.kept_tokens import KeptTokens
from dllm_sparsity.lm.loading import ModelSource, check_paradigm, load, longest_sequence
from dllm_sparsity.lm.text import TextLM
from dllm_sparsity.sparsity.clock import Clock


class SparsityLM(TextLM):
    """A language model as lm-eval asks for it, that keeps a clock and a log.

    Args:
        model: A transformers model.
        tokenizer: Its tokenizer.
        batch_size: Sequences in one forward pass.
        max_length: Longest sequence; from the model's config when None.
        seed: Seed of everything random.
    """

    bidirectional: ClassVar[bool]
    """Whether its models see tokens to the right."""
    stacks: ClassVar[bool] = False
    """Whether it takes several copies of a batch in one forward pass, each with a rule of its own."""

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_size: int = 16, max_length: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch size {batch_size} is not positive", "give a batch size of 1 or more")
        self.model, self.tokenizer, self.batch_size, self.seed = model, tokenizer, batch_size, seed
        self.call, self.clock = ModelCall(model), Clock()
        self.log: dict[Hashable, ItemLog] = {}
        self.check_greedy = True
        """Whether loglikelihood requests need `is_greedy`; False saves a diffusion model one decoding each."""
        self.order_seed: int | None = None
        """Another order of requests, so that others share a batch; None sorts them by length."""
        self.journal: Journal | None = None
        """What remembers answered batches, or has them answered elsewhere; None answers each here."""
        self.progress: Callable[[int, int], None] = lambda done, total: None
        """Called with (requests done, requests in all) after each batch."""
        self.copies = 1
        """How many copies of the planned batch stand one behind the other in what is asked now."""
        self._kept = KeptTokens()
        self.max_length = max_length or longest_sequence(model, tokenizer)
        self.max_gen_toks = MAX_NEW_TOKENS

    @classmethod
    def from_source(cls, source: ModelSource, **settings: Any) -> Self:
        """Load a model and make sure that it is of this backend's paradigm.

        Args:
            source: Where the model comes from.
            settings: Arguments of the backend.

        Raises:
            UserError: It cannot be loaded, or it is of the other paradigm.
        """
        model, tokenizer = load(source)
        check_paradigm(model, source.model, cls.bidirectional)
        return cls(model, tokenizer, **settings)

    @each_once
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations; see lm-eval.

        Args:
            requests: `(context, continuation)` each.
            disable_tqdm: Ignored; `progress` reports.
        """
        kept = self._kept_of(requests)
        targets = [Target(_item(request), *kept.pair(*request.args, self._encode)) for request in requests]
        return [(score.loglikelihood, score.is_greedy) for score in self._score_all(targets)]

    def _kept_of(self, requests: Sequence[Instance]) -> KeptTokens:
        """Return the token ids that earlier cells of these requests' tasks left."""
        self._kept.open(self.tokenizer, (request.task_name for request in requests))
        return self._kept

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of both as lm-eval splits them; a text without context follows the prefix token."""
        if not continuation:
            return self.tok_encode(context), []
        if context:
            before, after = self._encode_pair(context, continuation)
            return before or [self.prefix_token_id], after
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        if tokens[:1] == [self.prefix_token_id]:
            return tokens[:1], tokens[1:]
        return [self.prefix_token_id], tokens

    def _loglikelihood_tokens(self, requests: list[tuple], **kwargs: Any) -> list[tuple[float, bool]]:
        """Score pairs that are tokens already; lm-eval asks models for it."""
        targets = [Target(number, list(context), list(tokens)) for number, (_, context, tokens) in enumerate(requests)]
        return [(score.loglikelihood, score.is_greedy) for score in self._score_all(targets)]

    @each_once
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts in windows of the model's length; see lm-eval.

        Args:
            requests: `(text,)` each.
            disable_tqdm: Ignored; `progress` reports.
        """
        targets, owners, kept = [], [], self._kept_of(requests)
        for number, request in enumerate(requests):
            tokens = kept.text(request.args[0], self.tok_encode)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self._window, context_len=1)
            for context, target in map(make_disjoint_window, windows):
                targets.append(Target(_item(request), list(context), list(target)))
                owners.append(number)
            if not tokens:  # an empty text is an item too
                targets.append(Target(_item(request), [self.prefix_token_id], []))
                owners.append(number)
        with self._without_greedy():
            scores = self._score_all(targets, merge=True)
        totals = [0.0] * len(requests)
        for number, score in zip(owners, scores, strict=True):
            totals[number] += score.loglikelihood
        return totals

    @property
    def _window(self) -> int:
        return self.max_length

    @contextmanager
    def _without_greedy(self) -> Iterator[None]:
        before, self.check_greedy = self.check_greedy, False
        try:
            yield
        finally:
            self.check_greedy = before

    def _score_all(self, targets: list[Target], merge: bool = False) -> list[Score]:
        """Score in batches of similar length, longest first; the batches depend on the requests alone."""
        order = sorted(
            range(len(targets)), key=lambda n: (-len(targets[n].context) - len(targets[n].tokens), targets[n].tokens)
        )
        scores: dict[int, Score] = {}
        for number, target in enumerate(targets):
            if len(target.tokens) > self.max_length:
                size = f"{len(target.tokens)} tokens, the model takes {self.max_length}"
                raise UserError(f"{target.item}: a target longer than the model: {size}", "leave it out of the task")
            if not target.tokens:
                scores[number] = Score(0.0, True, 0.0, 0)
        order = self._reordered([number for number in order if number not in scores])
        plan = list(self._batches(order, targets))
        works = [Work([targets[number] for number in numbers], self.check_greedy) for numbers in plan]
        for place, found in answers(self.journal, works, self.compute):
            numbers = plan[place]
            scores.update(zip(numbers, found.results, strict=True))
            for number in numbers:
                self._entry(targets[number].item).seconds += found.seconds / len(numbers)
            self.progress(len(scores), len(targets))
        for number, target in enumerate(targets):
            self._entry(target.item).add(target, scores[number], merge)
        return [scores[number] for number in range(len(targets))]

    def _reordered(self, order: list[int]) -> list[int]:
        if self.order_seed is not None:
            random.Random(f"{self.seed} {self.order_seed}").shuffle(order)
        return order

    def _batches(self, order: list[int], targets: list[Target]) -> Iterable[list[int]]:
        return (order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size))

    @each_once
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate text up to stop strings; see lm-eval.

        Args:
            requests: `(context, generation arguments)` each.
            disable_tqdm: Ignored; `progress` reports.

        Raises:
            UserError: The canvas is longer than the model, or an argument is not supported.
        """
        kept = self._kept_of(requests)
        prompts = [kept.text(request.args[0], self.tok_encode) or [self.prefix_token_id] for request in requests]
        seen: Counter[Hashable] = Counter()
        draws = []
        for request in requests:  # a task with repeats asks for the same item several times
            draws.append((_item(request), seen[_item(request)]))
            seen[_item(request)] += 1
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        plan, works = [], []
        for numbers in groups.values():
            options = dict(normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks))
            until = [stop for stop in options.pop("until", None) or [] if stop]
            room = self.max_length - (length := int(options.pop("max_gen_toks")))
            if room < 1:
                raise UserError(
                    f"{length} new tokens do not fit a model of {self.max_length}", "lower max_gen_toks in the task"
                )
            numbers.sort(key=lambda n: (-len(prompts[n]), requests[n].args[0]))
            self._reordered(numbers)
            for start in range(0, len(numbers), self.batch_size):
                chunk = numbers[start : start + self.batch_size]
                items = [_item(requests[n]) for n in chunk]
                own = [draws[n] for n in chunk]
                batch = PromptBatch([prompts[n][-room:] for n in chunk], items, own, length, until, options)
                plan.append((chunk, batch))
                works.append(Work(batch))
        texts: dict[int, str] = {}
        for place, found in answers(self.journal, works, self.compute):
            chunk, batch = plan[place]
            spent = found.seconds / len(chunk)
            for number, item, generation in zip(chunk, batch.items, found.results, strict=True):
                texts[number] = self._log_generation(item, generation, batch.until, spent)
            self.progress(len(texts), len(requests))
        return [texts[number] for number in range(len(requests))]

    def _log_generation(self, item: Hashable, generation: Generation, until: list[str], seconds: float) -> str:
        entry = self._entry(item)
        entry.answer_tokens = generation.tokens
        entry.nfe += generation.nfe
        entry.new_tokens += generation.new_tokens
        entry.seconds += seconds
        text = self.tokenizer.decode(generation.tokens, skip_special_tokens=True)
        return postprocess_generated_text(text, until, None)

    def _entry(self, item: Hashable) -> ItemLog:
        return self.log.setdefault(item, ItemLog())

    def compute(self, work: Work) -> list[Any]:
        """Answer one planned batch on this process's model.

        Args:
            work: The batch.
        """
        if isinstance(work.batch, PromptBatch):
            return self._generate(work.batch)
        before, self.check_greedy = self.check_greedy, work.check_greedy
        try:
            return self._score(work.batch)
        finally:
            self.check_greedy = before

    @abstractmethod
    def _score(self, targets: Sequence[Target]) -> list[Score]:
        """Score one batch of targets."""

    @abstractmethod
    def _generate(self, batch: PromptBatch) -> list[Generation]:
        """Generate for one batch of prompts."""

    def _generator(self, draw: Hashable) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(repr((self.seed, draw)).encode()))


def _item(request: Instance) -> Hashable:
    return (request.task_name, request.doc_id)
