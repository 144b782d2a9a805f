"""How much work a task is to a model, from its own requests in the backend's own batches; no weight is read."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from dllm_sparsity import registry
from dllm_sparsity.errors import UserError
from dllm_sparsity.lm.items import Generation, PromptBatch, Score, Target
from dllm_sparsity.study.config import ModelConfig, TaskSpec
from dllm_sparsity.study.models import backend_settings
from dllm_sparsity.study.tasks import LoadedTask

_CHUNK = re.compile(r"\s*\w{1,5}|\s*[^\w\s]|\s+")


@dataclass
class Workload:
    """The forward passes of one cell.

    Args:
        items: Documents.
        requests: Requests of the task.
        forwards: Calls of the model.
        rows: Sequences that they read, together.
        tokens: Tokens that they read, together, padding left out.
        pairs: Tokens times the tokens each can attend to, together.
        scored: Positions that get logits, together.
        most_tokens: Tokens of the largest call.
        most_scored: Positions with logits in the largest call.
        most_cached: Tokens that the largest cache holds.
        steps: Denoising or decoding steps of an answer; 0 where nothing is generated.
        bounded: Whether an early end can make it less.
        counted_tokens: False where a stand-in for the tokenizer made the tokens.
    """

    items: int = 0
    requests: int = 0
    forwards: int = 0
    rows: int = 0
    tokens: int = 0
    pairs: int = 0
    scored: int = 0
    most_tokens: int = 0
    most_scored: int = 0
    most_cached: int = 0
    steps: int = 0
    bounded: bool = False
    counted_tokens: bool = True

    def add(self, lengths: Sequence[int], reads: Sequence[int], scored: int, forwards: int, times: int = 1) -> None:
        """Add forward passes of one shape.

        Args:
            lengths: Tokens of each row.
            reads: Tokens that the tokens of each row attend to.
            scored: Positions with logits in all of these rows.
            forwards: Calls that the rows are spread over.
            times: How often all of it is done.
        """
        self.forwards += forwards * times
        self.rows += len(lengths) * times
        self.tokens += sum(lengths) * times
        self.pairs += sum(n * m for n, m in zip(lengths, reads, strict=True)) * times
        self.scored += scored * times
        self.most_tokens = max(self.most_tokens, math.ceil(sum(lengths) / forwards))
        self.most_scored = max(self.most_scored, math.ceil(scored / forwards))

    def stacked(self, copies: int) -> Workload:
        """Return the work whose largest call holds so many copies of a batch.

        Args:
            copies: How many.
        """
        most = {name: copies * getattr(self, name) for name in ("most_tokens", "most_scored", "most_cached")}
        return replace(self, **most)


class _Planner:
    """Put in front of a backend: batches are counted where the backend would run them."""

    work: Workload
    batches: list[Any]

    def _score(self, targets: Sequence[Target]) -> list[Score]:
        lm: Any = self
        self.batches.append(list(targets))
        (_denoised if lm.bidirectional else _read_once)(lm, targets, self.work)
        return [Score(0.0, False, 0.0, 0) for _ in targets]

    def _generate(self, batch: PromptBatch) -> list[Generation]:
        lm: Any = self
        self.batches.append(batch)
        (_denoise if lm.bidirectional else _decode)(lm, batch, self.work)
        return [Generation([], 0, 0) for _ in batch.prompts]


def _read_once(lm: Any, targets: Sequence[Target], work: Workload) -> None:
    if hasattr(lm, "forwards"):  # of a backend whose rows stand for several targets
        for lengths, reads, scored in lm.forwards(targets):
            work.add(lengths, reads, scored, 1)
            if reads != lengths:  # its rows continue a cache
                work.most_cached = max(work.most_cached, sum(reads))
        return
    lengths = [min(len(target.context) + len(target.tokens) - 1, lm.max_length) for target in targets]
    work.add(lengths, lengths, sum(len(target.tokens) for target in targets), 1)


def _denoised(lm: Any, targets: Sequence[Target], work: Workload) -> None:
    times = 2 if lm.cfg_scale else 1
    lengths, scored = [], 0
    for target in targets:
        masks = lm._plan(target).masks
        lengths += [min(len(target.context) + len(target.tokens), lm.max_length)] * len(masks)
        scored += int(masks.sum())
    work.add(lengths, lengths, scored, math.ceil(len(lengths) / lm.batch_size), times)
    if not lm.check_greedy:
        return
    for size in {len(target.tokens) for target in targets}:  # denoised once more, to learn whether it says the same
        own = [min(len(t.context) + size, lm.max_length) for t in targets if len(t.tokens) == size]
        work.add(own, own, size * len(own), 1, size * times)
        work.bounded = work.bounded or size > 1


def _decode(lm: Any, batch: PromptBatch, work: Workload) -> None:
    prompts = [len(prompt) for prompt in batch.prompts]
    work.add(prompts, prompts, len(prompts), 1)
    if batch.length > 1:
        middle = [prompt + batch.length // 2 for prompt in prompts]
        work.add([1] * len(prompts), middle, len(prompts), 1, batch.length - 1)
        work.bounded = True
    work.most_cached = max(work.most_cached, sum(prompts) + batch.length * len(prompts))
    work.steps = max(work.steps, batch.length)


def _denoise(lm: Any, batch: PromptBatch, work: Workload) -> None:
    from dllm_sparsity.diffusion.denoise import DenoiseSettings

    settings = DenoiseSettings(batch.length, **lm.denoising)
    lengths = [len(prompt) + batch.length for prompt in batch.prompts]
    work.add(lengths, lengths, batch.length * len(lengths), 1, settings.max_forwards)
    work.steps = max(work.steps, settings.max_forwards)
    work.bounded = True


def make_planner(config: ModelConfig, model: Any, fields: dict[str, Any], tokenizer: Any, seed: int) -> Any:
    """Return a model's backend that counts what it would run.

    Args:
        config: The model and how it is run.
        model: Its structure, on the meta device.
        fields: Its configuration.
        tokenizer: Its tokenizer; a stand-in that cuts text into short pieces where None.
        seed: The study's seed.

    Raises:
        UserError: Its backend, or the pipeline that it runs, does not tell its batches.
    """
    from dllm_sparsity.lm.base import SparsityLM

    if getattr(config, "pipeline", None) is not None:
        raise UserError(f"how often the pipeline {config.pipeline} calls its model is not known before", "run it")
    backend = registry.get("backends", config.paradigm)
    if not (isinstance(backend, type) and issubclass(backend, SparsityLM)):
        raise UserError(f"backend {config.paradigm} does not tell its batches", "run it")
    if not hasattr(model, "config"):
        model.config = SimpleNamespace(**fields)
    counts = tokenizer is not None
    settings = backend_settings(config, seed)
    if not counts and config.paradigm == "diffusion":
        settings["mask_token"] = 4  # which one is not known, and does not change a count
    planner: Any = type("Planner", (_Planner, backend), {})(model, tokenizer or _StandIn(), **settings)
    planner.counts_tokens, planner.batches, planner.work = counts, [], Workload()
    return planner


def workload(planner: Any, task: LoadedTask, spec: TaskSpec) -> tuple[Workload, list[Any]]:
    """Return the work that one cell of a task is, and its batches as the backend makes them.

    Args:
        planner: As `make_planner` returned it.
        task: The task, loaded.
        spec: The task as the user gave it.

    Raises:
        UserError: The backend refuses what the task asks for.
    """
    from dllm_sparsity.study.run import needs_greedy

    planner.batches, planner.work = [], Workload(counted_tokens=planner.counts_tokens)
    planner.log.clear()
    planner.check_greedy = needs_greedy(task.task)
    before = getattr(planner, "mc", None)
    if spec.mc is not None and before is not None:
        planner.mc = spec.mc
    task.task.build_all_requests(
        limit=spec.limit,
        apply_chat_template=spec.chat_template,
        chat_template=planner.apply_chat_template if spec.chat_template else None,
        tokenizer_name=planner.tokenizer_name if spec.chat_template else "",
    )
    requests: dict[str, list[Any]] = {}
    for request in task.task.instances:
        requests.setdefault(request.request_type, []).extend([request] * request.repeats)
    try:
        for kind, own in requests.items():
            getattr(planner, kind)(own)
    finally:
        if before is not None:
            planner.mc = before
    planner.work.requests = sum(map(len, requests.values()))
    planner.work.items = len({request.doc_id for own in requests.values() for request in own})
    return planner.work, planner.batches


class _StandIn:
    """Cuts text into pieces about as long as those of common tokenizers, where a model's own is not at hand."""

    eos_token_id, bos_token_id, cls_token_id, sep_token_id, pad_token_id = 1, 2, None, None, 0
    mask_token_id = unk_token_id = unk_token = None
    name_or_path = "stand-in"
    model_max_length = 2048
    chat_template = "chat"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return one id for each piece."""
        return [5 + zlib.crc32(piece.encode()) % 50 for piece in _CHUNK.findall(text)]

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """Return a sign that no text begins with."""
        return "\0"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        """Return the messages with about as much around each as chat templates have."""
        return "".join(f"<|{each['role']}|>\n{each['content']}<|end|>\n" for each in messages)

    def convert_tokens_to_ids(self, token: str) -> None:
        """Return nothing: it has no vocabulary."""

    def build_inputs_with_special_tokens(self, ids: list[int]) -> list[int]:
        """Return the ids as they are."""
        return ids
