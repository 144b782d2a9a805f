"""An lm-eval LM that is one of several processes, and that can carry its own sparsity tracker."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from lm_eval.api.model import TemplateLM

from dllm_sparsity.errors import UserError
from dllm_sparsity.lm.distributed import Processes
from dllm_sparsity.lm.items import site_totals
from dllm_sparsity.sparsity.sparsifier import Tracker, sparsify

if TYPE_CHECKING:
    from torch import Tensor

    from dllm_sparsity.lm.call import ModelCall
    from dllm_sparsity.lm.items import ItemLog
    from dllm_sparsity.sparsity.clock import Clock
    from dllm_sparsity.sparsity.reading import Reading
    from dllm_sparsity.sparsity.rule import Rule


class SharedLM(TemplateLM):
    """What lm-eval asks of a model that runs in several processes, and a tracker that stays on between its calls."""

    model: Any
    call: ModelCall
    clock: Clock
    log: dict[Any, ItemLog]

    def __init__(self) -> None:
        super().__init__()
        self.processes = Processes()
        """Which share of the requests this process answers; set it before lm-eval runs."""
        self.tracker: Tracker | None = None

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.processes.rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.processes.size

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.call.device

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes, one behind the other.

        Args:
            tensor: A scalar or a tensor whose rows are joined.
        """
        if self.world_size == 1:
            return tensor
        from accelerate.utils import gather

        return cast("Tensor", gather(tensor))

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return what each process gave, on one of them; None on the others.

        Args:
            obj: Anything that can be pickled.
            dst: Who gets the list.
        """
        if self.world_size == 1:
            return [obj]
        values: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, values, dst=dst)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def attach(
        self,
        rule: Rule | None = None,
        sites: str | Sequence[str] = "all",
        *,
        layers: Iterable[int] | None = None,
        metrics: Sequence[str] = ("density", "overlap"),
    ) -> None:
        """Apply a rule to the model and count, until `detach`; for callers that cannot hold a `with` block open.

        Args:
            rule: What to keep; None only counts.
            sites: As in `sparsify`.
            layers: Layers to act on; all when None.
            metrics: Names of the metrics to count.

        Raises:
            UserError: One is attached already, or as in `sparsify`.
        """
        if self.tracker is not None:
            raise UserError("this LM has a rule attached already", "detach it first")
        tracker = sparsify(self.model, rule, sites, layers=layers, clock=self.clock, metrics=metrics)
        self.tracker = tracker.__enter__()

    def detach(self) -> None:
        """Give the model back as it was; what was counted is gone with the tracker."""
        tracker, self.tracker = self.tracker, None
        if tracker is not None:
            tracker.__exit__(*sys.exc_info())  # on the way out of an error it checks nothing more

    def read(self) -> Reading:
        """Return what was counted since `attach`, over all processes; all must call it.

        Raises:
            UserError: Nothing is attached.
            NonFiniteError: An activation was NaN or infinite.
        """
        if self.tracker is None:
            raise UserError("nothing is attached to this LM", "call attach() first, or use sparsify() yourself")
        return self.processes.merge(self.tracker.read())

    def read_log(self) -> dict[Any, ItemLog]:
        """Return what is known about each item, over all processes; all must call it."""
        return {item: entry for log in self.processes.gather(self.log) for item, entry in log.items()}

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes into its results beside the arguments, on the first process alone.

        The sparsity is among it where this process is the only one; else `read` has it.
        """
        info: dict[str, Any] = {
            "model_num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "model_dtype": str(getattr(self.model, "dtype", "")),
            "model_device": str(self.device),
            "processes": self.world_size,
        }
        if self.tracker is not None and self.world_size == 1:
            info["sparsity"] = site_totals(self.tracker.read().per_item)
        return info
