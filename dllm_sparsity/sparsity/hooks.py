"""How a model is hooked and run for a moment: small steps that know nothing of rules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from dllm_sparsity.sparsity.sites import Act, SitePoint


def is_compiled(model: nn.Module) -> bool:
    """Return whether torch.compile was applied to the model or a part of it, so that new hooks would not fire.

    Args:
        model: Any torch model.
    """
    return any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in model.modules())


def hook(point: SitePoint, act: Act) -> Callable[[], None]:
    """Hook one point and return what removes the hook.

    Args:
        point: Where.
        act: Takes the site's tensor and gives what goes on.
    """
    if point.attach is not None:
        return point.attach(act)
    if point.side == "output":
        return point.module.register_forward_hook(lambda module, args, output: act(output)).remove

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        if args:
            return (act(args[0]), *args[1:]), kwargs
        name = next(name for name, value in kwargs.items() if isinstance(value, torch.Tensor))
        return args, {**kwargs, name: act(kwargs[name])}

    return point.module.register_forward_pre_hook(before, with_kwargs=True).remove


def runs_on(module: nn.Module) -> torch.device | None:
    """Return the device that accelerate runs a module on, which may not be where its weights are kept; else None.

    Args:
        module: A module, perhaps of a model that accelerate spread over devices.
    """
    for part in module.modules():
        one = getattr(part, "_hf_hook", None)
        for each in (one, *getattr(one, "hooks", ())):
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return None


def run_once(model: nn.Module, ids: Tensor) -> Tensor | None:
    """Run the model on some token ids and return its logits or last hidden states, if it has such.

    Args:
        model: A model that takes `input_ids`.
        ids: Token ids, `[batch, seq]`.
    """
    accepts = inspect.signature(model.forward).parameters
    output = model(input_ids=ids, **({"use_cache": False} if "use_cache" in accepts else {}))
    found = [output, getattr(output, "logits", None), getattr(output, "last_hidden_state", None)]
    return next((value for value in found if isinstance(value, torch.Tensor)), None)


def one_token(model: nn.Module) -> Tensor | None:
    """Return one token id where the model takes token ids, else None.

    Args:
        model: Any torch model.
    """
    parameters = inspect.signature(model.forward).parameters
    find: Any = getattr(model, "get_input_embeddings", None)
    embedding = find() if find is not None else None
    weight = getattr(embedding, "weight", None)
    if "input_ids" not in parameters or embedding is None or not isinstance(weight, torch.Tensor):
        return None
    return torch.zeros(1, 1, dtype=torch.long, device=runs_on(embedding) or weight.device)
