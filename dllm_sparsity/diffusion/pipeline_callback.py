"""A step callback for diffusers' text pipelines: records what each step did. Needs diffusers when it is imported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from diffusers.callbacks import PipelineCallback

from dllm_sparsity.diffusion.pipelines import PipelineStep
from dllm_sparsity.errors import UserError

if TYPE_CHECKING:
    from dllm_sparsity.diffusion.pipelines import PipelineClock

_CANVASES = ("block_x", "canvas")  # what the pipelines call the token ids


class SparsityCallback(PipelineCallback):
    """Record each step in `clock.steps`; made by `PipelineClock.callback`.

    Args:
        clock: The clock of the pipeline that it is given to.
        then: A callback of the user's, called after it.
        wanted: Tensors that the user's callback wants, where it does not say so itself.
    """

    def __init__(self, clock: PipelineClock, then: Callable[..., Any] | None, wanted: Sequence[str]) -> None:
        super().__init__()
        self._clock, self._then, self._wanted = clock, then, list(wanted)

    @property
    def tensor_inputs(self) -> list[str]:
        """Tensors that the pipeline hands over: those that it has, whatever its version calls them."""
        loop = self._loop()
        own = [name for name in _CANVASES if name in loop.pipe._callback_tensor_inputs]
        return list(dict.fromkeys([*own, *self._wanted, *getattr(self._then, "tensor_inputs", [])]))

    def callback_fn(self, pipeline: Any, step_index: int, timesteps: int, callback_kwargs: dict) -> dict[str, Any]:
        """Record a step, and call the user's callback.

        Args:
            pipeline: The pipeline.
            step_index: Step in the call.
            timesteps: Step in the block.
            callback_kwargs: Tensors by name.

        Returns:
            Tensors by name, as the pipeline asks for; never None.

        Raises:
            UserError: The clock and the pipeline do not stand at the same step.
        """
        loop = self._loop()
        if step_index != loop.step:
            raise UserError(
                f"the pipeline is at step {step_index}, the clock at {loop.step}",
                "run other forward passes of the model inside clock.paused()",
            )
        canvas = next((callback_kwargs[name] for name in _CANVASES if name in callback_kwargs), None)
        committed, edited = loop.changes(canvas)
        counts = [None if changed is None else changed.sum(-1) for changed in (committed, edited)]
        self._clock.steps.append(
            PipelineStep(loop.request, loop.block, step_index, int(timesteps), loop.forwards, *counts)
        )
        if self._then is None:
            return callback_kwargs
        returned = self._then(pipeline, step_index, timesteps, callback_kwargs)
        return callback_kwargs if returned is None else returned

    def _loop(self) -> Any:
        if self._clock.loop is None:
            raise UserError("a sparsity callback outside its pipeline_clock", "call the pipeline inside the with block")
        return self._clock.loop
