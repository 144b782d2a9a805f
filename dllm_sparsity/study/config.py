"""What a study runs: the configuration file, validated once. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dllm_sparsity.errors import UserError, did_you_mean

EMBEDDED = "embedded:"
"""Prefix of a model that ships with this package: embedded:autoregressive, embedded:diffusion."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(_Frozen):
    """One model and how it is run."""

    paradigm: Literal["autoregressive", "diffusion"]
    model: str
    label: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    """How accelerate spreads a model over several GPUs, where it is too large for one."""
    batch_size: int = Field(default=16, ge=1)
    stack: int = Field(default=1, ge=1)
    """Strengths of a rule that share a forward pass, each with a copy of the batch: so many times as many sequences."""
    max_length: int | None = Field(default=None, ge=2)
    share_context: bool = True
    """Autoregressive: options of an item share the reading of their context where that is less work."""
    mask_token: str | int | None = None
    logits_shift: bool = False
    mc: int | Literal["exact"] = 16
    steps: int | None = Field(default=None, ge=1)
    block_length: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    cfg_scale: float = Field(default=0.0, ge=0)
    sampler: str = "low_confidence"
    confidence_threshold: float | None = Field(default=None, gt=0, le=1)
    sampler_options: dict[str, Any] = Field(default_factory=dict)
    """Other fields of the sampler, by name."""

    pipeline: Literal["llada2", "diffusion_gemma"] | None = None
    """A pipeline of diffusers to generate with, instead of the loop of this package."""
    pipeline_options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the pipeline's call, by name."""

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # a mapping has no hash of its own

    @property
    def name(self) -> str:
        """What people see."""
        return self.label or self.model.removeprefix(EMBEDDED).rstrip("/").rsplit("/", 1)[-1]

    @model_validator(mode="after")
    def _pipelines_are_of_diffusion(self) -> ModelConfig:
        if self.pipeline is not None and self.paradigm != "diffusion":
            raise ValueError("a pipeline is of the paradigm diffusion")
        if self.pipeline is None and self.pipeline_options:
            raise ValueError("pipeline_options without a pipeline")
        return self

    @field_validator("mc")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be 1 or more")
        return value


class TaskSpec(_Frozen):
    """One task and how much of it is run."""

    name: str | None = None
    text: str | None = None
    """A text file of one's own, scored as likelihood, instead of a task name."""
    limit: int | None = Field(default=None, ge=1)
    num_fewshot: int | None = Field(default=None, ge=0)
    chat_template: bool = False
    mc: int | Literal["exact"] | None = None
    run_code: bool = False
    """Consent to a task that runs code which the model wrote, on this machine."""

    @model_validator(mode="after")
    def _one_of(self) -> TaskSpec:
        if (self.name is None) == (self.text is None):
            raise ValueError("give either name or text")
        return self


class RuleConfig(_Frozen):
    """One rule, its strengths and where it acts; every strength at every site is a cell."""

    name: str
    strengths: tuple[float, ...] = ()
    sites: tuple[str, ...] = Field(default=("input", "intermediate"), min_length=1)
    layers: tuple[int, ...] | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What tells its curves at a site from those of other entries: all but strengths and sites."""
        return self.name, repr(self.parameters), self.layers


FEWEST_LAYERWISE_ITEMS = 16


class SearchConfig(_Frozen):
    """A search for critical sparsity beside or instead of given strengths, for every model, task, rule and site."""

    retentions: tuple[float, ...] = Field(default=(0.99,), min_length=1)
    quality: str | None = None
    """Name or kind of a quality, such as acc or nll; None takes each task's first."""
    width: float = Field(default=0.02, gt=0, lt=1)
    """The 95 % interval is to be narrower than this, in sparsity."""
    budget: int | None = Field(default=None, ge=1)
    """Most item-evaluations for each curve, dense ones included; None for no limit."""
    average: bool = True
    """Whether the average over tasks is searched as well, with one strength for all layers, where several tasks are on
    one kind of quality."""
    layerwise: bool = False
    """Whether to look for strengths by layer that reach more sparsity in all than one strength for all layers."""
    layerwise_items: int = Field(default=128, ge=FEWEST_LAYERWISE_ITEMS)
    """Items on which each layer is measured alone; with a budget as many as it allows, for it holds here once more."""

    @field_validator("retentions")
    @classmethod
    def _shares(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < value < 1 for value in values):
            percent = next((value for value in values if 1 < value < 100), None)
            meant = "" if percent is None else f"; for {percent:g} % give {percent / 100:g}"
            raise ValueError(f"give shares of the dense quality between 0 and 1{meant}")
        return tuple(sorted(set(values)))


class StudyConfig(_Frozen):
    """A whole study."""

    name: str = Field(default="study", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: str = "auto"
    models: tuple[ModelConfig, ...] = Field(min_length=1)
    tasks: tuple[TaskSpec, ...] = Field(min_length=1)
    rules: tuple[RuleConfig, ...] = Field(min_length=1)
    search: SearchConfig | None = None
    replicates: int = Field(default=0, ge=0)
    """Further dense runs of every model on every task, with other requests in a batch: the noise floor."""

    @model_validator(mode="after")
    def _strengths_or_search(self) -> StudyConfig:
        if self.search is None and not all(rule.strengths for rule in self.rules):
            raise ValueError("give each rule at least one of strengths, or the study a search")
        return self

    @model_validator(mode="after")
    def _distinct(self) -> StudyConfig:
        names = [(model.paradigm, model.name) for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError("two models of one paradigm have the same name; give each a label")
        tasks = [task.name or Path(task.text or "").stem for task in self.tasks]
        if len(set(tasks)) < len(tasks):
            raise ValueError("a task is named twice; use two studies, or rename the text file")
        curves = [(site, *rule.identity) for rule in self.rules for site in rule.sites]
        if self.search and (twice := next((own for own in curves if curves.count(own) > 1), None)):
            raise ValueError(f"rule {twice[1]} would be searched twice at {twice[0]}; give it there once")
        return self


class _Once(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML keeps the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # before `<<` is merged into it, which may name a key again
        seen = set[tuple[str, str]]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                line = key.start_mark.line + 1
                raise UserError(f"{key.value} is given twice, again in line {line}", "keep one of both")
            seen.add((key.tag, key.value))
        return node


def read_config(path: str | Path) -> StudyConfig:
    """Read a study from a YAML file.

    Args:
        path: The file.

    Raises:
        UserError: It cannot be read, is no YAML, or a field is wrong.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _Once)
    except FileNotFoundError as error:
        raise UserError(
            f"no such file: {path}", "give a study in YAML; the folder configs/ has some to start from"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}", "give a study in YAML") from error
    except UserError as error:
        raise UserError(f"{path}: {error.message}", error.hint) from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}", "mend the file") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no fields", "start from a file in configs/")
    return build_config(data, str(path))


def build_config(data: dict[str, Any], source: str = "the study") -> StudyConfig:
    """Validate a study given as plain data, names included.

    Args:
        data: Fields as in the YAML file.
        source: What to call it in errors.

    Raises:
        UserError: A field, name or strength is wrong.
    """
    try:
        config = StudyConfig.model_validate(data)
    except ValidationError as error:
        found = error.errors()
        first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])  # most likely a typo
        where = ".".join(str(part) for part in first["loc"])
        hint = "the files in configs/ comment every field"
        if first["type"] == "extra_forbidden":
            where, hint = (
                f"{where}{did_you_mean(str(first['loc'][-1]), _known_fields(first['loc']))}",
                "remove or rename it",
            )
        raise UserError(": ".join(filter(None, [source, where, _plainly(first)])), hint) from error
    _check_names(config)
    _check_layerwise(config)
    return config


def _plainly(error: Any) -> str:
    """Return what pydantic found, without its own words for kinds of data."""
    given, kind = error["ctx"] if "ctx" in error else {}, error["type"]
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return "give fields, each as name: value"
    if kind in ("tuple_type", "list_type"):
        return "give a list, such as [a, b]"
    if kind == "too_short":
        return f"give at least {given['min_length']}"
    if kind == "missing":
        return "this field is missing"
    if kind == "string_pattern_mismatch":
        return "take letters, digits, and . _ - behind the first of them"
    return error["msg"].removeprefix("Value error, ").replace("Input should be", "should be")


def _known_fields(location: tuple) -> list[str]:
    kinds = {"models": ModelConfig, "tasks": TaskSpec, "rules": RuleConfig, "search": SearchConfig}
    return (
        list(kinds.get(str(location[0]), StudyConfig).model_fields)
        if len(location) > 1
        else list(StudyConfig.model_fields)
    )


def _check_layerwise(config: StudyConfig) -> None:
    """Refuse limits that leave too few items to measure single layers on."""
    for task in config.tasks if config.search is not None and config.search.layerwise else ():
        if task.limit is not None and task.limit < FEWEST_LAYERWISE_ITEMS:
            raise UserError(
                f"search.layerwise measures each layer alone on {FEWEST_LAYERWISE_ITEMS} items or more, and"
                f" {task.name or task.text} is limited to {task.limit}",
                f"give it a limit of {FEWEST_LAYERWISE_ITEMS} or more, or leave layerwise out",
            )


def _check_names(config: StudyConfig) -> None:
    """Refuse unknown rules, samplers and sites without importing torch; strengths are checked when rules are built."""
    from dllm_sparsity import registry

    sites = ["input", "gate", "up", "intermediate", "all"]
    for rule in config.rules:
        registry.check("rules", rule.name)
        for site in rule.sites:
            if site not in sites:
                raise UserError(f"unknown site {site!r}{did_you_mean(site, sites)}", f"sites are: {', '.join(sites)}")
    for model in config.models:
        registry.check("backends", model.paradigm)
        registry.check("samplers", model.sampler)
    for task in config.tasks:
        if task.text is not None and not Path(task.text).is_file():
            raise UserError(f"no such text file: {task.text}", "give a UTF-8 text file")
