"""Kernels that take over from the modules which make a site's rows, so that the rule costs no pass of its own.

Nothing is known by name: a form is taken over only where the kernel gives the module's own bits. Activations of 16 bits
are tried at every value there is, everything else on random rows.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from dllm_sparsity.sparsity.kernels import fused
from dllm_sparsity.sparsity.kernels.fused import Producer
from dllm_sparsity.sparsity.sites import Act, GatedForm

if TYPE_CHECKING:
    from torch import Tensor

    from dllm_sparsity.sparsity.sites import FFN

_ROWS = 64  # random rows that a form must agree on
_MULTIPLIED = ("silu_mul", "gelu_tanh_mul", "gelu_mul")


def make(rows: Tensor, producer: Producer | None = None) -> Tensor:
    """Return the rows that a producer makes, no rule applied; rows that nothing makes stay as they are.

    Args:
        rows: What the producer starts from, `[rows, width]`.
        producer: What makes them.
    """
    return rows if producer is None else fused.launch(rows, producer=producer)


def gate_producer(form: GatedForm) -> str | None:
    """Return the producer that equals activation(gate) * up and the module's whole forward pass bit for bit, or None.

    Args:
        form: A gated FFN.
    """
    if _watched(form.activation, form.module) or _watched(form.down):
        return None
    weight = next(form.down.parameters(), None)
    hidden, width = getattr(form.gate, "in_features", 0), getattr(form.down, "in_features", 0)
    if weight is None or not hidden or not width or not _possible(weight, width):
        return None
    with torch.no_grad(), _chance(weight):
        gate = _every_value(weight.dtype, width, weight.device)
        up = torch.randn(len(gate), width, dtype=weight.dtype, device=weight.device) * 3
        wanted = form.activation(gate) * up
        for kind in _MULTIPLIED:
            if torch.equal(fused.launch(gate, producer=Producer(kind, up)), wanted):
                x = torch.randn(1, _ROWS, hidden, device=weight.device)
                x[:, ::3] *= 100  # where a module clamps, it shows
                x = x.to(weight.dtype)
                ours = form.down(_gated(form, x, kind, make))
                return kind if torch.equal(ours.nan_to_num(), form.module(x).nan_to_num()) else None
    return None


def norm_producer(form: GatedForm, width: int) -> bool:
    """Return whether the norm before a gated FFN is an RMSNorm that the kernel equals bit for bit.

    Args:
        form: A gated FFN.
        width: Entries of its input.
    """
    norm = form.norm
    weight = getattr(norm, "weight", None)
    if norm is None or not isinstance(weight, torch.Tensor) or _watched(norm, form.module):
        return False
    if len(list(norm.parameters())) != 1:  # a bias that is zero as yet would not show
        return False
    if weight.shape != (width,) or _eps(norm) is None or not _possible(weight, width):
        return False
    with torch.no_grad(), _chance(weight):
        x = torch.randn(1, _ROWS, width, dtype=weight.dtype, device=weight.device)
        return torch.equal(_normed(norm, x, make), norm(x))


def take_over(ffn: FFN, acts: dict[str, Act]) -> dict[str, Callable[[], None]]:
    """Let kernels make and sparsify what they can of a layer's sites.

    Args:
        ffn: The layer.
        acts: Site -> what takes its rows and a producer and gives the rows after the rule.

    Returns:
        Site -> what undoes it, for the sites taken over.
    """
    form, undo = ffn.form, {}
    if form is None:
        return undo
    try:
        norm = "input" in acts and norm_producer(form, ffn.d_model)
        kind = gate_producer(form) if "intermediate" in acts and not {"gate", "up"} & acts.keys() else None
    except Exception:  # a module that takes or gives something else is not of the known form
        return undo
    if norm:
        undo["input"] = take_over_norm(cast("nn.Module", form.norm), acts["input"])
    if kind:
        undo["intermediate"] = take_over_gate(form, kind, acts["intermediate"])
    return undo


def take_over_gate(form: GatedForm, kind: str, act: Act) -> Callable[[], None]:
    """Let the kernel make and sparsify `intermediate`; returns what undoes it.

    Args:
        form: A gated FFN.
        kind: From `gate_producer`.
        act: Takes the gate's rows and a producer, gives the rows after the rule.
    """
    own = {id(child): name for name, child in form.module.named_children()}
    names = [own.get(id(part)) for part in (form.gate, form.up, form.activation, form.down)]

    def forward(self: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())
        mine = form if self is form.module else GatedForm(self, *(self.get_submodule(str(name)) for name in names))
        return mine.down(_gated(mine, x, kind, act))

    return _replace_forward(form.module, forward)


def take_over_norm(norm: nn.Module, act: Act) -> Callable[[], None]:
    """Let the kernel make and sparsify `input`; returns what undoes it.

    Args:
        norm: An RMSNorm that `norm_producer` accepted.
        act: As in `take_over_gate`.
    """

    def forward(self: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())
        return _normed(self, x, act)

    return _replace_forward(norm, forward)


def _gated(form: GatedForm, x: Tensor, kind: str, act: Act) -> Tensor:
    gate, up = form.gate(x), form.up(x)
    needs_grad = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    if needs_grad or form.activation._forward_hooks or form.activation._forward_pre_hooks:
        return act(form.activation(gate) * up, None)
    return act(gate.flatten(0, -2), Producer(kind, up.flatten(0, -2))).view(gate.shape)


def _normed(norm: nn.Module, x: Tensor, act: Act) -> Tensor:
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or norm.weight.requires_grad)
    if needs_grad or x.dtype != norm.weight.dtype:
        return act(type(norm).forward(norm, x), None)
    square = x.float().pow(2).mean(-1)  # torch's own sum, whose order a kernel could not copy
    producer = Producer("rms_norm", square.flatten(), cast("Tensor", norm.weight), _eps(norm) or 0.0)
    return act(x.flatten(0, -2), producer).view(x.shape)


def _eps(norm: nn.Module | None) -> float | None:
    value = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return value if isinstance(value, float) else None


def _every_value(dtype: torch.dtype, width: int, device: torch.device) -> Tensor:
    """Return rows that hold every finite value of a 16-bit type, or random ones of a wider type."""
    if dtype.itemsize != 2:
        return torch.randn(_ROWS, width, dtype=dtype, device=device) * 3
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=device).to(torch.int16).view(dtype)
    values = torch.where(values.isfinite(), values, 0)
    return torch.nn.functional.pad(values, (0, -len(values) % width)).view(-1, width)


def _possible(weight: Tensor, width: int) -> bool:
    row = torch.empty(1, width, dtype=weight.dtype, device=weight.device)
    return weight.is_floating_point() and fused.makes(row)


def _watched(*modules: nn.Module) -> bool:
    """Return whether someone else hooks one of the modules, or replaced its forward pass."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) or module.training
        for module in modules
    )


def _chance(weight: Tensor) -> torch.random.fork_rng:  # type: ignore[valid-type]
    """Leave the random state as it was."""
    devices = [weight.device] if weight.is_cuda else []
    return torch.random.fork_rng(devices=devices)


def _replace_forward(module: nn.Module, forward: Callable) -> Callable[[], None]:
    module.forward = MethodType(forward, module)  # a copy of the module runs itself, not the original

    def undo() -> None:
        del module.forward

    return undo
