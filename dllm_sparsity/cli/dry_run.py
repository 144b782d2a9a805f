"""What compare --dry-run prints: what a study would take, and the command that runs it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dllm_sparsity.cli.dry_run_table import duration, short, table
from dllm_sparsity.cli.naming import named

if TYPE_CHECKING:
    from dllm_sparsity.cli.gate import Gate
    from dllm_sparsity.study.config import StudyConfig
    from dllm_sparsity.study.dry_run import DryRun, Part
    from dllm_sparsity.study.engines import Engine

SPARSITIES = (0.25, 0.5, 0.75, 0.9)


def dry_run(
    config: StudyConfig, path: Path | None, as_json: bool, engine: Engine, gate: Gate | None, track: str | None
) -> bool:
    """Print what a study would take.

    Args:
        config: The study.
        path: Its file, where it was given as one.
        as_json: Print one JSON object instead of tables.
        engine: Who is to answer.
        gate: The condition of --fail-if, or None.
        track: Name of a tracker, or None.

    Returns:
        Whether nothing keeps it from running.

    Raises:
        UserError: The run would refuse the engine or the tracker.
    """
    from dllm_sparsity.cli.silence import silence
    from dllm_sparsity.study.dry_run import dry_run as find_out
    from dllm_sparsity.study.engines.ahead import workers_ahead
    from dllm_sparsity.study.plan import expand, stack_sizes
    from dllm_sparsity.study.track import check_tracker

    if track is not None:
        check_tracker(track)
    workers = workers_ahead(engine, config, len(stack_sizes(expand(config))))
    with _Telling() as tell, silence():
        found = find_out(config, tell)
    found.problems, found.notes = ([named(line, path) for line in own] for own in (found.problems, found.notes))
    if gate is not None and all(part.work is not None for part in found.parts):
        from dllm_sparsity.cli.gate_names import unknown_ahead

        found.problems += unknown_ahead(gate, config, dict.fromkeys(part.task for part in found.parts))
    command = None if found.problems else _command()
    if as_json:
        click.echo(json.dumps(_plain(found, config, command, engine, workers), allow_nan=False))
        return not found.problems
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(table(found.parts, console.width))
    for line in _lines(found, config, engine, workers):
        console.print(Text(line))
    for problem in found.problems:
        console.print(Text(f"problem: {problem}", style="red"), soft_wrap=not console.is_terminal)
    last = "put right what is said above" if command is None else f"to run it: {command}"
    console.print(Text(f"\nnothing was run or written; {last}"), soft_wrap=True)
    return not found.problems


class _Telling:
    """Say on a terminal what the dry run is at, on a line that is wiped afterwards."""

    def __enter__(self) -> Callable[[str], None]:
        self.stream = sys.stderr
        self.is_shown = self.stream.isatty()
        return self.tell

    def tell(self, text: str) -> None:
        if self.is_shown:
            self.stream.write(f"\r\x1b[2K{text}")
            self.stream.flush()

    def __exit__(self, *_: object) -> None:
        if self.is_shown:
            self.stream.write("\r\x1b[2K")


def _command() -> str:
    """Return this command without --dry-run and --json."""
    return shlex.join(["dllm-sparsity", *(part for part in sys.argv[1:] if part not in ("--dry-run", "--json"))])


def _plain(
    found: DryRun, config: StudyConfig, command: str | None, engine: Engine, workers: int | None
) -> dict[str, Any]:
    from dataclasses import asdict

    totals = _totals(found.parts)
    totals["wall_seconds"] = _wall_seconds(totals["seconds"], found, engine, workers)
    told = {"engine": engine.kind, "workers": workers, "command": command}
    return {**asdict(found), "saved": _saved(found, config), "totals": totals, **told}


def _wall_seconds(seconds: float | None, found: DryRun, engine: Engine, workers: int | None) -> float | None:
    """Return the time from start to end, from that of one worker; None where it is not known."""
    if seconds is None or workers is None:
        return None
    return seconds if _share_cores(found, engine) else seconds / workers


def _share_cores(found: DryRun, engine: Engine) -> bool:
    """Tell whether all workers compute on the cores that the timed steps had to themselves."""
    return engine.kind == "local" and found.device == "cpu"


def _totals(parts: list[Part]) -> dict[str, float | None]:
    """Return sums over all parts; None where one of them is not known."""

    def total(values: list[Any]) -> Any:
        return None if any(value is None for value in values) else sum(values)

    return {
        "forwards": total([part.forwards for part in parts]),
        "ffn_flops": total([part.ffn_flops for part in parts]),
        "flops": total([part.flops for part in parts]),
        "disk": total([part.disk if part.work else None for part in parts]),
        "seconds": total([part.seconds for part in parts]),
    }


def _saved(found: DryRun, config: StudyConfig) -> list[dict[str, Any]]:
    """Return which share of FLOPs each asked site would save at some sparsities, by model."""
    from dllm_sparsity.analysis.flops import ffn_flops_saved

    rows = []
    for name, model in found.models.items():
        mine = [part for part in found.parts if part.model == name and part.flops and part.ffn_flops]
        if mine:
            share = sum(part.ffn_flops or 0 for part in mine) / sum(part.flops or 0 for part in mine)
        else:
            share = model["ffn_flops"] / model["flops"] if model["flops"] else None
        for site in dict.fromkeys(site for rule in config.rules for site in rule.sites):
            for sparsity in SPARSITIES:
                primitive = ("input", "intermediate") if site == "all" else (site,)
                ffn = ffn_flops_saved(site, dict.fromkeys(primitive, sparsity), model["gated"])
                whole = None if ffn is None or share is None else ffn * share
                rows.append({"model": name, "site": site, "sparsity": sparsity, "ffn": ffn, "whole_model": whole})
    return rows


def _lines(found: DryRun, config: StudyConfig, engine: Engine, workers: int | None) -> Iterator[str]:
    totals = _totals(found.parts)
    known = {name: "not known" if value is None else short(value) for name, value in totals.items()}
    searched = sum(part.searched for part in found.parts)
    cells = [f"{found.cells:,}"] if found.cells or not searched else []
    cells += [f"about {searched:,} of searches, each on a block of items"] if searched else []
    yield (
        f"cells: {', and '.join(cells)}; forward passes: {known['forwards']}; dense FLOPs: {known['flops']}, "
        f"of these in FFNs: {known['ffn_flops']}; <= where an early end can make it less"
    )
    for name, model in found.models.items():
        flops = "FLOPs not known: how many experts a token passes is not told"
        if model["flops"]:
            share = model["ffn_flops"] / model["flops"]
            flops = f"{short(model['flops'])} dense FLOPs a token, {share:.0%} of them in FFNs"
        yield f"{name}: {model['weights'] / 1e9:.3g} GB of weights, {flops}"
    if totals["seconds"] is not None:
        yield _time(totals["seconds"], found, engine, workers)
    disk = sum(part.disk for part in found.parts)
    at_least = "" if totals["disk"] is not None else "at least "
    yield f"estimated disk: {at_least}{short(disk)}B" if disk else "estimated disk: not known"
    yield "GB: estimated peak of weights, activations, logits and cache; on a GPU at least that of the timed steps"
    yield from _shares(_saved(found, config))
    items = {part.task: (part.detectable, part.comparisons) for part in found.parts if part.detectable is not None}
    for task, (least, comparisons) in items.items():
        among = f"among {comparisons} comparisons" if comparisons > 1 else "by one comparison"
        yield (
            f"{task.rsplit('/', 1)[-1]}: accuracies that differ by {100 * least:.1f} points or more are told apart "
            f"in 4 of 5 studies {among}, without pairing; paired by item, smaller ones are"
        )
    reasons = [
        part.why if part.why.startswith("task ") else f"{part.model} on {part.task}: {part.why}"
        for part in found.parts
        if part.why and not any(part.why in problem for problem in found.problems)  # it is said there
    ]
    reasons += [f"{part.model}: no steps were timed: {part.no_probe}" for part in found.parts if part.no_probe]
    if any(part.work is not None and not part.work.counted_tokens for part in found.parts):
        reasons.append("tokens are estimated where a model's tokenizer is not on this machine")
    for note in dict.fromkeys([*reasons, *found.notes]):
        yield f"note: {note}"


def _time(seconds: float, found: DryRun, engine: Engine, workers: int | None) -> str:
    threads = f", {found.cpu} threads" if found.device == "cpu" else ""
    told = f"estimated time on {found.device}{threads}, from three timed steps of each kind"
    wall = _wall_seconds(seconds, found, engine, workers)
    if wall is None:
        return f"{told}: {duration(seconds)} of one worker; how many there are, the cluster tells"
    if workers == 1:
        return f"{told}: {duration(wall)}"
    if _share_cores(found, engine):
        return f"{told}: {duration(wall)} on {workers} workers, which share these threads"
    like = "" if engine.kind == "local" else " like this machine"
    return f"{told}: {duration(wall)} on {workers} workers{like}; times in the table are those of one"


def _shares(rows: list[dict[str, Any]]) -> Iterator[str]:
    by: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        by.setdefault((row["model"], row["site"]), []).append(row)
    if by:
        yield "FLOPs that zeros would save (of the FFN, of the model); which sparsity is reached, the run tells:"
    for (model, site), own in by.items():
        cells = [
            f"{row['sparsity']:.0%}: {row['ffn']:.0%}"
            + ("" if row["whole_model"] is None else f", {row['whole_model']:.0%}")
            for row in own
            if row["ffn"] is not None
        ]
        if cells:
            yield f"  {model}, {site}: {'; '.join(cells)}"
