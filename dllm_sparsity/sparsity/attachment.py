"""What holds on to the sites of a model for one `with` block, and makes sure that each of them acts."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import nn

from dllm_sparsity import registry
from dllm_sparsity.errors import UserError
from dllm_sparsity.sparsity import fusing
from dllm_sparsity.sparsity import sites as site_names
from dllm_sparsity.sparsity.clock import Clock
from dllm_sparsity.sparsity.hooks import hook, is_compiled, one_token, run_once

if TYPE_CHECKING:
    from torch import Tensor

    from dllm_sparsity.sparsity.kernels.fused import Producer
    from dllm_sparsity.sparsity.metric import Metric
    from dllm_sparsity.sparsity.sites import FFN, Routed
    from dllm_sparsity.sparsity.unit import Unit

_PROBES: dict[int, Attachment] = {}  # thread -> what is in its dry run there; all others hold still


class Attachment(ABC):
    """Hooks on the chosen layers and sites of a model, and the units that they serve.

    Args:
        model: Any torch model with FFNs that a family knows; not compiled yet.
        sites: As in `sparsify`.
        layers: Layers to act on; all when None.

    Raises:
        UserError: A site or layer does not exist, no FFN is found, or the model is compiled.
    """

    clock: Clock
    units: list[Unit]

    def __init__(self, model: nn.Module, sites: str | Sequence[str], layers: Iterable[int] | None) -> None:
        if is_compiled(model):
            raise UserError(
                "the model is compiled already, so hooks would not fire", "sparsify first, then torch.compile"
            )
        self.model = model
        self.sites = site_names.expand(sites)
        self.ffns = site_names.choose(_find(model), self.sites, layers)
        self.notes: list[str] = []
        self._points = [(ffn, site) for ffn in self.ffns for site in self.sites]
        self._undo: dict[int, Callable[[], None]] = {}  # point -> what detaches it
        self._fired: set[int] = set()
        self.checked = self._trying = False

    @abstractmethod
    def _apply(self, number: int) -> site_names.Act:
        """Return what works on the tensor of a point."""

    def _settle(self) -> None:  # noqa: B027 - most have nothing to change
        """Change how points are reached, by what the dry run showed."""

    def __enter__(self) -> Self:
        if self._undo:
            raise UserError("this tracker is attached already", "make a new one with sparsify()")
        thread = threading.get_ident()
        outer, _PROBES[thread] = _PROBES.get(thread), self  # whatever runs the model here, other trackers hold still
        try:
            self._attach()
            self._dry_run()
            self._settle()
            for unit in self.units:
                unit.listen()
        except BaseException:
            self._detach()
            raise
        finally:
            del _PROBES[thread]
            if outer is not None:
                _PROBES[thread] = outer
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._detach()
        for unit in self.units:
            unit.leave(keep=kind is None)
        if kind is None:
            self.check("in the block")

    def _detach(self) -> None:
        for undo in self._undo.values():
            undo()
        self._undo = {}

    def _attach(self) -> None:
        """Hook every point that is not reached yet."""
        for number, (ffn, site) in enumerate(self._points):
            if number not in self._undo:
                self._undo[number] = hook(ffn.points[site], self._act(number))

    def _act(self, number: int) -> site_names.Act:
        apply = self._apply(number)

        def act(tensor: Tensor, producer: Producer | None = None, routed: Routed | None = None) -> Tensor:
            if _PROBES and (probe := _PROBES.get(threading.get_ident())) is not None:
                if probe is self:
                    self._fired.add(number)
                if probe is not self or not self._trying:
                    return fusing.make(tensor, producer)
                return apply(tensor, producer, routed)
            if not self._undo:  # a copy of the model that was made inside the block still has the hooks
                return fusing.make(tensor, producer)
            self._fired.add(number)
            return apply(tensor, producer, routed)

        return act

    def _dry_run(self) -> None:
        """Run one token through the model; every point must fire."""
        ids = one_token(self.model)
        if ids is None:
            return
        try:
            with self.clock.paused(), torch.no_grad(), torch.random.fork_rng(devices=[]):
                run_once(self.model, ids)
        except Exception as error:  # foreign models refuse one token in ways of their own
            self.notes.append(f"no dry run ({type(error).__name__}): sites are checked when the block ends")
            self._fired.clear()
            return
        self.check("in a dry run")

    def check(self, where: str) -> None:
        """Make sure that every site acted on every layer; nothing more to do once they all did.

        Args:
            where: For the message.

        Raises:
            UserError: Some never fired.
        """
        dead = [f"layer {ffn.layer} {site}" for n, (ffn, site) in enumerate(self._points) if n not in self._fired]
        if dead:
            shown = ", ".join(dead[:4]) + (f" and {len(dead) - 4} more" if len(dead) > 4 else "")
            raise UserError(
                f"these sites never fired {where}: {shown}",
                "a fused kernel or a changed forward may bypass the module; turn it off, or choose other sites",
            )
        self.checked = True


def make_metrics(names: str | Sequence[str], has_clock: bool) -> list[Metric]:
    """Return new metrics by name; density is always among them.

    Args:
        names: The names.
        has_clock: Whether a loop drives a clock; what needs one is left out otherwise.

    Raises:
        UserError: There is no such metric.
    """
    asked = [names] if isinstance(names, str) else names
    kinds = [registry.get("metrics", name) for name in dict.fromkeys(("density", *asked))]
    return [kind() for kind in kinds if has_clock or not kind.needs_clock]


def _find(model: nn.Module) -> list[FFN]:
    """Return the model's FFNs; families are reached through the registry, they stand on a higher floor."""
    return registry.load("dllm_sparsity.families:find_ffns")(model)
