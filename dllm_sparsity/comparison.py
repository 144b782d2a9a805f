"""compare(): run a study, analyse it, write its report."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dllm_sparsity.analysis.allocated import Searched
from dllm_sparsity.analysis.averaged import SearchedAverage
from dllm_sparsity.analysis.averages import KINDS, name_of
from dllm_sparsity.analysis.column import Column
from dllm_sparsity.analysis.mixture import Mixture
from dllm_sparsity.analysis.search import LADDER, Ask, Goal, Limits, Search, boundaries
from dllm_sparsity.analysis.searched import SearchedCurve, open_cell
from dllm_sparsity.errors import UserError
from dllm_sparsity.layerwise import Place, allocated
from dllm_sparsity.study.config import ModelConfig, RuleConfig, StudyConfig, TaskSpec, build_config, read_config
from dllm_sparsity.study.engines import Engine
from dllm_sparsity.study.files import write_whole, writing
from dllm_sparsity.study.plan import Asks, Cell, Loaded, block_cell, with_block
from dllm_sparsity.study.tasks import LoadedTask
from dllm_sparsity.study.track import ExperimentTracker, Tracking

_A, _T = TypeVar("_A"), TypeVar("_T")
_log = logging.getLogger(__name__)
EMBEDDED_STUDY = Path(__file__).parent / "pair" / "study.yaml"


@dataclass(frozen=True)
class Comparison:
    """What a study found.

    Args:
        path: The run directory.
        report: The HTML report.
        summary: What summary.json holds.
    """

    path: Path
    report: Path
    summary: dict[str, Any]

    def table(self) -> list[dict[str, Any]]:
        """Return the main table: one row per task, site and paradigm."""
        from dllm_sparsity.analysis import headline

        return headline(self.summary)

    def _repr_html_(self) -> str:
        from html import escape

        rows = self.table()
        head = "".join(f"<th>{escape(name)}</th>" for name in rows[0]) if rows else ""
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(str(value))}</td>" for value in row.values()) + "</tr>" for row in rows
        )
        return f"<table><tr>{head}</tr>{body}</table><p>{escape(str(self.report))}</p>"


def compare(
    config: StudyConfig | Mapping[str, Any] | str | Path | None = None,
    out: str | Path | None = None,
    progress: Any = None,
    engine: str | Engine = "local",
    track: str | ExperimentTracker | None = None,
) -> Comparison:
    """Compare the activation sparsity of autoregressive and diffusion language models.

    Args:
        config: A study, its fields, or its YAML file; None runs the embedded study.
        out: The run directory; `runs/<name>` when None. The same directory continues where an earlier run stopped.
        progress: Told what happens; nothing is shown when None.
        engine: Who does the work: `local`, `ray`, `ray://HOST:PORT`, `slurm`, or an `Engine`.
        track: trackio, wandb, or an object of one's own: told the numbers of each cell, and at the end of the study.

    Returns:
        Where everything is, and the summary.

    Raises:
        UserError: Something in the study, a model or a task is wrong; finished cells stay.

    Example:
        >>> compare().table()  # doctest: +SKIP
    """
    from dllm_sparsity.analysis.logged import cell_numbers, study_numbers
    from dllm_sparsity.report import write_report
    from dllm_sparsity.study.engines.runner import Silent, run_study

    study = as_config(config)
    place = Path(out) if out is not None else Path("runs") / study.name
    searches = Searches(study) if study.search is not None else None
    who = Engine.parse(engine) if isinstance(engine, str) else engine
    told = Tracking(track, study, place, progress or Silent(), lambda folder: cell_numbers(open_cell(folder)))
    with told, run_study(study, place, told, searches, who) as rundir:
        if searches is not None:
            searches.write(rundir.path)
        result = finish(rundir.path, write_report(rundir.path))
        told.end(study_numbers(result.summary))
        return result


def finish(path: Path, report: Path) -> Comparison:
    """Read a finished report back.

    Args:
        path: The run directory.
        report: Its report.
    """
    report = report.resolve()
    if report.is_relative_to(Path.cwd()):
        report = report.relative_to(Path.cwd())
    return Comparison(path, report, json.loads((path / "summary.json").read_text(encoding="utf-8")))


def as_config(config: StudyConfig | Mapping[str, Any] | str | Path | None) -> StudyConfig:
    """Return a validated study, whatever form it is given in.

    Args:
        config: As in `compare`.
    """
    if isinstance(config, StudyConfig):
        return build_config(config.model_dump(exclude_unset=True))
    if isinstance(config, Mapping):
        return build_config(dict(config))
    return read_config(config if config is not None else EMBEDDED_STUDY)


class Searches:
    """The searches of a study: for each model, rule and site one on each task, and one on the average over tasks.

    Args:
        study: The study; it has a search.
    """

    def __init__(self, study: StudyConfig) -> None:
        self.study = study
        self.answers: list[dict[str, Any]] = []
        self.averages: list[dict[str, Any]] = []

    def __call__(self, model: ModelConfig, tasks: Sequence[Loaded]) -> Iterator[Asks]:
        """Yield a loop for each curve of a model on a task, or on the average over tasks.

        Args:
            model: The model.
            tasks: The task, or several: as the user gave them, and loaded.
        """
        for rule in self.study.rules:
            for site in rule.sites:
                if len(tasks) > 1:
                    yield self._average(model, tasks, rule, site)
                else:
                    ((spec, task),) = tasks
                    yield _on(task, self._loop(model, spec, task.items, rule, site))

    def _loop(
        self, model: ModelConfig, spec: TaskSpec, items: int, rule: RuleConfig, site: str
    ) -> Generator[Cell, Path, None]:
        search = partial(self._curve, model, spec, items)
        if self.study.search is not None and self.study.search.layerwise:
            self.answers += yield from allocated(Place(self.study, model, spec, items, rule, site), search)
        else:
            self.answers += (yield from search(rule, site)).answers

    def _curve(
        self,
        model: ModelConfig,
        spec: TaskSpec,
        items: int,
        rule: RuleConfig,
        site: str,
        shares: Sequence[float] = LADDER,
    ) -> Generator[Cell, Path, Searched]:
        asked = self.study.search
        if asked is None:
            raise RuntimeError("a study without a search has no loops")
        curve = yield from self._open(model, spec, items, rule, site)
        limits = Limits(asked.width, items, asked.budget)
        search = Search(ladder_of(rule, shares), [curve.threshold(own) for own in asked.retentions], limits)

        def measured(ask: Ask) -> Generator[Cell, Path, Column]:
            cell = block_cell(self.study, model, spec, (rule, site), ask.strength)
            folder = yield with_block(cell, ask.start, ask.stop)
            return curve.column(open_cell(folder), (ask.start, ask.stop))

        goals = yield from _answered(search, measured)
        return Searched(curve, search, [curve.answer(goal, search, asked.width) for goal in goals])

    def _open(
        self, model: ModelConfig, spec: TaskSpec, items: int, rule: RuleConfig, site: str
    ) -> Generator[Cell, Path, SearchedCurve]:
        """Measure the first dense items, from which it is known what quality there is."""
        quality = None if self.study.search is None else self.study.search.quality
        cell = block_cell(self.study, model, spec, (rule, site), None)
        curve = SearchedCurve(open_cell((yield with_block(cell, 0, boundaries(items)[0]))), quality, site)
        layers = None if rule.layers is None else list(rule.layers)  # said anew by the first sparse cell
        curve.setting = {"rule": rule.name, "rule_parameters": rule.parameters, "layers": layers}
        return curve

    def _average(self, model: ModelConfig, tasks: Sequence[Loaded], rule: RuleConfig, site: str) -> Asks:
        """Search the averages over the tasks of each kind of quality."""
        kinds: dict[str, list[tuple[TaskSpec, LoadedTask, SearchedCurve]]] = {kind: [] for kind in KINDS}
        for spec, task in tasks:
            curve = yield from _on(task, self._open(model, spec, task.items, rule, site))
            if curve.quality["kind"] in kinds:
                kinds[curve.quality["kind"]].append((spec, task, curve))
        several = {kind: own for kind, own in kinds.items() if len(own) > 1}
        for kind, own in several.items():
            mixture = Mixture([task.items for _, task, _ in own])
            name = name_of(len(own), kind if len(several) > 1 else None)
            average = SearchedAverage(tuple(curve for *_, curve in own), mixture, name)
            yield from self._averaged(model, [both[:2] for both in own], rule, average)

    def _averaged(
        self, model: ModelConfig, tasks: Sequence[Loaded], rule: RuleConfig, average: SearchedAverage
    ) -> Asks:
        asked, curve = self.study.search, (rule, average.curves[0].site)
        if asked is None:
            raise RuntimeError("a study without a search has no loops")
        limits = Limits(asked.width, average.mixture.items, asked.budget, average.mixture.least)
        search = Search(ladder_of(rule), [average.threshold(own) for own in asked.retentions], limits)

        def measured(ask: Ask) -> Generator[tuple[Cell, LoadedTask], Path, Column]:
            block, cells = (ask.start, ask.stop), []
            for (spec, task), part in zip(tasks, average.mixture.parts(*block), strict=True):
                cell = with_block(block_cell(self.study, model, spec, curve, ask.strength), *part)
                cells.append(open_cell((yield replace(cell, average=True), task)))
            return average.column(cells, block)

        goals = yield from _answered(search, measured)
        self.averages += [average.answer(goal, search, asked.width) for goal in goals]

    def write(self, path: Path) -> None:
        """Write search.json: every answer, and those on averages over tasks. Where the one before is damaged, say so.

        Args:
            path: The run directory.
        """
        from dllm_sparsity.analysis.checking import read_search
        from dllm_sparsity.analysis.summary import clean

        place, found = path / "search.json", clean({"curves": self.answers, "averages": self.averages})
        try:
            read_search(place)
        except UserError as error:
            _log.warning("%s; it is written anew", error.message)
        with writing(path):
            write_whole(place, json.dumps(found, indent=1, allow_nan=False))


def _answered(
    search: Search, measured: Callable[[Ask], Generator[_A, Path, Column]]
) -> Generator[_A, Path, list[Goal]]:
    """Give a search what it asks for."""
    asks = search.run()
    try:
        ask = next(asks)
        while True:
            ask = asks.send((yield from measured(ask)))
    except StopIteration as end:
        return end.value


def _on(task: LoadedTask, loop: Generator[Cell, Path, _T]) -> Generator[tuple[Cell, LoadedTask], Path, _T]:
    """Name the task of each cell that a loop asks for."""
    try:
        cell = next(loop)
        while True:
            cell = loop.send((yield cell, task))
    except StopIteration as end:
        return end.value


def ladder_of(rule: RuleConfig, shares: Sequence[float] = LADDER) -> list[float]:
    """Return strengths from dense to the sparsest there is, a few steps apart.

    Args:
        rule: The rule; one whose range has no end needs strengths.
        shares: Shares of the way, from 0 to 1.

    Raises:
        UserError: The range has no end and no strengths are given.
    """
    from dllm_sparsity import registry

    kind = registry.get("rules", rule.name)
    end = kind.low if kind.denser_upwards else kind.high
    if not math.isfinite(end):
        if not rule.strengths:
            raise UserError(
                f"the strength of {rule.name} has no upper end to search up to", "give it strengths, from dense on"
            )
        return [kind.dense, *sorted(set(rule.strengths), reverse=kind.denser_upwards)]
    last = 0.99 if kind.open_low and end == kind.low else 1.0
    return [round(kind.dense + share * (end - kind.dense), 6) for share in (*shares[:-1], last)]
