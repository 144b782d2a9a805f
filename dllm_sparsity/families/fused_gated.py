"""fused_gated: a gated FFN whose gate and up projections are one linear: Phi3, GLM4, ModernBERT and their like."""

from __future__ import annotations

from torch import nn

from dllm_sparsity.families import Family, any_parameter, linear_shape, linear_weight
from dllm_sparsity.families.gated import _ACTIVATIONS
from dllm_sparsity.sparsity.sites import FFN, SitePoint

_NAMES = (("gate_up_proj", "down_proj"), ("Wi", "Wo"))


class FusedGated(Family):
    """A module with a linear of twice the FFN width, whose first half is activated, and a down projection."""

    @classmethod
    def match(cls, name: str, layer: int, module: nn.Module) -> FFN | None:
        """Return the FFN that a module is, or None.

        Args:
            name: As in `Family.match`.
            layer: As in `Family.match`.
            module: As in `Family.match`.
        """
        children = dict(module.named_children())
        for fused_name, down_name in _NAMES:
            fused, down = children.get(fused_name), children.get(down_name)
            outer, inner = linear_shape(fused), linear_shape(down)
            if fused is None or down is None or outer is None or inner is None or outer[1] != 2 * inner[0]:
                continue
            d_model, d_ffn = outer[0], inner[0]
            weight = linear_weight(fused)
            points = {"input": SitePoint(fused, "input", d_model, weight=weight)}
            missing = {}
            activation = next((children[key] for key in _ACTIVATIONS if key in children), None)
            if activation is None:
                missing["gate"] = "its activation is a function, not a module that can be hooked"
            else:
                points["gate"] = SitePoint(activation, "output", d_ffn)
            points["up"] = SitePoint(fused, "output", d_ffn, start=d_ffn)
            points["intermediate"] = SitePoint(down, "input", d_ffn, weight=linear_weight(down))
            return FFN(layer, name, points, d_model, d_ffn, True, any_parameter(down), missing)
        return None
