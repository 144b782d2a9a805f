"""Where the loops of diffusers' text pipelines stand, seen from their models' arguments and their schedulers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dllm_sparsity.diffusion.denoise import ended, token_states
from dllm_sparsity.errors import UserError
from dllm_sparsity.sparsity.clock import Compare, Phase, Slot, TokenState

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor, nn

    from dllm_sparsity.diffusion.pipelines import PipelineClock

    See = Callable[[Tensor, dict[str, Any]], None]
    After = Callable[[dict[str, Any], Any], None]


class Loop(ABC):
    """One pipeline's loop; knows its step before each forward pass.

    Args:
        clock: The clock to drive.
        pipe: The pipeline.
        items: What the rows of each call belong to; numbered when None.
        eos_id: Id of the end token; None where there is none.
    """

    def __init__(self, clock: PipelineClock, pipe: Any, items: Sequence[Hashable] | None, eos_id: int | None) -> None:
        self.clock, self.pipe, self.eos_id = clock, pipe, eos_id
        self._items, self._scheduler = items, pipe.scheduler
        self.request = self.forwards = 0
        self.step = self.block = -1
        self._open = self._called = False
        self.arguments: dict[str, Any] = {}

    @abstractmethod
    def watched(self) -> list[tuple[nn.Module, See]]:
        """Return the modules whose forward passes are to be announced, and what is to see their arguments."""

    @abstractmethod
    def wrapped(self) -> Iterable[tuple[Any, str, After]]:
        """Return methods, as owner and name, whose arguments and result are to be seen."""

    @abstractmethod
    def changes(
        self, canvas: Int[Tensor, "batch seq"] | None
    ) -> tuple[Bool[Tensor, "batch seq"] | None, Bool[Tensor, "batch seq"] | None]:
        """Return what the step committed and what it edited.

        Args:
            canvas: Token ids after the step.
        """

    def called(self, arguments: dict[str, Any], result: Any) -> None:
        """Note that the pipeline was called, from the check of its arguments.

        Args:
            arguments: What the pipeline checks.
            result: Nothing.
        """
        self.finish()
        self.request, self.step, self.block, self.forwards = self.request + 1, -1, -1, 0
        self._called = True
        self.arguments = arguments

    def finish(self) -> None:
        """Close the last call's request batch."""
        if self._open:
            self.clock.end()
        self._open = self._called = False

    def drop(self) -> None:
        """Count nothing of the last call: it broke off, and the whole block with it."""
        if self._open:
            self.clock._clear()
        self._open = self._called = False

    @abstractmethod
    def _room(self) -> int:
        """Return how many forward passes to make room for."""

    def _begin(self, batch: int, device: torch.device) -> None:
        """Open the request batch before the first forward pass of a call."""
        if not self._called:
            raise UserError(*_FOREIGN)
        if self.pipe.scheduler is not self._scheduler:
            raise UserError("the pipeline's scheduler was exchanged", "exchange it before pipeline_clock")
        items = self._items if self._items is not None else [(self.request, row) for row in range(batch)]
        if len(items) != batch:
            raise UserError(f"{len(items)} items for a batch of {batch} rows", "give one item a row")
        self.clock.begin(items, self._room())
        self.nfe = self.clock.nfe = torch.zeros(batch, dtype=torch.long, device=device)
        self._open = True

    def _tick(self, slot: Slot, states: Tensor, over: Bool[Tensor, "batch"], compare: Compare) -> None:
        self.clock.tick(slot, states.masked_fill(over.unsqueeze(-1), TokenState.PAD), compare)
        self.nfe += ~over  # the clock's own
        self.forwards += 1


class MaskedLoop(Loop):
    """LLaDA2Pipeline: each step sees the prompt and all blocks up to the one that is filled.

    Args:
        clock: As in `Loop`.
        pipe: As in `Loop`.
        items: As in `Loop`.
        eos_id: As in `Loop`.
        mask_id: Id of the mask token.
    """

    def __init__(
        self,
        clock: PipelineClock,
        pipe: Any,
        items: Sequence[Hashable] | None,
        eos_id: int | None,
        mask_id: int,
    ) -> None:
        super().__init__(clock, pipe, items, eos_id)
        self.mask_id = mask_id
        self._before: Tensor | None = None

    def watched(self) -> list[tuple[nn.Module, See]]:
        """Watch the model."""
        return [(self.pipe.model, self._see)]

    def wrapped(self) -> Iterable[tuple[Any, str, After]]:
        """See the pipeline's arguments, and with which mask token the scheduler steps."""
        return [(self.pipe, "check_inputs", self.called), (self._scheduler, "step", self._stepped)]

    def _see(self, ids: Tensor, kwargs: dict[str, Any]) -> None:
        before = self._before if self._open else None
        masked = ids == self.mask_id
        if before is None:
            self._begin(len(ids), ids.device)
            hidden = masked[0].tolist()
            self._start = len(hidden) - next((n for n, mask in enumerate(hidden[::-1]) if not mask), len(hidden))
        elif len(before) != len(ids) or before.shape[1] > ids.shape[1]:
            raise UserError(*_FOREIGN)
        same = before is not None and before.shape == ids.shape
        self.block += not same
        self.step += 1
        now = torch.zeros_like(masked)
        if before is not None:
            width = before.shape[1]
            now[:, :width] = (before != ids[:, :width]) & ~masked[:, :width]
        start = self._start
        prompt = torch.full_like(ids[:, :start], TokenState.PROMPT)
        states = torch.cat([prompt, token_states(ids[:, start:], now[:, start:], self.mask_id, self.eos_id)], dim=1)
        real = kwargs.get("attention_mask")
        if real is not None and real.dim() == 2:  # padding in prompts, and what lies behind the wanted length
            states = states.masked_fill(real == 0, TokenState.PAD)
        over = ended(ids[:, start:], self.mask_id, self.eos_id)
        slot = Slot(Phase.DENOISE, "cond", self.block, self.step)
        self._tick(slot, states, over, Compare.PREVIOUS if same else Compare.START)
        self._before = ids.clone()

    def _room(self) -> int:
        blocks = -(-self.arguments["gen_length"] // self.arguments["block_length"]) + 1
        return blocks * self.arguments["num_inference_steps"]

    def _stepped(self, arguments: dict[str, Any], result: Any) -> None:
        if (given := arguments.get("mask_token_id")) != self.mask_id:
            raise UserError(
                f"the pipeline runs with mask token {given}, the clock with {self.mask_id}",
                f"give pipeline_clock(mask_token_id={given})",
            )

    def changes(
        self, canvas: Int[Tensor, "batch seq"] | None
    ) -> tuple[Bool[Tensor, "batch seq"] | None, Bool[Tensor, "batch seq"] | None]:
        """Compare with the ids before the step: the pipeline's own masks also count rows that it then holds still.

        Args:
            canvas: Token ids after the step.
        """
        if canvas is None or self._before is None:
            return None, None
        masked, changed = self._before == self.mask_id, self._before != canvas
        return masked & changed, ~masked & changed


class CanvasLoop(Loop):
    """DiffusionGemmaPipeline: an encoder for what is written, a decoder for a canvas without mask token."""

    def watched(self) -> list[tuple[nn.Module, See]]:
        """Watch the encoder, which the pipeline calls by itself, and the model, which calls the decoder."""
        return [(self.pipe.model.model.encoder, self._encode), (self.pipe.model, self._decode)]

    def wrapped(self) -> Iterable[tuple[Any, str, After]]:
        """See the pipeline's arguments, and what the scheduler accepts."""
        yield self.pipe, "check_inputs", self.called
        yield self._scheduler, "step", self._stepped
        if hasattr(self._scheduler, "step_correct"):
            yield self._scheduler, "step_correct", self._corrected

    def called(self, arguments: dict[str, Any], result: Any) -> None:
        """Note the call, and how many of its steps are followed by corrector sweeps.

        Args:
            arguments: As in `Loop.called`.
            result: As in `Loop.called`.
        """
        super().called(arguments, result)
        self._sweeps = getattr(self._scheduler.config, "corrector_steps", 0)
        self._corrected_steps = (arguments["num_inference_steps"] - 1) // (1 + self._sweeps) if self._sweeps else 0
        self._sweep = 0
        self._phase = Phase.ENCODE

    def _room(self) -> int:
        canvases = -(-self.arguments["gen_length"] // self.pipe.model.config.canvas_length)
        return canvases * (self.arguments["num_inference_steps"] + 1)

    def _encode(self, ids: Tensor, kwargs: dict[str, Any]) -> None:
        if not self._open:
            self._begin(len(ids), ids.device)
            self._over = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
            real = kwargs["attention_mask"][:, -ids.shape[1] :].bool()
            states = torch.where(real, TokenState.PROMPT, TokenState.PAD)
        else:
            if self.eos_id is not None:
                self._over = self._over | (ids == self.eos_id).any(-1)
            states = torch.full_like(ids, TokenState.COMMITTED)
        self.block, self._turn = self.block + 1, 0
        self._committed = self._now = None
        self._phase = Phase.ENCODE
        self._tick(Slot(Phase.ENCODE, "cond", self.block), states, self._over, Compare.OFF)

    def _decode(self, ids: Tensor, kwargs: dict[str, Any]) -> None:
        if not self._open:
            self._begin(len(ids), ids.device)  # raises: the pipeline begins with its encoder
        compare = Compare.PREVIOUS
        if self._sweep:
            self._phase, self._sweep = Phase.CORRECT, self._sweep - 1
            step = self.step * self._sweeps + self._sweeps - 1 - self._sweep
        else:
            compare = Compare.PREVIOUS if self._turn else Compare.START
            self.step += 1
            self._phase, self._sweep = Phase.DENOISE, self._sweeps if self._turn < self._corrected_steps else 0
            self._turn, step = self._turn + 1, self.step
        random = self._phase is Phase.DENOISE and self._turn == 1  # as the canvas begins
        states = torch.full_like(
            ids, TokenState.MASKED if random or self._committed is not None else TokenState.UNKNOWN
        )
        if self._committed is not None:
            states = torch.where(self._committed, TokenState.COMMITTED, states)
            states = torch.where(self._now & self._committed, TokenState.COMMITTED_NOW, states)
        self._tick(Slot(self._phase, "cond", self.block, step), states, self._over, compare)

    def _stepped(self, arguments: dict[str, Any], result: Any) -> None:
        """Note what the scheduler accepted: block refinement keeps it, entropy bound decides anew at each step."""
        if self._phase is not Phase.DENOISE:
            raise UserError(*_LOST)
        self._edited = getattr(result, "editing_transfer_index", None)
        transferred, accepted = getattr(result, "transfer_index", None), getattr(result, "accepted_index", None)
        earlier = self._committed
        if transferred is not None:
            self._committed = transferred if earlier is None else earlier | transferred
            self._now = transferred if self._edited is None else transferred | self._edited
        elif accepted is not None:
            self._committed, self._now = accepted, accepted if earlier is None else accepted & ~earlier
        self._transferred = transferred

    def _corrected(self, arguments: dict[str, Any], result: Any) -> None:
        if self._phase is not Phase.CORRECT:
            raise UserError(*_LOST)

    def changes(
        self, canvas: Int[Tensor, "batch seq"] | None
    ) -> tuple[Bool[Tensor, "batch seq"] | None, Bool[Tensor, "batch seq"] | None]:
        """Return what the scheduler committed and edited, where it does.

        Args:
            canvas: Unused; tokens that are not committed change at random.
        """
        return self._transferred, self._edited


_FOREIGN = (
    "a forward pass of the pipeline's model that is not the pipeline's",
    "run it before or after pipeline_clock, or inside clock.paused()",
)
_LOST = (
    "the pipeline's corrector sweeps are not where this package expects them",
    "this version of diffusers is not supported with corrector_steps; set corrector_steps=0",
)
