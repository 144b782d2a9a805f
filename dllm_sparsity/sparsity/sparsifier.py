"""sparsify(): attach a rule to a model for one `with` block, and count what it does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from dllm_sparsity import registry
from dllm_sparsity.sparsity import fusing
from dllm_sparsity.sparsity.attachment import Attachment, make_metrics
from dllm_sparsity.sparsity.clock import Clock, FreeClock
from dllm_sparsity.sparsity.hooks import hook, one_token, run_once
from dllm_sparsity.sparsity.reading import Reading
from dllm_sparsity.sparsity.rule import Rule
from dllm_sparsity.sparsity.unit import Unit

if TYPE_CHECKING:
    from torch import Tensor

    from dllm_sparsity.sparsity.sites import Act, GatedForm

NO_CLOCK = "no clock: phase is forward, token state is unknown, padding is counted, overlap is off"


def sparsify(
    model: nn.Module,
    rule: Rule | None,
    sites: str | Sequence[str] = "intermediate",
    *,
    layers: Iterable[int] | None = None,
    clock: Clock | None = None,
    metrics: Sequence[str] = ("density", "overlap"),
) -> Tracker:
    """Attach a rule to a model's FFNs for one `with` block.

    Inside the block the activations that the rule does not keep are zero. On exit the model is what it was.

    Args:
        model: Any torch model with FFNs that a family knows; not compiled yet (compile inside the block).
        rule: What to keep; None only counts.
        sites: `input`, `gate`, `up`, `intermediate` or `all`, or several of them.
        layers: Layers to act on; all when None.
        clock: Says where each forward pass stands; without one, states and steps are not told apart.
        metrics: Names of the metrics to count; density is always among them.

    Returns:
        A context manager; `read()` gives the counts, `kernels` how many sites a kernel makes and how many are hooked.

    Raises:
        UserError: A site or layer does not exist, no FFN is found, or the model is compiled.

    Example:
        >>> with sparsify(model, TopP(0.9), sites="all") as tracker:  # doctest: +SKIP
        ...     model(input_ids)
        >>> tracker.read().sparsity(site="input")  # doctest: +SKIP
    """
    return Tracker(model, rule, sites, layers, clock, metrics)


class Tracker(Attachment):
    """A rule attached to a model, and its counters. Made by `sparsify`."""

    def __init__(
        self,
        model: nn.Module,
        rule: Rule | None,
        sites: str | Sequence[str],
        layers: Iterable[int] | None,
        clock: Clock | None,
        metrics: Sequence[str],
    ) -> None:
        super().__init__(model, sites, layers)
        self.rule, self.clock = rule, clock if clock is not None else FreeClock()
        self.notes = [] if clock is not None else [NO_CLOCK]
        unit = Unit(self._points, rule, self.clock, make_metrics(metrics, clock is not None))
        self.units, self.ledger, self._actions = [unit], unit.ledger, unit.actions
        self.kernels: dict[str, int] = {}

    def read(self) -> Reading:
        """Return everything counted so far.

        Raises:
            NonFiniteError: An activation was NaN or infinite.
        """
        return self.units[0].read(self.notes)

    def take(self) -> Reading:
        """Return what was counted since the last take and forget it, so that the takes of a run add up to its counts.

        Raises:
            NonFiniteError: An activation was NaN or infinite.
        """
        return self.units[0].take(self.notes)

    def _apply(self, number: int) -> Act:
        return self._actions[number]

    def _attach(self) -> None:
        """Attach every point: by a kernel that makes its rows where the form is known, else by a hook."""
        fuses = self.ledger.fusable and all(action.fuses for action in self._actions)
        for ffn in self.ffns if fuses else ():
            numbers = {site: n for n, (other, site) in enumerate(self._points) if other is ffn}
            undo = fusing.take_over(ffn, {site: self._act(number) for site, number in numbers.items()})
            self._undo |= {numbers[site]: function for site, function in undo.items()}
        self._taken = set(self._undo)
        super()._attach()

    def _settle(self) -> None:
        """Give back the norms whose output goes elsewhere too: with a rule the model's output would not be the same.

        Where the model could not be run, all is given back: nothing else says where a module's output goes.
        """
        norms = [number for number in self._taken if self._points[number][1] == "input"]
        ids = one_token(self.model)
        if not self.checked:
            self._give_back(list(self._taken))
        elif norms and ids is not None:
            fused_output = self._probe_output(norms, ids)
            self._give_back(norms)
            if fused_output is not None and torch.equal(fused_output, cast("Tensor", self._probe_output(norms, ids))):
                for number in norms:
                    self._undo.pop(number)()
                    form = cast("GatedForm", self._points[number][0].form)
                    self._undo[number] = fusing.take_over_norm(cast("nn.Module", form.norm), self._act(number))
                self._taken |= set(norms)
            else:
                self.notes.append("input: the norm beside the FFN does not feed the FFN alone; a hook is used instead")
        made, gpu = len(self._taken), [ffn.device_of.is_cuda for ffn in self.ffns]
        left = len([site for _, site in self._points if site in ("input", "intermediate")]) - made
        if all(gpu) and left > 0:
            self.notes.append(
                f"{left} sites are hooked, not made by the kernel: the rule, the metrics, a width above 16,384, "
                "training mode or the modules' form stand against it"
            )
        self.kernels = {"made by the kernel": made, "hooked": len(self._points) - made}

    def _give_back(self, numbers: list[int]) -> None:
        for number in numbers:
            ffn, site = self._points[number]
            self._undo.pop(number)()
            self._undo[number] = hook(ffn.points[site], self._act(number))
        self._taken -= set(numbers)

    def _probe_output(self, norms: list[int], ids: Tensor) -> Tensor | None:
        """Run the model with a strong rule on the inputs, and none elsewhere."""
        before = [action.rule for action in self._actions]
        for number, action in enumerate(self._actions):
            action.use(registry.get("rules", "top_k")(0.3) if number in norms else None)
        self._trying = True
        try:
            with self.clock.paused(), torch.no_grad(), torch.random.fork_rng(devices=[]):
                return run_once(self.model, ids)
        finally:
            self._trying = False
            for action, rule in zip(self._actions, before, strict=True):
                action.use(rule)
