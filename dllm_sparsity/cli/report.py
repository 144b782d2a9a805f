"""dllm-sparsity report: write a run's report again from its sealed cells, without torch."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Write the report of a run again, from disk.")
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write the report of a run directory again from its sealed cells. Needs no model and no GPU."""
    from rich.console import Console

    from dllm_sparsity.comparison import finish
    from dllm_sparsity.report import render, write_report

    result = finish(run, write_report(run))
    Console().print(render(result.summary))
    click.echo(f"\nreport: {result.report}")
