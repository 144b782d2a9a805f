"""dllm-sparsity report: write a run's report again from its sealed cells, or one of several runs, without torch."""

from __future__ import annotations

from pathlib import Path

import click

from dllm_sparsity.errors import UserError


@click.command(short_help="Write the report of one or several runs, from disk.")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the report: RUN, or runs/<names> of several.")
@click.option("--fail-if", metavar="EXPR", help="Leave with exit code 4 where this holds of the summary's numbers.")
@click.pass_context
def report(context: click.Context, runs: tuple[Path, ...], out: Path | None, fail_if: str | None) -> None:
    """Write the report of a run directory again from its sealed cells. Needs no model and no GPU.

    With --out it goes to another folder, so that RUN may be one that cannot be written to.

    Several run directories are joined into one report. Their models may differ; runs that differ in their tasks,
    seeds, or versions of the packages that compute are refused, and the difference is named.
    """
    from dllm_sparsity.analysis.loading import load
    from dllm_sparsity.cli.gate import Gate, leave
    from dllm_sparsity.comparison import finish
    from dllm_sparsity.report import render, write_report

    gate = Gate(fail_if) if fail_if is not None else None
    if len(runs) == 1:
        place = out or runs[0]
        _refuse_run(out if place.resolve() != runs[0].resolve() else None)
        result = finish(place, write_report(runs[0], out))
    else:
        from dllm_sparsity.analysis.joining import join

        again = next((run for n, run in enumerate(runs) if run.resolve() in [own.resolve() for own in runs[:n]]), None)
        if again is not None:
            raise UserError(f"{again} is given twice", "give each run once")
        loaded = [load(run) for run in runs]
        place = out or Path("runs") / "+".join(dict.fromkeys(run.name for run in loaded))[:120]
        _refuse_run(place)
        result = finish(place, write_report(join(loaded, place.resolve())))
    from rich.console import Console

    Console().print(render(result.summary))
    click.echo(f"\nreport: {result.report}")
    if gate is not None:
        leave(context, gate, result.summary)


def _refuse_run(place: Path | None) -> None:
    """Refuse to write over the report of another run."""
    if place is not None and (place / "cells").is_dir():
        raise UserError(f"{place} is a run of its own", "give another folder with --out")
