"""Check a study before a weight or a document is loaded: names, strengths, tasks, and every site on every layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from dllm_sparsity.errors import UserError
from dllm_sparsity.families import find_ffns, place
from dllm_sparsity.lm.loading import parse_device
from dllm_sparsity.sparsity.sites import FFN, expand
from dllm_sparsity.study import plan
from dllm_sparsity.study.architectures import Architecture, build, find_architecture, loads
from dllm_sparsity.study.check_here import local_tokenizer, look_here
from dllm_sparsity.study.check_search import search_ahead
from dllm_sparsity.study.check_tasks import check_data, check_lengths, check_tasks
from dllm_sparsity.study.config import ModelConfig, RuleConfig, StudyConfig
from dllm_sparsity.study.models import make_rule, make_sampler, resolve

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_OWN_LOOP = "a study runs DiffusionGemma with pipeline: diffusion_gemma; elsewhere use observe() and sparsify()"


@dataclass(frozen=True)
class ModelCheck:
    """What a model's structure is, as far as its configuration tells.

    Args:
        name: What people see.
        paradigm: autoregressive or diffusion.
        source: Where its configuration came from; None where there is none.
        layers: Hidden layers that the configuration promises.
        stacks: Stacks of that many layers; 2 where an encoder and a decoder both have FFNs.
        widths: Width of `input`, width of `intermediate` and number of experts of each kind of FFN; 0 experts is dense.
        sites: Sites that every FFN of every layer has.
        parameters: Weights that are shared count once.
        dtype: As the study asks for.
        mask_token: Its id, or the token as given; None where a model has or needs none.
        ok: Whether nothing is wrong with it.
        lacking: Bytes of its files that are still to be downloaded; None where nobody asked, or the hub did not tell.
    """

    name: str
    paradigm: str
    source: str | None = None
    layers: int = 0
    stacks: int = 0
    widths: tuple[tuple[int, int, int], ...] = ()
    sites: tuple[str, ...] = ()
    parameters: int = 0
    dtype: str = "float32"
    mask_token: str | None = None
    ok: bool = False
    lacking: int | None = None

    @property
    def gigabytes(self) -> dict[str, float]:
        """Size of the weights in each dtype, in units of 10**9 bytes."""
        return {name: self.parameters * size / 1e9 for name, size in BYTES.items()}


@dataclass(frozen=True)
class StudyCheck:
    """What a check found.

    Args:
        name: Of the study.
        cells: Cells it plans, without those of searches; a task that is a group counts once.
        sites: Sites that its rules act on, as asked for.
        models: Its models, in its order.
        problems: What has to be put right, one line each.
        notes: What is worth knowing.
        searches: Whether a search chooses cells on top.
    """

    name: str
    cells: int
    sites: tuple[str, ...]
    models: tuple[ModelCheck, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    searches: bool = False


def check_study(config: StudyConfig, here: bool = False, data: bool = False) -> StudyCheck:
    """Check a study as far as that is possible without weights and data.

    Args:
        config: The study, its fields validated.
        here: Whether to look as well at what this machine has for its models, and to ask the hub for what it has not.
        data: Whether to look for the data of its tasks on this machine.
    """
    problems: list[str] = []
    notes: list[str] = []
    if config.device != "auto":
        try:
            parse_device(config.device)
        except UserError as error:
            problems.append(f"{error.message}; {error.hint}")
    for rule in config.rules:
        _check_rule(rule, problems)
    said, lengths, scored = check_tasks(config.tasks)
    problems += [*said, *search_ahead(config, notes)]
    for model in config.models:
        if model.pipeline == "diffusion_gemma":
            problems += [
                f"{model.name}: task {name} scores likelihoods, which this model has none of" for name in scored
            ]
    models = tuple(_check_model(model, config.rules, lengths, problems, notes) for model in config.models)
    if here:
        models = look_here(config, models, problems, notes)
    if data:
        check_data(config, problems, notes)
    asked = tuple(dict.fromkeys(site for rule in config.rules for site in rule.sites))
    distinct = tuple(dict.fromkeys(problems))
    planned, told = len(plan.expand(config)), tuple(dict.fromkeys(notes))
    return StudyCheck(config.name, planned, asked, models, distinct, told, config.search is not None)


def _line(where: str, error: UserError) -> str:
    return " ".join(f"{where}: {error.message}; {error.hint}".split())


def _check_rule(rule: RuleConfig, problems: list[str]) -> None:
    for strength in rule.strengths:
        try:
            if make_rule(rule.name, strength, rule.parameters).is_dense:
                raise UserError(f"strength {strength:g} is its dense setting", "leave it out: every study runs dense")
        except UserError as error:
            problems.append(_line(f"rule {rule.name}", error))


def _check_model(
    model: ModelConfig, rules: Sequence[RuleConfig], lengths: dict[str, int], problems: list[str], notes: list[str]
) -> ModelCheck:
    said: list[str] = []
    if model.paradigm == "diffusion" and model.pipeline is None:
        try:
            sampler = make_sampler(model)
        except UserError as error:
            said.append(f"{error.message}; {error.hint}")
        else:
            said += check_lengths(model, sampler, lengths)
    blank = ModelCheck(model.name, model.paradigm, dtype=model.dtype)
    try:
        architecture = find_architecture(resolve(model.model), model.revision)
        layers = architecture.layers
        built = build(architecture, model.trust_remote_code)
        ffns = find_ffns(built)
    except UserError as error:
        problems += [f"{model.name}: {line}" for line in [*said, f"{error.message}; {error.hint}"]]
        return blank
    said += [*_loading(model, architecture), *coverage(ffns, layers, rules)]
    mask = None
    if model.paradigm == "diffusion" and model.pipeline != "diffusion_gemma":
        try:
            mask = _mask_token(model, architecture, built, notes)
        except UserError as error:
            said.append(f"{error.message}; {error.hint}")
    problems += [f"{model.name}: {line}" for line in said]
    notes += [f"{model.name}: {line}" for line in _left_dense(ffns, rules)]
    return ModelCheck(
        model.name,
        model.paradigm,
        architecture.source,
        layers,
        len({place(ffn)[0] for ffn in ffns}),
        tuple(dict.fromkeys((ffn.d_model, ffn.d_ffn, ffn.experts) for ffn in ffns)),
        tuple(site for site in expand(["all", "gate", "up"]) if all(site in ffn.points for ffn in ffns)),
        sum(parameter.numel() for parameter in built.parameters()),
        model.dtype,
        mask,
        ok=not said,
    )


def coverage(ffns: Sequence[FFN], layers: int, rules: Iterable[RuleConfig]) -> list[str]:
    """Return what keeps the asked sites from being on every layer; nothing where all is well.

    Args:
        ffns: FFNs as the families found them.
        layers: Layers that the model's configuration promises, in each stack of layers.
        rules: Rules with the sites and layers that they ask for.
    """
    said = []
    stacks: dict[str, dict[int, list[FFN]]] = {}
    for ffn in ffns:
        stack, number = place(ffn)
        stacks.setdefault(stack, {}).setdefault(number, []).append(ffn)
    for stack, found in stacks.items():
        where = f" of {stack}" if len(stacks) > 1 else ""
        missing = sorted(set(range(layers)) - set(found))
        if missing:
            said.append(f"{len(missing)} of {layers} layers{where} have no FFN that is known: {ranges(missing)}")
        if extra := sorted(set(found) - set(range(layers))):
            said.append(f"layers{where} beyond the {layers} that the configuration promises: {ranges(extra)}")
    for site in dict.fromkeys(site for rule in rules for asked in rule.sites for site in expand(asked)):
        without = [ffn for ffn in ffns if site not in ffn.points]
        if without:
            reasons = dict.fromkeys(ffn.missing.get(site, "its form has no such site") for ffn in without)
            numbers = ranges(sorted({ffn.layer for ffn in without}))
            said.append(f"no site {site} in layers {numbers}: {', '.join(reasons)}")
    known = {ffn.layer for ffn in ffns}
    for rule in rules:
        if rule.layers is not None and (unknown := sorted(set(rule.layers) - known)):
            said.append(f"rule {rule.name}: no such layers: {ranges(unknown)}; it has {ranges(sorted(known))}")
        elif rule.layers is not None and not rule.layers:
            said.append(f"rule {rule.name}: its list of layers is empty; leave it out for all layers")
    return said


def _left_dense(ffns: Sequence[FFN], rules: Iterable[RuleConfig]) -> list[str]:
    """Return which layers all rules together pass over: a study may mean it, but should not be blind to it."""
    known = {ffn.layer for ffn in ffns}
    by_name: dict[str, set[int]] = {}
    for rule in rules:
        by_name.setdefault(rule.name, set()).update(known if rule.layers is None else rule.layers)
    return [
        f"rule {name} acts on {len(known & chosen)} of {len(known)} layers and leaves {ranges(left)} dense"
        for name, chosen in by_name.items()
        if (left := sorted(known - chosen))
    ]


def ranges(numbers: Sequence[int]) -> str:
    """Write sorted numbers as ranges, such as `0-3, 7`.

    Args:
        numbers: Sorted, each once.
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _loading(model: ModelConfig, architecture: Architecture) -> list[str]:
    """Return why a study could not load or run the model."""
    said = []
    if architecture.remote_code and not model.trust_remote_code:
        said.append("its code comes with its weights; read it, then set trust_remote_code: true")
    if model.pipeline is None and not loads(architecture):
        said.append(f"transformers has no class that loads it for a study; {_OWN_LOOP}")
    if architecture.bidirectional is not None and architecture.bidirectional != (model.paradigm == "diffusion"):
        kind = "bidirectional, not autoregressive" if architecture.bidirectional else "causal, not a diffusion model"
        said.append(f"its configuration says that it is {kind}; give it the other paradigm")
    return said


def _mask_token(model: ModelConfig, architecture: Architecture, built: Any, notes: list[str]) -> str:
    """Return the mask token, by the rule of the backend where the tokenizer is at hand.

    Raises:
        UserError: There is none, or it is not in the vocabulary.
    """
    from dllm_sparsity.diffusion.tokens import find_mask_id

    given, own = model.mask_token, architecture.config.get("mask_token_id")
    tokenizer = local_tokenizer(model)
    if tokenizer is None:
        if architecture.source == "folder":
            raise UserError("its folder holds no tokenizer", "save one beside the model with save_pretrained")
        if given is not None and not str(given).isdecimal():
            notes.append(f"{model.name}: mask token {given!r} was not looked up: no tokenizer is at hand")
            return str(given)
        if given is None and own is None:
            raise UserError("no mask token is known", f"give mask_token; for a model that has none, {_OWN_LOOP}")
    shape = SimpleNamespace(
        config=SimpleNamespace(mask_token_id=own), get_input_embeddings=lambda: built.get_input_embeddings()
    )
    none = SimpleNamespace(mask_token_id=None, unk_token_id=None, unk_token=None)
    return str(find_mask_id(shape, tokenizer or none, given))
