"""experts: mixtures of experts whose weights are three-dimensional: Qwen3-MoE, OLMoE, Mixtral, GPT-OSS and their like.

No linear can be hooked there, so an experts implementation of our own is registered with transformers and chosen while
a tracker is attached. It routes with transformers' own matrix products and, with no rule, gives their bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from dllm_sparsity.errors import UserError
from dllm_sparsity.families import Family, any_parameter
from dllm_sparsity.sparsity.sites import FFN, Act, Routed, SitePoint

if TYPE_CHECKING:
    from torch import Tensor

NAME = "dllm_sparsity"
"""Name of the implementation among those of transformers."""
_OWN_GATE = "the experts of this model have a gate of their own form, which cannot be split"
_attached: WeakKeyDictionary[nn.Module, dict[str, list[Act]]] = WeakKeyDictionary()


@dataclass
class _Switched:
    """A configuration that names our implementation: what it named before, its product, and how many acts need ours."""

    config: Any
    own: str
    linear: Callable
    users: int = 0


_switched: dict[int, _Switched] = {}  # by the configuration's id: it cannot be hashed


class Experts(Family):
    """A module with `down_proj` of `[experts, ...]` and `gate_up_proj` or `up_proj` beside it."""

    @classmethod
    def match(cls, name: str, layer: int, module: nn.Module) -> FFN | None:
        """Return the expert layer that a module is, or None.

        Args:
            name: As in `Family.match`.
            layer: As in `Family.match`.
            module: As in `Family.match`.

        Raises:
            UserError: It has weights of experts, but not in the form of transformers 5.
        """
        down = module._parameters.get("down_proj")
        if down is None or down.dim() != 3:
            return None
        told = all(hasattr(module, key) for key in ("has_gate", "is_transposed", "has_bias", "num_experts"))
        if not told or down.itemsize < 2:
            raise UserError(
                f"{name} ({type(module).__name__}, {down.dtype}) holds experts in a form that is not covered",
                "covered are the experts of transformers 5 in float32, bfloat16 or float16; dequantise others",
            )
        d_ffn, d_model = down.shape[1:] if module.is_transposed else down.shape[:0:-1]
        points = {"input": _point(module, "input", d_model)}
        missing = {}
        if not module.has_gate:
            missing = dict.fromkeys(("gate", "up"), "these experts have no gate")
        elif _plain_gate(module):
            points |= {site: _point(module, site, d_ffn) for site in ("gate", "up")}
        else:
            missing = dict.fromkeys(("gate", "up"), _OWN_GATE)
        points["intermediate"] = _point(module, "intermediate", d_ffn)
        home, count = any_parameter(module), int(module.num_experts)
        return FFN(layer, name, points, d_model, d_ffn, module.has_gate, home, missing, experts=count)


def _point(module: nn.Module, site: str, width: int) -> SitePoint:
    return SitePoint(module, "inside", width, attach=partial(_attach, module, site))


def _plain_gate(module: Any) -> bool:
    """Return whether the gate is activation(first half) * second half."""
    from transformers.integrations import moe

    return type(module)._apply_gate is moe._default_apply_gate and getattr(module, "is_concatenated", True)


def _attach(module: Any, site: str, act: Act) -> Callable[[], None]:
    """Let an act work inside an experts module; what is returned puts everything back."""
    from transformers.integrations import moe

    if getattr(module, "_is_expert_parallel", False) or getattr(module, "_hf_device_mesh", None) is not None:
        raise UserError("experts spread over processes cannot be counted", "load the model without expert parallelism")
    config = module.config
    own = config._experts_implementation
    if id(config) not in _switched and own not in ("grouped_mm", "batched_mm"):
        raise UserError(
            f"experts run by {own!r}, inside of which nothing can be seen",
            'call model.set_experts_implementation("grouped_mm") first',
        )
    linear = moe._grouped_linear if own == "grouped_mm" else moe._batched_linear
    switched = _switched.get(id(config)) or _Switched(config, own, linear)
    moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    config._experts_implementation_internal = NAME
    _switched[id(config)] = switched
    switched.users += 1
    acts = _attached.setdefault(module, {}).setdefault(site, [])
    acts.append(act)

    def undo() -> None:
        acts.remove(act)
        switched.users -= 1
        if not switched.users:
            config._experts_implementation_internal = switched.own
            del _switched[id(config)]

    return undo


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute a layer of experts as transformers does, and let what is attached act on its sites.

    Args:
        self: An experts module of transformers.
        hidden_states: `[tokens, d_model]`.
        top_k_index: Experts of each token, `[tokens, k]`.
        top_k_weights: Their weights, `[tokens, k]`.

    Returns:
        `[tokens, d_model]`.

    Source: the interface of `transformers.integrations.moe`, whose implementation `grouped_mm` or `batched_mm` it
    equals bit for bit.
    """
    switched = _switched.get(id(self.config))
    if switched is None:  # of a copy that was made while a tracker was attached: nothing acts on it
        from transformers.integrations import moe

        return moe.ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
    tokens, k = top_k_index.shape
    grouped = switched.own == "grouped_mm"
    expert, weight = top_k_index.reshape(-1), top_k_weights.reshape(-1)
    order = torch.arange(len(expert), device=expert.device)
    if grouped:
        expert, order = torch.sort(expert)
        weight = weight[order]
        exact = expert.float() if expert.device.type == "cpu" else expert.int()  # what histc takes
        sizes = torch.histc(exact, bins=self.num_experts, min=0, max=self.num_experts - 1)
        ends = torch.cumsum(sizes, dim=0, dtype=torch.int32)
    routed = Routed(order // k, expert, tokens)

    def project(rows: Tensor, name: str) -> Tensor:
        matrix = getattr(self, name)
        bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
        if grouped:
            return switched.linear(rows, matrix, ends, bias=bias, is_transposed=self.is_transposed)
        return switched.linear(rows, matrix[expert], bias=bias, is_transposed=self.is_transposed)

    def at(site: str, rows: Tensor) -> Tensor:
        for act in _attached.get(self, {}).get(site, ()):
            rows = act(rows, routed=routed)
        return rows

    rows = project(at("input", hidden_states[routed.token]), "gate_up_proj" if self.has_gate else "up_proj")
    if not self.has_gate:
        rows = self.act_fn(rows)
    elif {"gate", "up"} & {site for site, acts in _attached.get(self, {}).items() if acts}:
        gate, up = rows.chunk(2, dim=-1)
        rows = at("gate", self.act_fn(gate)) * at("up", up)
    else:
        rows = self._apply_gate(rows)
    rows = project(at("intermediate", rows), "down_proj")
    if getattr(self, "has_post_expert_norm", False):
        rows = self.post_expert_norm(rows)
    rows = rows * weight.unsqueeze(-1)
    if grouped:
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        rows = rows[back]
    return rows.view(tokens, k, rows.shape[-1]).sum(dim=1).to(hidden_states.dtype)
