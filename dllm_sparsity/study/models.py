"""From a model's configuration to a backend that runs it; backends are reached through the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dllm_sparsity import registry
from dllm_sparsity.errors import UserError, did_you_mean
from dllm_sparsity.study.config import EMBEDDED, ModelConfig

_PAIR = Path(__file__).parent.parent / "pair"
_DIFFUSION = ("mask_token", "logits_shift", "mc", "steps", "block_length", "temperature", "cfg_scale")


def resolve(model: str) -> str:
    """Return the folder of an embedded model, or what was given.

    Args:
        model: `embedded:autoregressive`, `embedded:diffusion`, a folder or a hub id.

    Raises:
        UserError: There is no such embedded model.
    """
    if not model.startswith(EMBEDDED):
        folder = Path(model).expanduser()
        return str(folder) if folder.is_dir() else model
    folder = _PAIR / model.removeprefix(EMBEDDED)
    if not (folder / "config.json").is_file():
        raise UserError(f"no embedded model {model!r}", "there are embedded:autoregressive and embedded:diffusion")
    return str(folder)


def open_backend(config: ModelConfig, device: str, seed: int) -> Any:
    """Load a model into its backend.

    Args:
        config: The model and how it is run.
        device: A torch device, or `auto`; meta leaves the weights out.
        seed: Seed of everything random.

    Raises:
        UserError: It cannot be loaded, or is of the other paradigm.
    """
    from dllm_sparsity.lm.loading import ModelSource

    where = choose_device(device)
    source = ModelSource(
        resolve(config.model),
        config.revision,
        config.trust_remote_code,
        config.dtype,
        where,
        config.device_map if where != "meta" else None,
    )
    settings: dict[str, Any] = {"batch_size": config.batch_size, "max_length": config.max_length, "seed": seed}
    if config.pipeline is not None:
        settings |= {"mask_token": config.mask_token, "mc": config.mc} if config.pipeline == "llada2" else {}
        opened = registry.load("dllm_sparsity.diffusion.pipeline_backend:open_pipeline")
        return opened(source, config.pipeline, dict(config.pipeline_options), config.block_length, **settings)
    return registry.get("backends", config.paradigm).from_source(source, **backend_settings(config, seed))


def backend_settings(config: ModelConfig, seed: int) -> dict[str, Any]:
    """Return the arguments of a model's backend, beside the model itself.

    Args:
        config: The model and how it is run.
        seed: Seed of everything random.

    Raises:
        UserError: An option of the sampler is unknown, or out of range.
    """
    settings: dict[str, Any] = {"batch_size": config.batch_size, "max_length": config.max_length, "seed": seed}
    if config.paradigm == "autoregressive" and not config.share_context:
        settings["share_context"] = False
    if config.paradigm == "diffusion":
        settings |= {name: getattr(config, name) for name in _DIFFUSION}
        settings["sampler"] = make_sampler(config)
    return settings


def make_sampler(config: ModelConfig) -> Any:
    """Return the sampler that a configuration names.

    Args:
        config: The model and how it is run.

    Raises:
        UserError: An option is unknown, or out of range.
    """
    import dataclasses

    cls = registry.get("samplers", config.sampler)
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    options = dict(config.sampler_options)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UserError(
            f"sampler {config.sampler} has no option {unknown[0]!r}{did_you_mean(unknown[0], known)}",
            f"it has: {', '.join(known) or 'none'}",
        )
    if config.confidence_threshold is not None:
        if "confidence_threshold" not in known:
            raise UserError(f"sampler {config.sampler} has no confidence threshold", "use sampler confidence_threshold")
        if "confidence_threshold" in options:
            raise UserError("confidence_threshold is given twice", "take it out of sampler_options")
        options["confidence_threshold"] = config.confidence_threshold
    try:
        return cls(**options)
    except TypeError as error:
        raise UserError(f"sampler {config.sampler}: {error}", "give numbers where the option is a number") from error


def make_rule(name: str, strength: float, parameters: dict[str, Any]) -> Any:
    """Build a rule.

    Args:
        name: Registered name.
        strength: Its main parameter.
        parameters: Its other parameters.

    Raises:
        UserError: A parameter is unknown, or the strength is out of range.
    """
    import dataclasses

    cls = registry.get("rules", name)
    known = [field.name for field in dataclasses.fields(cls) if field.init][1:]
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise UserError(f"rule {name} has no parameter {unknown[0]!r}", f"it has: {', '.join(known) or 'no others'}")
    return cls(strength, **parameters)


def choose_device(device: str) -> str:
    """Return cuda where there is one and the user left it open.

    Args:
        device: A torch device, or `auto`.
    """
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
