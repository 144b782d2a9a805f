"""Families: one FFN form a file, found by structure and never by a list of model names."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor, nn

from dllm_sparsity import registry
from dllm_sparsity.errors import UserError
from dllm_sparsity.sparsity.hooks import runs_on
from dllm_sparsity.sparsity.sites import FFN

_NOT_THE_LM = re.compile(
    r"vision|visual|audio|self_conditioning|sigma_map|time_?step|adaln|router|connector|multi_modal|lm_head",
    re.IGNORECASE,
)
_NORMS = ("pre_feedforward_layernorm", "ffn_norm", "post_attention_layernorm")
_PLAIN_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_BLOCK_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


class Family(ABC):
    """One form of FFN."""

    @classmethod
    @abstractmethod
    def match(cls, name: str, layer: int, module: nn.Module) -> FFN | None:
        """Return the FFN that a module is, or None.

        Args:
            name: Path of the module in the model.
            layer: Index of the numbered block that it stands in.
            module: The module.
        """


def find_ffns(model: nn.Module) -> list[FFN]:
    """Find every FFN of a model, in the order of its layers.

    Args:
        model: Any torch model.

    Raises:
        UserError: There is none, a layer has none of a known form, or layers share a module that would be hooked.
    """
    families = [registry.get("families", name) for name in registry.names("families")]
    found: list[FFN] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        number = _BLOCK_NUMBER.search(name)
        if number is None or _NOT_THE_LM.search(name) or name.startswith(tuple(inside)):
            continue
        ffn = next((hit for family in families if (hit := family.match(name, int(number[1]), module))), None)
        if ffn is not None:
            found.append(_with_norm(ffn, model))
            inside.append(f"{ffn.name}.")
    if not found:
        kind = type(model).__name__
        raise UserError(
            f"found no FFN in {kind}", f"known forms: {', '.join(registry.names('families'))}; a new one is one file"
        )
    _check_covered(found, model)
    return _numbered(_unshared(found))


def _check_covered(found: list[FFN], model: nn.Module) -> None:
    """Refuse a stack of layers of which some have no FFN that is known: a study would pass over them in silence."""
    stacks: dict[str, set[int]] = {}
    for ffn in found:
        stack, number = place(ffn)
        stacks.setdefault(stack, set()).add(number)
    for stack, layers in stacks.items():
        blocks = dict(model.get_submodule(stack).named_children())
        missing = sorted(int(key) for key in blocks if key.isdecimal() and int(key) not in layers)
        if missing and any(next(blocks[str(number)].parameters(), None) is not None for number in missing):
            raise UserError(
                f"layers {', '.join(map(str, missing))} of {stack or type(model).__name__} have no FFN of a known form",
                f"known forms: {', '.join(registry.names('families'))}; a new one is one file",
            )


def place(ffn: FFN) -> tuple[str, int]:
    """Return the path of the stack of blocks that an FFN stands in, and the number of its block there.

    Args:
        ffn: As a family found it.
    """
    number = _BLOCK_NUMBER.search(ffn.name)
    return ("", ffn.layer) if number is None else (ffn.name[: number.start()], int(number[1]))


def _with_norm(ffn: FFN, model: nn.Module) -> FFN:
    """Add the normalisation that stands before a gated FFN in its block, by the names in use."""
    if ffn.form is None:
        return ffn
    block = model.get_submodule(ffn.name.rpartition(".")[0])
    children = dict(block.named_children())
    norm = next((children[name] for name in _NORMS if name in children), None)
    return replace(ffn, form=replace(ffn.form, norm=norm))


def _unshared(found: list[FFN]) -> list[FFN]:
    seen: set[tuple[int, str]] = set()
    for ffn in found:
        for site, point in ffn.points.items():
            place = id(point.module), site if point.side == "inside" else point.side
            if place in seen:
                raise UserError(
                    f"{ffn.name} shares the module of its site {site} with another layer",
                    "counts of shared layers cannot be told apart; this model is not supported",
                )
            seen.add(place)
    return found


def _numbered(found: list[FFN]) -> list[FFN]:
    """Number layers through where two stacks, such as an encoder and a decoder, use the same numbers."""
    blocks = list(dict.fromkeys(place(ffn) for ffn in found))
    if len({number for _, number in blocks}) == len(blocks):
        return sorted(found, key=lambda ffn: ffn.layer)
    return [replace(ffn, layer=blocks.index(place(ffn))) for ffn in found]


def linear_shape(module: nn.Module | None) -> tuple[int, int] | None:
    """Return (input width, output width) of a linear layer, quantised and wrapped ones included, else None.

    Args:
        module: A module or None.
    """
    if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2's, with a transposed weight
        return module.weight.shape[0], module.nf
    return None


def linear_weight(module: nn.Module) -> Tensor | None:
    """Return the weight of a linear layer as `[out, in]`, or None where it is packed, quantised or elsewhere.

    Args:
        module: A linear layer.
    """
    weight = getattr(module, "weight", None)
    shape = linear_shape(module)
    if not isinstance(weight, Tensor) or shape is None or weight.is_meta or weight.dtype not in _PLAIN_TYPES:
        return None
    if tuple(weight.shape) == shape[::-1]:
        return weight.detach() if type(module).__name__ != "Conv1D" else weight.detach().T
    return weight.detach().T if tuple(weight.shape) == shape else None


def any_parameter(module: nn.Module) -> Tensor:
    """Return a tensor that tells on which device a module runs; an offloaded one runs elsewhere than it is kept.

    Args:
        module: A module with parameters or buffers.
    """
    parameter = next(iter([*module.parameters(), *module.buffers()]))
    device = runs_on(module)
    return parameter if device is None or device == parameter.device else torch.empty(0, device=device)
