"""Load a model and its tokenizer by hub id or folder, and make sure that it is of the paradigm it is given as."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dllm_sparsity.errors import UserError, shorten
from dllm_sparsity.lm.hub import check_exists, no_safetensors

_LOAD_ERRORS = (OSError, ValueError, LookupError, ImportError, AttributeError, TypeError, RuntimeError, AssertionError)


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Args:
        model: Hub id or folder.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether code that comes with the model may run.
        dtype: float32, bfloat16 or float16.
        device: A torch device, such as cpu or cuda:0; meta leaves the weights out, for what only plans.
        device_map: How accelerate spreads the layers over several devices, such as `auto`; None puts all on `device`.
    """

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    device_map: str | None = None


def load(source: ModelSource) -> tuple[Any, Any]:
    """Return (model, tokenizer), the model in eval mode on its device; `model.shims` says what its code needed.

    Args:
        source: Where the model comes from.

    Raises:
        UserError: It does not exist, may not be read, needs code that is not trusted, or has no safetensors.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    check_exists(source.model, source.revision)
    device = find_device(source.device)
    keys: dict[str, Any] = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source.model, **keys)
        auto = _auto_class(config)
        from dllm_sparsity.lm.shims import remote_code

        with remote_code(source.model, config, auto.__name__, keys) as done:
            model = _empty(auto, config, source) if device.type == "meta" else _full(auto, config, source, keys)
        tokenizer = AutoTokenizer.from_pretrained(source.model, **keys)
    except _LOAD_ERRORS as error:
        raise _load_error(source, error) from error
    if getattr(model, "generation_config", None) is None:
        model.generation_config = GenerationConfig()
    model.shims = tuple(done)
    spread = device.type == "meta" or source.device_map is not None
    return (model if spread else model.to(device)).eval(), tokenizer


def _full(auto: Any, config: Any, source: ModelSource, keys: dict[str, Any]) -> Any:
    """Return a model with its weights."""
    spread = {"device_map": source.device_map} if source.device_map is not None else {}
    dtype = getattr(torch, source.dtype)
    return auto.from_pretrained(source.model, config=config, dtype=dtype, use_safetensors=True, **keys, **spread)


def _empty(auto: Any, config: Any, source: ModelSource) -> Any:
    """Return a model without its weights."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        keys: dict[str, Any] = {"dtype": getattr(torch, source.dtype), "trust_remote_code": source.trust_remote_code}
        if source.trust_remote_code and getattr(config, "auto_map", None):
            keys |= code_revision(auto, config, source.revision)
        return auto.from_config(config, **keys)


def code_revision(auto: Any, config: Any, revision: str | None) -> dict[str, Any]:
    """Return what `from_config` is told of the code that comes with a model; nothing once that is registered.

    Args:
        auto: The automatic class.
        config: The model's configuration.
        revision: Branch, tag or commit on the hub.
    """
    return {} if type(config) in getattr(auto, "_model_mapping", ()) else {"code_revision": revision}


def _auto_class(config: Any) -> Any:
    """Choose the transformers class that gives logits for every position."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    classes = {"AutoModelForCausalLM": AutoModelForCausalLM, "AutoModelForMaskedLM": AutoModelForMaskedLM}
    remote = getattr(config, "auto_map", None) or {}
    for name in (*classes, "AutoModel"):
        if name in remote:
            return classes.get(name, AutoModel)
    architectures = getattr(config, "architectures", None) or [""]
    auto = AutoModelForMaskedLM if architectures[0].endswith("ForMaskedLM") else AutoModelForCausalLM
    if type(config) not in auto._model_mapping and architectures[0].startswith("DiffusionGemma"):
        import transformers

        return getattr(transformers, architectures[0], auto)  # no automatic class knows it
    return auto


def parse_device(name: str) -> torch.device:
    """Return a device, whether this machine has it or not.

    Args:
        name: cpu, cuda or cuda:0; meta.

    Raises:
        UserError: torch knows none of that name.
    """
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}", "give cpu, cuda or cuda:0") from error


def find_device(name: str) -> torch.device:
    """Return a device that this machine has.

    Args:
        name: cpu, cuda or cuda:0; meta.

    Raises:
        UserError: It has none of that name.
    """
    device = parse_device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name} asked for, but torch sees no GPU", "use --device cpu, or install a CUDA torch")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"no device {name}", f"torch sees cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return device


def _load_error(source: ModelSource, error: Exception) -> UserError:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return UserError(f"{source.model} runs code of its own", "read it, then add --trust-remote-code")
    if "safetensors" in text and "no file named" in text:
        return no_safetensors(source.model)
    return UserError(f"cannot load {source.model}: {shorten(text)}", "DLLM_SPARSITY_DEBUG=1 shows where it failed")


@torch.no_grad()
def sees_right_context(model: Any) -> bool:
    """Tell whether the first token's logits depend on the last token, by trying.

    Args:
        model: A model that takes `input_ids` and returns logits.
    """
    from dllm_sparsity.lm.call import ModelCall, Rows

    call = ModelCall(model)
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(1, 9, device=call.device).remainder(size).unsqueeze(0)
    other = ids.clone()
    other[0, 3:] = (ids[0, 3:] + size // 2) % size
    real = torch.ones_like(ids, dtype=torch.bool)
    first, second = (call(Rows(row, real, padded=False)) for row in (ids, other))
    change = (first - second).float().abs().amax(dim=(0, 2))
    share = max(0.01, 16 * torch.finfo(first.dtype).eps)  # experts round otherwise when other tokens go elsewhere
    return float(change[:3].max()) > share * float(change[3:].max())


def check_paradigm(model: Any, name: str, bidirectional: bool) -> None:
    """Refuse a causal model as a diffusion model, and the reverse.

    Args:
        model: The loaded model.
        name: What the user called it.
        bidirectional: What it has to be.

    Raises:
        UserError: It is the other kind.
    """
    if next(model.parameters()).is_meta:
        return  # without its weights it cannot be tried; those who run it do
    if sees_right_context(model) == bidirectional:
        return
    if bidirectional:
        raise UserError(
            f"{name} is a causal model, it cannot be used as a diffusion model",
            "give it as --ar (sparse-ar in eval); a decoder trained to unmask is saved with config.is_causal = False",
        )
    raise UserError(
        f"{name} sees tokens to the right, it is not autoregressive",
        "give it as --diffusion (sparse-diffusion in eval)",
    )


def longest_sequence(model: Any, tokenizer: Any) -> int:
    """Return how many tokens a model takes, from its config or else its tokenizer.

    Args:
        model: A transformers model.
        tokenizer: Its tokenizer.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    for name in ("n_positions", "max_position_embeddings", "max_sequence_length", "n_ctx"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    length = getattr(tokenizer, "model_max_length", 2048)
    return length if length < 10**9 else 2048
