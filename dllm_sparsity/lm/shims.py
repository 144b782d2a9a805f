"""Let trusted remote code written for transformers 4 load on transformers 5; names are only added, never changed.

What was done is said: it is logged, and the loaded model carries it as `shims`.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from torch import Tensor

_LOG = logging.getLogger(__name__)


@contextmanager
def remote_code(model: str, config: Any, auto_class: str, keys: dict[str, Any]) -> Iterator[list[str]]:
    """Wrap `from_pretrained` of a model that comes with its own code. Does nothing for models of transformers.

    Yields what was done, one line each.

    Args:
        model: Hub id or folder.
        config: Its configuration, completed in place.
        auto_class: Key of the model's class in `config.auto_map`.
        keys: Revision and trust, as given to `from_pretrained`.
    """
    remote = getattr(config, "auto_map", None) or {}
    if auto_class not in remote or not keys.get("trust_remote_code"):
        yield []
        return
    done = [*_complete(config), *_add_names()]
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    cls = get_class_from_dynamic_module(remote[auto_class], model, revision=keys.get("revision"))
    done += _accept_new_calls(cls)
    for line in done:
        _LOG.warning("remote code of %s: %s", model, line)
    with _real_buffers(cls):
        yield done


def _complete(config: Any) -> list[str]:
    """Give a configuration the fields that transformers 5 no longer fills in."""
    done = []
    for name, value in (("use_cache", False), ("pad_token_id", None), ("tie_word_embeddings", False)):
        if not hasattr(config, name):
            setattr(config, name, value)
            done.append(f"config.{name} was missing and is {value}")
    if getattr(config, "init_device", None) not in (None, "cpu"):
        done.append(f"config.init_device {config.init_device!r} is 'cpu' while it loads")
        config.init_device = "cpu"  # LLaDA would build itself on a GPU
    return done


def _add_names() -> list[str]:
    """Put back what transformers 5 dropped and remote code imports or looks up; what was put back before stays so."""
    from transformers import utils
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    places: list[tuple[Any, str, Any]] = [
        (utils, "is_torch_fx_available", _no),
        (utils.import_utils, "is_torch_fx_available", _no),
    ]
    if hasattr(utils, "TransformersKwargs"):
        places.append((utils, "LossKwargs", utils.TransformersKwargs))
    for place, name, value in places:
        if not hasattr(place, name):
            setattr(place, name, value)
    ROPE_INIT_FUNCTIONS.setdefault("default", _plain_rope)
    named = [name for place, name, value in places[1:] if getattr(place, name) is value]
    if ROPE_INIT_FUNCTIONS["default"] is _plain_rope:
        named.append('ROPE_INIT_FUNCTIONS["default"]')
    return [f"transformers has {name} again" for name in named]


def _no() -> bool:
    return False


def _plain_rope(config: Any, device: Any = None, seq_len: int | None = None, **kwargs: Any) -> tuple[Tensor, float]:
    """Return the frequencies of plain rotary embeddings, and the scale of attention."""
    parameters = getattr(config, "rope_parameters", None) or {}
    base = getattr(config, "rope_theta", None) or parameters.get("rope_theta", 1e4)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(head * getattr(config, "partial_rotary_factor", 1.0))
    steps = torch.arange(0, dim, 2, dtype=torch.int64).to(device=device, dtype=torch.float) / dim
    return 1.0 / base**steps, 1.0


def _accept_new_calls(cls: Any) -> list[str]:
    """Let a class of transformers 4 be called as transformers 5 calls it when weights are tied."""
    done = cls.__dict__.get("_shims")
    if done is not None:  # loaded before in this process
        return done
    done = cls._shims = []
    if not hasattr(cls, "all_tied_weights_keys"):
        cls.all_tied_weights_keys = {}
        done.append(f"{cls.__name__}.all_tied_weights_keys was missing and is empty")
    own = cls.tie_weights
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(own).parameters.values()):
        return done

    def tie_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self)

    cls.tie_weights = tie_weights
    done.append(f"{cls.__name__}.tie_weights takes the arguments of transformers 5")
    return done


@contextmanager
def _real_buffers(cls: Any) -> Iterator[None]:
    """Keep the buffers that are in no checkpoint, such as rotary frequencies, as the model's code computes them.

    transformers 5 builds models without memory and leaves such buffers unset unless the code knows how to set them
    again, which older code does not. Here parameters are built without memory and buffers on the CPU, even by code
    that names a GPU.
    """
    own, kept = cls.__init__, []
    loading = True

    @functools.wraps(own)
    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        if not loading:  # transformers copied the class, this method with it
            own(self, *args, **kwargs)
            return
        with _NoGPU(), torch.device("cpu"), _empty_parameters():
            own(self, *args, **kwargs)
        for module in self.modules():
            kept.extend((module, name, module._buffers[name]) for name in module._non_persistent_buffers_set)

    cls.__init__ = build
    try:
        yield
        for module, name, value in kept:
            module._buffers[name] = value
    finally:
        cls.__init__ = own
        loading = False
        kept.clear()


@contextmanager
def _empty_parameters() -> Iterator[None]:
    """Give parameters no memory while a model is built; one that two modules share stays shared."""
    own = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        own(module, name, parameter)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = own


class _NoGPU(TorchFunctionMode):
    """Make tensors on the CPU that are asked for on a GPU; the loaded model is moved later."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = {name: _off_gpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(_off_gpu, args), **named)


def _off_gpu(value: Any) -> Any:
    is_gpu = isinstance(value, str | torch.device) and str(value).startswith("cuda")
    return "cpu" if is_gpu else value
