"""sparsify(): attach a rule to a model for one `with` block, and count what it does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from dllm_sparsity import registry
from dllm_sparsity.errors import UserError
from dllm_sparsity.sparsity import fusing
from dllm_sparsity.sparsity import sites as site_names
from dllm_sparsity.sparsity.action import Action
from dllm_sparsity.sparsity.clock import Clock, FreeClock
from dllm_sparsity.sparsity.hooks import hook, is_compiled, one_token, run_once
from dllm_sparsity.sparsity.ledger import Ledger, Point
from dllm_sparsity.sparsity.reading import Reading
from dllm_sparsity.sparsity.rule import Rule, acting

if TYPE_CHECKING:
    from torch import Tensor

    from dllm_sparsity.sparsity.kernels.fused import Producer
    from dllm_sparsity.sparsity.sites import FFN, GatedForm, Routed

_PROBES: dict[int, Tracker] = {}  # thread -> the tracker whose dry run it is in; all other trackers hold still
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


class Tracker:
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
        if rule is not None and not isinstance(rule, Rule):
            raise UserError(f"{rule!r} is not a rule", "give one such as TopP(0.9), or None to count only")
        if is_compiled(model):
            raise UserError(
                "the model is compiled already, so hooks would not fire", "sparsify first, then torch.compile"
            )
        self.model, self.rule = model, rule
        self.sites = site_names.expand(sites)
        self.clock = clock if clock is not None else FreeClock()
        self.notes = [] if clock is not None else [NO_CLOCK]
        self.ffns = site_names.choose(_find(model), self.sites, layers)
        asked = [metrics] if isinstance(metrics, str) else metrics
        kinds = [registry.get("metrics", name) for name in dict.fromkeys(("density", *asked))]
        usable = [kind() for kind in kinds if clock is not None or not kind.needs_clock]
        self._points = [(ffn, site) for ffn in self.ffns for site in self.sites]
        self.ledger = Ledger(
            [Point(ffn.layer, site, ffn.device_of, ffn.points[site].width, ffn.experts) for ffn, site in self._points],
            usable,
        )
        self._actions = [
            Action(number, ffn, site, ffn.points[site], acting(rule, ffn.layer), self.clock, self.ledger)
            for number, (ffn, site) in enumerate(self._points)
        ]
        self._undo: dict[int, Callable[[], None]] = {}  # point -> what detaches it
        self.kernels: dict[str, int] = {}
        self._fired: set[int] = set()
        self.checked = self._trying = False

    def __enter__(self) -> Tracker:
        if self._undo:
            raise UserError("this tracker is attached already", "make a new one with sparsify()")
        thread = threading.get_ident()
        outer, _PROBES[thread] = _PROBES.get(thread), self  # whatever runs the model here, other trackers hold still
        try:
            self._attach()
            self._dry_run()
            self._check_norms()
            self._listen()
        except BaseException:
            self._detach()
            raise
        finally:
            del _PROBES[thread]
            if outer is not None:
                _PROBES[thread] = outer
        return self

    def _listen(self) -> None:
        """Let the clock drive the ledger."""
        self.ledger.by_row = all(action.rule is None or action.rule.by_row for action in self._actions)
        if self.clock.items and not isinstance(self.clock, FreeClock):  # a request batch is open already
            self.ledger.begin(self.clock)
            self.ledger.tick(self.clock)
        self.clock.listeners.append(self.ledger)
        if isinstance(self.clock, FreeClock):
            self.clock.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._detach()
        if self.ledger in self.clock.listeners:
            if kind is None:
                self.ledger.flush(self.clock)  # a request batch that is still open counts so far
            self.clock.listeners.remove(self.ledger)
        if kind is None:
            self.check("in the block")

    def read(self) -> Reading:
        """Return everything counted so far.

        Raises:
            NonFiniteError: An activation was NaN or infinite.
        """
        if self.ledger in self.clock.listeners:
            self.ledger.flush(self.clock)
        return self.ledger.read([*self.notes, *self.clock.notes])

    def take(self) -> Reading:
        """Return what was counted since the last take and forget it, so that the takes of a run add up to its counts.

        Raises:
            NonFiniteError: An activation was NaN or infinite.
        """
        if self.ledger in self.clock.listeners:
            self.ledger.flush(self.clock)
        return self.ledger.take([*self.notes, *self.clock.notes])

    def _detach(self) -> None:
        for undo in self._undo.values():
            undo()
        self._undo = {}

    def _attach(self) -> None:
        """Attach every point: by a kernel that makes its rows where the form is known, else by a hook."""
        acts = [self._act(number) for number in range(len(self._points))]
        fuses = self.ledger.fusable and all(action.fuses for action in self._actions)
        for ffn in self.ffns if fuses else ():
            numbers = {site: n for n, (other, site) in enumerate(self._points) if other is ffn}
            undo = fusing.take_over(ffn, {site: acts[number] for site, number in numbers.items()})
            self._undo |= {numbers[site]: function for site, function in undo.items()}
        self._taken = set(self._undo)
        for number, (ffn, site) in enumerate(self._points):
            if number not in self._undo:
                self._undo[number] = hook(ffn.points[site], acts[number])

    def _act(self, number: int) -> site_names.Act:
        action = self._actions[number]

        def act(tensor: Tensor, producer: Producer | None = None, routed: Routed | None = None) -> Tensor:
            if _PROBES and (probe := _PROBES.get(threading.get_ident())) is not None:
                if probe is self:
                    self._fired.add(number)
                if probe is not self or not self._trying:
                    return fusing.make(tensor, producer)
                return action(tensor, producer, routed)
            if not self._undo:  # a copy of the model that was made inside the block still has the hooks
                return fusing.make(tensor, producer)
            self._fired.add(number)
            return action(tensor, producer, routed)

        return act

    def _check_norms(self) -> None:
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


def _find(model: nn.Module) -> list[FFN]:
    """Return the model's FFNs; families are reached through the registry, they stand on a higher floor."""
    return registry.load("dllm_sparsity.families:find_ffns")(model)
