"""plain: down(act(up(x))) without a gate: GPT-2, GPT-NeoX, OPT, BERT and their like."""

from __future__ import annotations

from torch import nn

from dllm_sparsity.families import Family, any_parameter, linear_shape, linear_weight
from dllm_sparsity.sparsity.sites import FFN, SitePoint

_PAIRS = (
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("fc_in", "fc_out"),
    ("intermediate.dense", "output.dense"),
    ("up_proj", "down_proj"),
    ("wi", "wo"),
    ("0", "2"),
)
_NO_GATE = "a plain FFN has no gate"


class Plain(Family):
    """A module with a linear from D to F and one from F back to D, below known pairs of names."""

    @classmethod
    def match(cls, name: str, layer: int, module: nn.Module) -> FFN | None:
        """Return the FFN that a module holds, or None.

        Args:
            name: As in `Family.match`.
            layer: As in `Family.match`.
            module: As in `Family.match`.
        """
        for up_name, down_name in _PAIRS:
            up, down = _child(module, up_name), _child(module, down_name)
            outer, inner = linear_shape(up), linear_shape(down)
            if up is None or down is None or outer is None or inner is None:
                continue
            if outer != inner[::-1] or (up_name == "0" and len(list(module.children())) != 3):
                continue
            if any(hasattr(module, gate) for gate in ("gate_proj", "ff_proj")):
                return None
            points = {
                "input": SitePoint(up, "input", outer[0], weight=linear_weight(up)),
                "intermediate": SitePoint(down, "input", inner[0], weight=linear_weight(down)),
            }
            missing = {"gate": _NO_GATE, "up": "its up projection feeds the activation, so it is part of intermediate"}
            return FFN(layer, name, points, outer[0], inner[0], False, any_parameter(down), missing)
        return None


def _child(module: nn.Module, path: str) -> nn.Module | None:
    for part in path.split("."):
        module = module._modules.get(part)
        if module is None:
            return None
    return module
