"""The jobs of a study: its cells with their tasks loaded and their fingerprints known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dllm_sparsity import registry
from dllm_sparsity.errors import UserError
from dllm_sparsity.study import environment, expected
from dllm_sparsity.study.architectures import find_architecture
from dllm_sparsity.study.check_search import check_search
from dllm_sparsity.study.config import ModelConfig, StudyConfig, TaskSpec
from dllm_sparsity.study.models import resolve
from dllm_sparsity.study.plan import Cell, Loaded, cell_parts, expand, fingerprint, stacks
from dllm_sparsity.study.tasks import LoadedTask, load_tasks
from dllm_sparsity.study.weights import weights_identity

_SPARSE = 1.3  # what a rule adds to the cost of a dense cell


@dataclass(frozen=True)
class Job:
    """A cell with its task loaded and its fingerprint known."""

    cell: Cell
    task: LoadedTask
    fingerprint: str
    parts: dict[str, Any]

    @property
    def cost(self) -> float:
        """Rough cost beside other jobs: characters, times how often a model reads them."""
        model, mc = self.cell.model, self.cell.task.mc or self.cell.model.mc
        if self.task.output_type == "generate_until":
            passes = model.steps or 32 if model.paradigm == "diffusion" else 3
        else:
            passes = mc if model.paradigm == "diffusion" and isinstance(mc, int) else 1
        share = 1.0 if self.cell.block is None else (self.cell.block[1] - self.cell.block[0]) / max(1, self.task.items)
        return self.task.cost * passes * share * (1.0 if self.cell.rule is None else _SPARSE)


class Planner:
    """Knows what goes into a fingerprint: weights, tasks and versions, each looked up once.

    Args:
        config: The study.
        device: Kind of device that the models run on.

    Raises:
        UserError: A task cannot be loaded or searched on, or a model's files cannot be had.
    """

    def __init__(self, config: StudyConfig, device: str) -> None:
        code = environment.code_identity({registry.get(kind, name).__module__ for kind, name in _used(config)})
        self.config = config
        self.versions = {**environment.versions(), "code": code, "device": device}
        self.packages = {model: environment.installed(own_packages(model)) for model in config.models}
        self.weights = {model: weights_identity(resolve(model.model), model.revision) for model in config.models}
        self.tasks: dict[TaskSpec, list[LoadedTask]] = {spec: load_tasks(spec, config.seed) for spec in config.tasks}
        check_search(config.search, [task for _, task in self._loaded()])

    def job(self, cell: Cell, task: LoadedTask) -> Job:
        """Return a cell with its fingerprint.

        Args:
            cell: The cell.
            task: Its task, loaded.
        """
        model = cell.model
        parts = cell_parts(
            cell, self.config.seed, self.weights[model], task.identity, self.versions, self.packages[model]
        )
        return Job(cell, task, fingerprint(parts), parts)

    def all(self) -> list[Job]:
        """Return the planned cells of the study; equal work is there once."""
        jobs: dict[str, Job] = {}
        for cell in expand(self.config):
            for task in self.tasks[cell.task]:
                job = self.job(cell, task)
                jobs.setdefault(job.fingerprint, job)
        return list(jobs.values())

    def searched(self) -> list[tuple[ModelConfig, list[Loaded]]]:
        """Return what is searched on: each model with each task, and with all tasks where their average is asked for.

        Each task is there as the user gave it and loaded.
        """
        chosen, named = [[own] for own in self._loaded()], dict[str, Loaded]()
        for own in self._loaded():
            named.setdefault(own[1].name, own)  # a group may hold a task that is named as well
        if self.config.search is not None and self.config.search.average and len(named) > 1:
            chosen.append([*named.values()])
        return [(model, own) for model in self.config.models for own in chosen]

    def _loaded(self) -> list[Loaded]:
        return [(spec, task) for spec in self.config.tasks for task in self.tasks[spec]]

    def search_cost(self) -> float:
        """Guess what all searches cost."""
        search = self.config.search
        if search is None:
            return 0.0
        curves, loaded = sum(len(rule.sites) for rule in self.config.rules), self._loaded()
        tasks, cost = [task for _, task in loaded], 0.0
        for model in self.config.models:
            layers = _layers(model) if search.layerwise else None
            for spec, task in loaded:
                run = expected.evaluations(search, task.items, curves, expected.alike(task, tasks))
                run += sum(count * size for count, size in expected.layer_cells(search, task.items, curves, layers))
                cost += self.job(Cell(model, spec, None, None, None, ()), task).cost * run / max(1, task.items)
        return _SPARSE * cost


def _used(config: StudyConfig) -> Iterator[tuple[str, str]]:
    """Give kind and name of all in the registry that computes in a study."""
    for rule in config.rules:
        yield "rules", rule.name
        known = registry.names("rules")  # a rule may be made of another
        yield from (("rules", each) for each in rule.parameters.values() if isinstance(each, str) and each in known)
    for model in config.models:
        yield from (("samplers", model.sampler), ("backends", model.paradigm))
    yield from (("families", name) for name in registry.names("families"))  # the first that matches is taken


def own_packages(model: ModelConfig) -> tuple[str, ...]:
    """Return the packages that can change a number of a model, beside those that can for all.

    Args:
        model: The model.

    Raises:
        UserError: Its configuration cannot be had.
    """
    config = find_architecture(resolve(model.model), model.revision).config
    quantised = environment.QUANTISERS if config.get("quantization_config") else ()
    return (*(environment.PIPELINES if model.pipeline is not None else ()), *quantised)


def _layers(model: ModelConfig) -> int | None:
    try:
        return find_architecture(resolve(model.model), model.revision).layers
    except UserError:
        return None


def together(jobs: Sequence[Job]) -> list[list[Job]]:
    """Return the jobs in stacks: those that differ in strength alone, as many as their model's `stack` says.

    Args:
        jobs: All of a study, sealed ones too, so that a run that goes on stacks as the one before.
    """
    found: list[list[Job]] = []
    newest: dict[str, list[Job]] = {}  # of each curve
    for job in jobs:
        size, stack = job.cell.model.stack, [job]
        if size > 1 and stacks(job.cell):
            curve = fingerprint({**job.parts, "rule": {**job.parts["rule"], "strength": None}})
            before = newest.get(curve)
            if before is not None and len(before) < size:
                before.append(job)
                continue
            newest[curve] = stack
        found.append(stack)
    return found
