"""Text-diffusion pipelines of diffusers as lm-eval LMs, with the sparsity clock driven."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from dllm_sparsity.diffusion.attention_mask import block_causal_mask, is_block_trained
from dllm_sparsity.diffusion.backend import DiffusionBackend
from dllm_sparsity.diffusion.pipelines import PipelineClock, check_pipeline, pipeline_clock, pipeline_kind
from dllm_sparsity.diffusion.tokens import cut_answer
from dllm_sparsity.errors import UserError, did_you_mean
from dllm_sparsity.lm.base import Generation, PromptBatch, Score, SparsityLM, Target
from dllm_sparsity.lm.loading import ModelSource, load

_OURS = ("prompt", "messages", "image", "input_ids", "attention_mask", "use_chat_template", "add_generation_prompt")
_OURS_TOO = ("gen_length", "generator", "output_type", "return_dict", "callback_on_step_end_tensor_inputs")
_NO_BOUND = (
    "{} has no likelihood here: {}",
    "use tasks of output type generate_until, or the model's own evaluation",
)


def pipeline_backend(pipe: Any, **settings: Any) -> LLaDA2Backend | DiffusionGemmaBackend:
    """Return a pipeline as an lm-eval LM.

    Args:
        pipe: A LLaDA2Pipeline or DiffusionGemmaPipeline.
        settings: Arguments of `LLaDA2Backend` or `DiffusionGemmaBackend`.

    Example:
        lm = pipeline_backend(pipe, options={"num_inference_steps": 16})
        with sparsify(lm.model, TopP(0.9), "all", clock=lm.clock) as tracker:
            lm_eval.simple_evaluate(lm, tasks=["gsm8k"])
    """
    kind = LLaDA2Backend if pipeline_kind(pipe) == "llada2" else DiffusionGemmaBackend
    return kind(pipe, **settings)


def open_pipeline(
    source: ModelSource, kind: str, options: dict[str, Any], block_length: int | None = None, **settings: Any
) -> LLaDA2Backend | DiffusionGemmaBackend:
    """Load a model, put it into its pipeline with the scheduler it was published with, and return that as an LM.

    A LLaDA2 trained block by block runs with `block_causal_mask`.

    Args:
        source: Where the model comes from.
        kind: `llada2` or `diffusion_gemma`.
        options: Arguments of the pipeline's call.
        block_length: Of LLaDA2's blocks; the scheduler's own when None.
        settings: Arguments of the backend.

    Raises:
        UserError: The model cannot be loaded, diffusers is missing, or an option is unknown.
    """
    model, tokenizer = load(source)
    try:
        from diffusers import (
            BlockRefinementScheduler,
            DiffusionGemmaPipeline,
            EntropyBoundScheduler,
            LLaDA2Pipeline,
        )
    except ImportError as error:
        raise UserError("diffusers is not installed", "pip install '.[diffusers]'") from error
    if kind == "llada2":
        scheduler = BlockRefinementScheduler(**({} if block_length is None else {"block_length": block_length}))
        pipe = LLaDA2Pipeline(model=model, scheduler=scheduler, tokenizer=tokenizer)
        given = {**options, "block_length": scheduler.config.block_length}
        settings |= {"options": given, "block_causal": is_block_trained(model)}
    else:
        pipe = DiffusionGemmaPipeline(model=model, scheduler=EntropyBoundScheduler(), processor=tokenizer)
        settings["options"] = options
    pipe.set_progress_bar_config(disable=True)
    return pipeline_backend(pipe, **settings)


class _Runs:
    """What both backends share: calls of a pipeline inside its clock."""

    pipe: Any
    clock: PipelineClock
    options: dict[str, Any]
    notes: list[str]
    """What a reader of the answers should know."""

    def _prepare(self, pipe: Any, options: dict[str, Any] | None) -> None:
        self.pipe, self.options, self.clock = pipe, _checked(pipe, options or {}), PipelineClock()
        self.notes = self.clock.notes

    def _run(self, batch: PromptBatch, rows: list[int], given: dict[str, Any], **extra: Any) -> list[Generation]:
        """Answer some rows of a batch by one call of the pipeline."""
        lm: Any = self
        options = {**self.options, **given, **extra}
        end = options.get("eos_token_id", self.pipe.eos_token_id)
        items = [batch.items[row] for row in rows]
        with pipeline_clock(
            self.pipe,
            mask_token_id=options.get("mask_token_id"),
            eos_token_id=end,
            clock=self.clock,
            items=items,
            check=False,
        ) as clock:
            generator = torch.Generator(self.pipe._execution_device).manual_seed(
                lm._generator(batch.draws[rows[0]]).initial_seed()
            )
            done = self.pipe(gen_length=batch.length, generator=generator, output_type="seq", **options)
        nfe = [0] * len(rows) if clock.nfe is None else clock.nfe.tolist()
        texts = done.sequences[:, : batch.length].tolist()
        return [cut_answer(lm.tokenizer, text, n, end, batch.until) for text, n in zip(texts, nfe, strict=True)]


class LLaDA2Backend(_Runs, DiffusionBackend):
    """`LLaDA2Pipeline` as an lm-eval LM.

    Prompts of one length are answered together where that cannot change an answer, that is without sampling and
    without editing, whose end depends on the other rows; else one by one. Padding is never used.

    A likelihood is the masked-diffusion bound of `DiffusionBackend` where the model was trained on whole texts with
    full attention. For a model trained block by block it is refused: the bound hides tokens of all blocks at once,
    and lets each see later blocks, neither of which such a model was trained for.

    Args:
        pipe: The pipeline.
        tokenizer: The pipeline's own when None.
        options: Arguments of the pipeline's call. `editing_threshold=None` turns editing off, also where the
            scheduler's config has it on.
        block_causal: Whether to run the model with `block_causal_mask`, as models trained block by block need it.
        settings: Arguments of `DiffusionBackend` but those of its own loop; `cfg_scale` is of the likelihood alone.

    Raises:
        UserError: The pipeline is another one, or its call has no such argument.
    """

    stacks = False

    def __init__(
        self,
        pipe: Any,
        tokenizer: Any = None,
        *,
        options: dict[str, Any] | None = None,
        block_causal: bool = False,
        **settings: Any,
    ) -> None:
        if pipeline_kind(pipe) != "llada2":
            raise UserError(f"{type(pipe).__name__} is no LLaDA2Pipeline", "use pipeline_backend(pipe)")
        unused = [name for name in ("steps", "block_length", "temperature", "sampler") if name in settings]
        if unused:
            raise UserError(f"the pipeline generates by its own {unused[0]}", "give what its call takes in options")
        mask = (options or {}).get("mask_token_id")
        super().__init__(pipe.model, tokenizer or pipe.tokenizer, **{"mask_token": mask, **settings})
        self._prepare(pipe, options)
        self.block_causal = block_causal
        if "editing_threshold" in self.options and self.options["editing_threshold"] is None:
            self.options["editing_threshold"] = 0.0
        self.options.setdefault("mask_token_id", self.mask_id)
        with self._attention():
            for note in check_pipeline(pipe):
                self.clock.note(note)

    def _attention(self) -> Any:
        if not self.block_causal:
            return nullcontext()
        return block_causal_mask(self.model, self._option("block_length") or self.pipe.scheduler.config.block_length)

    def _option(self, name: str, given: dict[str, Any] | None = None) -> Any:
        default = inspect.signature(type(self.pipe).__call__).parameters[name].default
        return {**self.options, **(given or {})}.get(name, default)

    def _score(self, targets: Sequence[Target]) -> list[Score]:
        if self.block_causal or is_block_trained(self.model):
            name, reason = type(self.model).__name__, "it was trained block by block, the bound is over whole texts"
            raise UserError(_NO_BOUND[0].format(name, reason), _NO_BOUND[1])
        return super()._score(targets)

    def _generate(self, batch: PromptBatch) -> list[Generation]:
        given = _sampling(batch.options, ("temperature", "top_k", "top_p"))
        drawn = self._option("temperature", given) != 0 and self._option("sampling_method", given) != "greedy"
        groups: dict[int, list[int]] = {}
        for row, prompt in enumerate(batch.prompts):
            alone = drawn or (self._option("editing_threshold", given) or 0) > 0
            groups.setdefault(-row - 1 if alone else len(prompt), []).append(row)
        answers: dict[int, Generation] = {}
        for rows in groups.values():
            ids = torch.tensor([batch.prompts[row] for row in rows])
            with self._attention():
                answers |= zip(rows, self._run(batch, rows, given, input_ids=ids), strict=True)
        return [answers[row] for row in range(len(batch.prompts))]


class DiffusionGemmaBackend(_Runs, SparsityLM):
    """`DiffusionGemmaPipeline` as an lm-eval LM: generation only, one prompt at a time, as each draws its own canvas.

    Forward passes of the encoder, the decoder and corrector sweeps all count as `nfe`. There is no likelihood: the
    model corrupts tokens to other tokens, not to a mask, and its bound takes the corruption process it was trained
    with, which neither the model nor the pipeline says.

    Args:
        pipe: The pipeline.
        tokenizer: The one of the pipeline's processor when None.
        options: Arguments of the pipeline's call.
        settings: Arguments of `SparsityLM`.

    Raises:
        UserError: The pipeline is another one, or its call has no such argument.
    """

    bidirectional = True
    estimator = "none"

    def __init__(
        self, pipe: Any, tokenizer: Any = None, *, options: dict[str, Any] | None = None, **settings: Any
    ) -> None:
        if pipeline_kind(pipe) != "diffusion_gemma":
            raise UserError(f"{type(pipe).__name__} is no DiffusionGemmaPipeline", "use pipeline_backend(pipe)")
        own = getattr(pipe.processor, "tokenizer", pipe.processor)
        super().__init__(pipe.model, tokenizer or own, **settings)
        self._prepare(pipe, options)
        for note in check_pipeline(pipe):
            self.clock.note(note)

    def _score(self, targets: Sequence[Target]) -> list[Score]:
        reason = "its corruption process, which a bound needs, is not known"
        raise UserError(_NO_BOUND[0].format("DiffusionGemma", reason), _NO_BOUND[1])

    def _generate(self, batch: PromptBatch) -> list[Generation]:
        given = _sampling(batch.options, ("temperature",))
        processor = self.pipe.processor
        answers = []
        try:
            for row, prompt in enumerate(batch.prompts):
                self.pipe.processor = _Encoded(prompt)  # the pipeline takes texts only, and renders them once more
                answers += self._run(batch, [row], given, messages=[])
        finally:
            self.pipe.processor = processor
        return answers


class _Encoded:
    """Stand in for a processor: a prompt that is tokens already."""

    def __init__(self, prompt: list[int]) -> None:
        self._prompt = prompt

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Return the prompt.

        Args:
            messages: Ignored.
            kwargs: Ignored.
        """
        return {"input_ids": torch.tensor([self._prompt])}


def _checked(pipe: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Refuse what the pipeline's call does not take, or what the backend gives it."""
    known = [
        name for name in inspect.signature(type(pipe).__call__).parameters if name not in (*_OURS, *_OURS_TOO, "self")
    ]
    for name in options:
        if name in (*_OURS, *_OURS_TOO):
            raise UserError(f"option {name!r} is set from the task", "leave it out")
        if name not in known:
            raise UserError(
                f"{type(pipe).__name__} has no option {name!r}{did_you_mean(name, known)}",
                f"it has: {', '.join(known)}",
            )
    return dict(options)


def _sampling(options: dict[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    """Return the task's sampling arguments as the pipeline's; none where the task does not sample."""
    neutral = {"do_sample": options.get("do_sample"), "top_k": 0, "top_p": 1.0}  # what asks for nothing
    asked = {name: value for name, value in options.items() if value is not None and value != neutral.get(name)}
    unknown = sorted(set(asked) - {"temperature", *known})
    if unknown:
        raise UserError(
            f"generation arguments not supported by the pipeline: {', '.join(unknown)}",
            f"the task may use: do_sample, {', '.join(known)}",
        )
    if not options.get("do_sample"):
        return {}
    return {"temperature": 1.0, **{name: value for name, value in asked.items() if name in known}}
