"""sparse-ar and sparse-diffusion: both backends under a name that lm-eval knows, set up by model arguments.

Importing this module is enough: `lm_eval.simple_evaluate(model="sparse-diffusion", model_args="pretrained=...")`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, get_type_hints

import lm_eval.models  # noqa: F401 - lm-eval fills its registry only while that is empty
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from dllm_sparsity import registry
from dllm_sparsity.errors import UserError, did_you_mean
from dllm_sparsity.lm.base import SparsityLM
from dllm_sparsity.lm.distributed import Processes
from dllm_sparsity.sparsity.sites import expand

_MODEL_NAMES = ("paradigm", "model", "label")  # fields of a study's model that lm-eval has other names for
_HINT = "dllm-sparsity eval --help names the model arguments"
_opened: list[SparsityLM] = []


class SparsityArguments(BaseModel):
    """The model arguments that are about sparsity and this run, not about the model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pretrained: str
    device: str = "auto"
    seed: int = Field(default=0, ge=0)
    rule: str | None = None
    strength: float | None = None
    sites: tuple[str, ...] = ("all",)
    layers: tuple[int, ...] | None = None
    metrics: tuple[str, ...] = ("density", "overlap")
    check_greedy: bool = True

    @field_validator("sites", "layers", "metrics", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        """Split `input+gate`: lm-eval takes the comma for the next argument."""
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split("+"))
        return (value,) if isinstance(value, int) else value


@dataclasses.dataclass(frozen=True)
class Request:
    """Checked model arguments: the model as a study has it, the rule, and the rest."""

    model: Any
    rule: Any
    run: SparsityArguments


def check(paradigm: str, arguments: Mapping[str, Any]) -> Request:
    """Check model arguments before anything is loaded.

    Args:
        paradigm: Name of the backend, `autoregressive` or `diffusion`.
        arguments: Model arguments, as lm-eval has parsed them.

    Raises:
        UserError: One is unknown or wrong, or the model does not exist.
    """
    model_config: Any = registry.load("dllm_sparsity.study.config:ModelConfig")
    of_model = set(model_config.model_fields) - set(_MODEL_NAMES)
    diffusion = {"confidence_threshold", *registry.load("dllm_sparsity.study.models:_DIFFUSION")}
    diffusion |= {name for name in of_model if name.startswith("sampler")}
    of_paradigm = of_model if paradigm == "diffusion" else of_model - diffusion
    of_run = set(SparsityArguments.model_fields)
    rule = arguments.get("rule")
    of_rule = _rule_parameters(rule) if isinstance(rule, str) else {}
    known = of_paradigm | of_run | set(of_rule)
    for name in arguments:
        if name not in known:
            if name in of_model:
                raise UserError(f"model argument {name} is for sparse-diffusion", "leave it out for sparse-ar")
            raise UserError(f"unknown model argument {name!r}{did_you_mean(name, sorted(known))}", _HINT)
    if "pretrained" not in arguments:
        raise UserError("no model given", "add --model_args pretrained=MODEL: a hub id, a folder or embedded:diffusion")
    if str(arguments.get("batch_size", "")).startswith("auto"):
        raise UserError("batch_size auto is not supported", "give a number: batches are fixed, so that runs repeat")
    run = _checked(SparsityArguments, {name: value for name, value in arguments.items() if name in of_run})
    given = {name: value for name, value in arguments.items() if name in of_paradigm}
    model = _checked(model_config, {**given, "paradigm": paradigm, "model": run.pretrained})
    parameters = {
        name: _one(name, TypeAdapter(kind), arguments[name]) for name, kind in of_rule.items() if name in arguments
    }
    expand(run.sites)
    for name in run.metrics:
        registry.check("metrics", name)
    if paradigm == "diffusion":
        registry.check("samplers", model.sampler)
    built = _rule(run, parameters)
    registry.load("dllm_sparsity.study.fetch:check_weights")(model)
    return Request(model, built, run)


def open_lm(paradigm: str, arguments: Mapping[str, Any]) -> SparsityLM:
    """Load a backend and attach its rule; it stays attached until `detach`.

    Args:
        paradigm: As in `check`.
        arguments: As in `check`.

    Raises:
        UserError: An argument is unknown or wrong, or the model cannot be loaded.
    """
    asked = check(paradigm, arguments)
    run, processes = asked.run, Processes.start(asked.run.device)
    open_backend = registry.load("dllm_sparsity.study.models:open_backend")
    lm: SparsityLM = open_backend(asked.model, processes.device(run.device), run.seed)
    lm.processes, lm.check_greedy = processes, run.check_greedy
    lm.attach(asked.rule, run.sites, layers=run.layers, metrics=run.metrics)
    _opened[:] = [lm]
    return lm


def latest() -> SparsityLM | None:
    """Return the LM that lm-eval opened last by name, for its counts: `latest().read()`."""
    return _opened[0] if _opened else None


def close() -> None:
    """Detach what lm-eval opened last and let it go."""
    for lm in _opened:
        lm.detach()
    _opened.clear()


def _rule(run: SparsityArguments, parameters: dict[str, Any]) -> Any:
    if run.rule is None:
        if run.strength is not None:
            raise UserError(f"strength {run.strength} without a rule", "add rule=top_p to --model_args")
        return None
    if run.strength is None:
        raise UserError(f"no strength given for rule {run.rule}", "add strength=X to --model_args")
    return registry.load("dllm_sparsity.study.models:make_rule")(run.rule, run.strength, parameters)


def _rule_parameters(name: str) -> dict[str, Any]:
    """Return the other parameters of a rule with their types; the first one is the strength."""
    cls = registry.get("rules", name)
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in [field for field in dataclasses.fields(cls) if field.init][1:]}


def _checked(schema: Any, values: dict[str, Any]) -> Any:
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise _wrong(error, None) from error


def _one(name: str, adapter: TypeAdapter, value: Any) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise _wrong(error, name) from error


def _wrong(error: ValidationError, name: str | None) -> UserError:
    first = error.errors()[0]
    where = name or str(first["loc"][0])
    return UserError(f"model argument {where}={first['input']}: {first['msg']}", _HINT)


class _ByName(LM):
    """What lm-eval asks for an LM; it makes one of a backend and is never one itself."""

    paradigm: ClassVar[str]

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> Any:
        """Open the backend; model arguments win over the options of the same name.

        Args:
            arg_dict: Model arguments.
            additional_config: lm-eval's options: batch size and device.
        """
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return open_lm(cls.paradigm, {**options, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> Any:
        """Open the backend from `name=value,name=value`.

        Args:
            arg_string: Model arguments.
            additional_config: As in `create_from_arg_obj`.
        """
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)


@register_model("sparse-ar")
class SparseAutoregressive(_ByName):
    """lm-eval's way to the autoregressive backend."""

    paradigm: ClassVar[str] = "autoregressive"


@register_model("sparse-diffusion")
class SparseDiffusion(_ByName):
    """lm-eval's way to the diffusion backend."""

    paradigm: ClassVar[str] = "diffusion"
