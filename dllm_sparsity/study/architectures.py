"""A model's structure without its weights: its configuration from a folder, the hub or the shipped descriptions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn

from dllm_sparsity.errors import UserError, shorten
from dllm_sparsity.lm.hub import FETCH_FIRST, check_exists, is_hub_there
from dllm_sparsity.study.cached import missing_code

DESCRIPTIONS = Path(__file__).with_suffix(".yaml")
Source = Literal["folder", "hub", "shipped description"]


@dataclass(frozen=True)
class Architecture:
    """What is known of a model before its weights are read.

    Args:
        model: Folder or hub id.
        config: Fields of its config.json; of a shipped description, those that fix its structure.
        source: Where they come from.
        remote_code: Whether its code comes with its weights.
        revision: Branch, tag or commit on the hub.
    """

    model: str
    config: dict[str, Any]
    source: Source
    remote_code: bool
    revision: str | None = None

    @property
    def layers(self) -> int:
        """Hidden layers that the configuration promises, in each of its stacks.

        Raises:
            UserError: It names no number.
        """
        text = self.config.get("text_config") or self.config
        for name in ("num_hidden_layers", "n_layers", "n_layer", "num_layers"):
            if isinstance(text.get(name), int):
                return text[name]
        raise UserError(f"the configuration of {self.model} names no number of layers", "is it a language model?")

    @property
    def bidirectional(self) -> bool | None:
        """Whether every token sees every other; None where the configuration does not tell."""
        text = self.config.get("text_config") or self.config
        if self.config["model_type"] in ("llada", "Dream", "diffusion_gemma"):
            return True
        if isinstance(text.get("is_causal"), bool):
            return not text["is_causal"]
        if (self.config.get("architectures") or [""])[0].endswith("ForMaskedLM"):
            return True
        return None if self.remote_code else text.get("use_bidirectional_attention") in (True, "all")


@cache
def descriptions() -> dict[str, dict[str, Any]]:
    """Return the shipped descriptions by hub id, each with `parameters` and `config`."""
    return yaml.safe_load(DESCRIPTIONS.read_text(encoding="utf-8"))


def find_architecture(model: str, revision: str | None = None) -> Architecture:
    """Read a model's configuration from its folder, else from the hub or its cache, else from what is shipped.

    Args:
        model: Folder or hub id, embedded names resolved.
        revision: Branch, tag or commit on the hub.

    Raises:
        UserError: There is no such model, or its configuration cannot be had.
    """
    folder = Path(model).expanduser()
    if folder.is_dir() or model not in descriptions():
        check_exists(model, revision)
    if folder.is_dir():
        return _described(model, _read(folder / "config.json"), "folder")
    found = _from_hub(model, revision)
    if found is not None:
        return _described(model, found, "hub", revision)
    shipped = descriptions()[model]
    return Architecture(model, shipped["config"], "shipped description", bool(shipped.get("remote_code")), revision)


def _described(model: str, config: dict[str, Any], source: Source, revision: str | None = None) -> Architecture:
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"the configuration of {model} names no model_type", "is it a model of transformers?")
    return Architecture(model, config, source, bool(config.get("auto_map")), revision)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}", "give a folder made by save_pretrained") from error
    return found if isinstance(found, dict) else {}


def _from_hub(model: str, revision: str | None) -> dict[str, Any] | None:
    """Return a configuration from the hub or its cache; None where it cannot be had."""
    from huggingface_hub import errors as hub
    from huggingface_hub import hf_hub_download

    offline = not is_hub_there(model, revision)
    try:
        return _read(Path(hf_hub_download(model, "config.json", revision=revision, local_files_only=offline)))
    except hub.RevisionNotFoundError as error:
        raise UserError(f"{model} has no revision {revision!r}", "look at its branches and tags") from error
    except (hub.HfHubHTTPError, OSError):
        return None  # gated, or not in the cache


def build(architecture: Architecture, trust_remote_code: bool = False) -> nn.Module:
    """Build a model without memory for its weights, on the meta device.

    The code of LLaDA and Dream is not run: LLaDA is built as a skeleton with its module names, Dream as Qwen2.

    Args:
        architecture: What is known of it.
        trust_remote_code: Whether other code that comes with a model may run.

    Raises:
        UserError: transformers does not know its type, or its configuration does not build.
    """
    config, kind = architecture.config, architecture.config["model_type"]
    try:
        with torch.device("meta"):
            if kind == "llada":
                return LladaSkeleton(config)
            return _build(
                architecture, {**config, "model_type": "qwen2" if kind == "Dream" else kind}, trust_remote_code
            )
    except UserError:
        raise
    except Exception as error:  # whatever a configuration or a model's own code does, users get two lines
        why = shorten(error)
        raise UserError(
            f"{architecture.model} cannot be built from its configuration: {type(error).__name__}: {why}",
            "look at its config.json; a newer transformers may know it",
        ) from error


def _build(architecture: Architecture, config: dict[str, Any], trust_remote_code: bool) -> nn.Module:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from dllm_sparsity.lm.loading import _auto_class, code_revision
    from dllm_sparsity.lm.shims import remote_code

    model_type = config["model_type"]
    if model_type in CONFIG_MAPPING:
        known = CONFIG_MAPPING[model_type].from_dict({key: value for key, value in config.items() if key != "auto_map"})
        auto: Any = _auto_class(known)
        if type(known) in getattr(auto, "_model_mapping", ()):
            return auto.from_config(known)
        own = getattr(transformers, (config.get("architectures") or [""])[0], None)
        if own is None:
            raise UserError(
                f"{architecture.model} ({model_type}) is no language model", "give one that predicts tokens"
            )
        return own(known)
    if not (architecture.remote_code and trust_remote_code):
        raise UserError(
            f"transformers does not know {architecture.model}, a model of type {model_type!r}",
            "where its code comes with its weights, read it, then set trust_remote_code: true",
        )
    absent = missing_code(architecture.model, architecture.revision)
    if absent and not is_hub_there(architecture.model, architecture.revision):
        raise UserError(
            f"the code of {architecture.model} is not on this machine: {', '.join(absent)}",
            FETCH_FIRST,
        )
    keys: dict[str, Any] = {"trust_remote_code": True, "revision": architecture.revision}
    own = transformers.AutoConfig.from_pretrained(architecture.model, code_revision=architecture.revision, **keys)
    auto = _auto_class(own)
    with remote_code(architecture.model, own, auto.__name__, keys):
        return auto.from_config(own, trust_remote_code=True, **code_revision(auto, own, architecture.revision))


def loads(architecture: Architecture) -> bool:
    """Tell whether a study can load a model: transformers has a class for it that gives logits for every position.

    Args:
        architecture: What is known of it.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from dllm_sparsity.lm.loading import _auto_class

    kind = architecture.config["model_type"]
    if architecture.remote_code or kind not in CONFIG_MAPPING:
        return architecture.remote_code
    known = CONFIG_MAPPING[kind]()
    known.architectures = architecture.config.get("architectures")
    return type(known) in getattr(_auto_class(known), "_model_mapping", ())


class LladaSkeleton(nn.Module):
    """LLaDA's modules under upstream's names; it holds a structure and cannot be run.

    Args:
        config: Fields of its config.json.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, vocabulary = config["d_model"], config.get("embedding_size") or config["vocab_size"]
        self.model = nn.Module()
        parts: dict[str, nn.Module] = {
            "wte": nn.Embedding(vocabulary, width),
            "blocks": nn.ModuleList(_llada_block(config) for _ in range(config["n_layers"])),
            "ln_f": nn.RMSNorm(width),
        }
        if not config.get("weight_tying"):
            parts["ff_out"] = nn.Linear(width, vocabulary, bias=False)
        self.model.add_module("transformer", nn.ModuleDict(parts))

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of token embeddings."""
        return self.get_submodule("model.transformer.wte")


def _llada_block(config: dict[str, Any]) -> nn.Module:
    width, ffn = config["d_model"], config["mlp_hidden_size"]
    rows = width // config["n_heads"] * (config.get("n_kv_heads") or config["n_heads"])
    block = nn.Module()
    for name, part in {
        "attn_norm": nn.RMSNorm(width),
        "ff_norm": nn.RMSNorm(width),
        "q_proj": nn.Linear(width, width, bias=False),
        "k_proj": nn.Linear(width, rows, bias=False),
        "v_proj": nn.Linear(width, rows, bias=False),
        "attn_out": nn.Linear(width, width, bias=False),
        "act": nn.SiLU(),
        "ff_proj": nn.Linear(width, ffn, bias=False),
        "up_proj": nn.Linear(width, ffn, bias=False),
        "ff_out": nn.Linear(ffn, width, bias=False),
    }.items():
        block.add_module(name, part)
    return block
