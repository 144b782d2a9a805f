"""gated: down(up(x) * act(gate(x))) in a module of its own: Llama, Qwen2, Qwen3, Mistral, Gemma and their like."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from dllm_sparsity.families import Family, any_parameter, linear_shape, linear_weight
from dllm_sparsity.sparsity.sites import FFN, GatedForm, SitePoint

_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("wi_0", "wi_1", "wo"))
_ACTIVATIONS = ("act_fn", "activation_fn", "act")


class Gated(Family):
    """A module whose children are three linears, an activation, and nothing that mixes tokens."""

    @classmethod
    def match(cls, name: str, layer: int, module: nn.Module) -> FFN | None:
        """Return the FFN that a module is, or None.

        Args:
            name: As in `Family.match`.
            layer: As in `Family.match`.
            module: As in `Family.match`.
        """
        children = dict(module.named_children())
        for gate, up, down in _NAMES:
            if not {gate, up, down} <= children.keys():
                continue
            others = [child for key, child in children.items() if key not in (gate, up, down)]
            if any(next(child.parameters(), None) is not None for child in others):
                return None  # the FFN is part of a larger block: its input is not the module's
            ffn = gated_ffn(name, layer, children[gate], children[up], children[down], children, (module, "input"))
            activation = next((children[key] for key in _ACTIVATIONS if key in children), None)
            if ffn is None or activation is None:
                return ffn
            return replace(ffn, form=GatedForm(module, children[gate], children[up], activation, children[down]))
        return None


def gated_ffn(
    name: str,
    layer: int,
    gate: nn.Module,
    up: nn.Module,
    down: nn.Module,
    children: dict[str, nn.Module],
    source: tuple[nn.Module, str],
) -> FFN | None:
    """Describe a gated FFN with separate gate and up projections, or return None where the widths do not fit.

    Args:
        name: Path of the module.
        layer: Index of the layer.
        gate: The gate projection.
        up: The up projection.
        down: The down projection.
        children: Children among which the activation is looked for.
        source: Module and side where the shared input of gate and up appears.
    """
    shapes = [linear_shape(linear) for linear in (gate, up, down)]
    if None in shapes or shapes[0] != shapes[1] or shapes[2][0] != shapes[0][1]:
        return None
    d_model, d_ffn = shapes[0]
    module, side = source
    points = {"input": SitePoint(module, side, d_model, weight=linear_weight(gate))}
    missing = {}
    activation = next((children[key] for key in _ACTIVATIONS if key in children), None)
    if activation is None:
        missing["gate"] = "its activation is a function, not a module that can be hooked"
    else:
        points["gate"] = SitePoint(activation, "output", d_ffn)
    points["up"] = SitePoint(up, "output", d_ffn)
    points["intermediate"] = SitePoint(down, "input", d_ffn, weight=linear_weight(down))
    return FFN(layer, name, points, d_model, d_ffn, True, any_parameter(down), missing)
