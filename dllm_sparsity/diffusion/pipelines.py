"""pipeline_clock(): drive a clock for a text-diffusion pipeline of diffusers, which stays as it is."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dllm_sparsity.diffusion.attention_mask import warn_of_mask
from dllm_sparsity.errors import UserError
from dllm_sparsity.sparsity.clock import Clock

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from dllm_sparsity.diffusion.pipeline_callback import SparsityCallback
    from dllm_sparsity.diffusion.pipeline_loops import Loop, See

_IDS = ("input_ids", "decoder_input_ids")
_SCHEDULER_CANVAS = (
    "EntropyBoundScheduler: DiffusionGemmaPipeline returns the scheduler's canvas; in a row that has not converged at "
    "the last step, tokens that were not accepted are random, where transformers' own generate returns the likeliest. "
    "Raise num_inference_steps, or do not score such answers"
)


class PipelineOutputWarning(UserWarning):
    """What a pipeline returns is not what its model predicted."""


@dataclass(frozen=True)
class PipelineStep:
    """What one step of a pipeline did, as its callback saw it.

    Args:
        request: Number of the pipeline's call, from 1.
        block: Block or canvas that was denoised, from 0.
        step: The pipeline's step, counted over the whole call.
        turn: Step in the block, as the pipeline numbers it.
        forwards: Forward passes of the call so far.
        committed: Tokens that were committed, in each row; None where the scheduler commits none for good.
        edited: Committed tokens that were replaced, in each row; None as before.
    """

    request: int
    block: int
    step: int
    turn: int
    forwards: int
    committed: Int[Tensor, "batch"] | None
    edited: Int[Tensor, "batch"] | None


class PipelineClock(Clock):
    """A clock that a pipeline drives; `steps` has what its callback saw."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[PipelineStep] = []
        self.nfe: Int[Tensor, "batch"] | None = None
        """Forward passes of the last call, in each row until its text was finished."""
        self.loop: Loop | None = None

    def callback(self, then: Callable[..., Any] | None = None, tensor_inputs: Sequence[str] = ()) -> SparsityCallback:
        """Return a callback that records each step, and checks that the clock did not lose count.

        Args:
            then: A callback of one's own, called after it with the same arguments.
            tensor_inputs: Tensors that it wants, where it does not say so itself.

        Example:
            pipe(prompt, callback_on_step_end=clock.callback())
        """
        from dllm_sparsity.diffusion.pipeline_callback import SparsityCallback

        return SparsityCallback(self, then, tensor_inputs)


@contextmanager
def pipeline_clock(
    pipe: Any,
    *,
    mask_token_id: int | None = None,
    eos_token_id: int | None = None,
    clock: PipelineClock | None = None,
    items: Sequence[Hashable] | None = None,
    check: bool = True,
) -> Iterator[PipelineClock]:
    """Drive a clock for `LLaDA2Pipeline` or `DiffusionGemmaPipeline`, exactly, for one `with` block.

    Each call of the pipeline is a request batch, and each forward pass of its model one tick: phase `denoise`, with
    the pipeline's step number and the block; DiffusionGemma's encoder is phase `encode`, and a corrector sweep, which
    no callback sees, phase `correct`. A row whose text is finished only waits and is not counted. DiffusionGemma has
    no mask token: its canvas tokens count as masked until the scheduler accepts them, and are `unknown` behind the
    first step of a canvas where the scheduler does not say (DiscreteDDIM).

    Args:
        pipe: The pipeline.
        mask_token_id: Where the call is given another than the tokenizer's.
        eos_token_id: Where the call is given another than the tokenizer's; -1 where text behind an end token counts.
        clock: A clock to drive; a new one when None.
        items: What the rows of each call belong to; numbered when None.
        check: Whether to warn where the pipeline does otherwise than its model was trained.

    Yields:
        The clock, to be given to `sparsify`.

    Raises:
        UserError: diffusers is missing, the pipeline is another one, or has no mask token.

    Example:
        with pipeline_clock(pipe) as clock, sparsify(pipe.model, TopP(0.9), "all", clock=clock) as tracker:
            pipe("Why is the sky blue?")
        print(tracker.read().sparsity(token_state="masked"))
    """
    kind = pipeline_kind(pipe)
    clock = clock if clock is not None else PipelineClock()
    if check:
        for note in check_pipeline(pipe):
            clock.note(note)
    from dllm_sparsity.diffusion import pipeline_loops

    end = eos_token_id if eos_token_id is not None else pipe.eos_token_id
    if kind == "llada2":
        mask = mask_token_id if mask_token_id is not None else pipe.mask_token_id
        if mask is None:
            raise UserError("the pipeline's tokenizer names no mask token", "give pipeline_clock(mask_token_id=...)")
        loop: Loop = pipeline_loops.MaskedLoop(clock, pipe, items, end, mask)
    else:
        loop = pipeline_loops.CanvasLoop(clock, pipe, items, end)
    clock.loop = loop
    with ExitStack() as undo:
        undo.callback(setattr, clock, "loop", None)
        for module, see in loop.watched():
            handle = module.register_forward_pre_hook(_counting(clock, see), with_kwargs=True, prepend=True)
            undo.callback(handle.remove)
        for owner, name, after in loop.wrapped():
            undo.callback(_wrap(owner, name, after))
        try:
            yield clock
        except BaseException:
            loop.drop()
            raise
        loop.finish()


def pipeline_kind(pipe: Any) -> str:
    """Return `llada2` or `diffusion_gemma`.

    Args:
        pipe: A pipeline of diffusers.

    Raises:
        UserError: diffusers is missing or too old, or the pipeline is another one.
    """
    try:
        from diffusers import DiffusionGemmaPipeline, LLaDA2Pipeline
    except ImportError as error:
        raise UserError(
            f"diffusers with its text pipelines cannot be imported: {error}", "pip install '.[diffusers]'"
        ) from error
    if isinstance(pipe, LLaDA2Pipeline):
        return "llada2"
    if isinstance(pipe, DiffusionGemmaPipeline):
        return "diffusion_gemma"
    raise UserError(
        f"{type(pipe).__name__} is no pipeline that is known here",
        "give a LLaDA2Pipeline or DiffusionGemmaPipeline; for another loop use observe(), or drive a Clock",
    )


def check_pipeline(pipe: Any) -> list[str]:
    """Warn where a pipeline does otherwise than its model was trained, and return what was said.

    Args:
        pipe: The pipeline.
    """
    if pipeline_kind(pipe) == "llada2":
        return warn_of_mask(pipe.model, pipe.scheduler.config.block_length)
    if type(pipe.scheduler).__name__ == "EntropyBoundScheduler":
        warnings.warn(_SCHEDULER_CANVAS, PipelineOutputWarning, stacklevel=4)
        return [_SCHEDULER_CANVAS]
    return []


def _counting(clock: Clock, see: See) -> Callable[..., None]:
    """Return a pre-hook that is silent while the clock is, as in the dry run of `sparsify`."""

    def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if clock.counting:
            see(next(iter([*args[:1], *(kwargs[name] for name in _IDS if name in kwargs)])), kwargs)

    return hook


def _wrap(owner: Any, name: str, after: Callable[[dict[str, Any], Any], None]) -> Callable[[], None]:
    """Let a function see the arguments and the result of an object's method; return what undoes it."""
    method = getattr(owner, name)
    own = vars(owner).get(name)
    signature = inspect.signature(method)

    @functools.wraps(method)  # pipelines look at a scheduler's signature
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        after(signature.bind(*args, **kwargs).arguments, result)
        return result

    owner.__dict__[name] = wrapped

    def undo() -> None:
        if own is None:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = own

    return undo
