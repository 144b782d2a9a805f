"""llada: a gated FFN spread over a transformer block, as LLaDA's remote code has it."""

from __future__ import annotations

from torch import nn

from dllm_sparsity.families import Family
from dllm_sparsity.families.gated import gated_ffn
from dllm_sparsity.sparsity.sites import FFN


class Llada(Family):
    """A block with ff_norm, ff_proj (the gate), up_proj and ff_out; the norm's output is the input of gate and up."""

    @classmethod
    def match(cls, name: str, layer: int, module: nn.Module) -> FFN | None:
        """Return the FFN that a module holds, or None.

        Args:
            name: As in `Family.match`.
            layer: As in `Family.match`.
            module: As in `Family.match`.
        """
        children = dict(module.named_children())
        if not {"ff_norm", "ff_proj", "up_proj", "ff_out"} <= children.keys():
            return None
        gate, up, down = children["ff_proj"], children["up_proj"], children["ff_out"]
        return gated_ffn(name, layer, gate, up, down, children, (children["ff_norm"], "output"))
