"""dllm-sparsity bench: what sparsification costs, beside the dense model and the paper's own hooks."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import click

from dllm_sparsity.errors import UserError


class _Batch(click.ParamType):
    """Sequences x tokens, such as 8x512."""

    name = "BxT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Return (sequences, tokens).

        Args:
            value: What was typed.
            param: As click gives it.
            ctx: As click gives it.
        """
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", value)
        if found is None:
            self.fail(f"{value!r} is not sequences x tokens, such as 8x512", param, ctx)
        return int(found[1]), int(found[2])


@click.command(short_help="Time dense, sparsified and the paper's hooks in turn.")
@click.option("--shape", metavar="NAME", help="llama-3.1-8b on a GPU and embedded on a CPU when not given.")
@click.option("--layers", type=click.IntRange(1), help="Layers of the model; 8, or all of a smaller shape.")
@click.option("--batch", multiple=True, type=_Batch(), metavar="BxT", help="Sequences x tokens of each. Repeatable.")
@click.option("--rule", default="top_p", show_default=True, metavar="NAME", help="Sparsification rule.")
@click.option("--strength", type=float, metavar="X", help="Main parameter of the rule; 0.9 for top_p when not given.")
@click.option("--site", "--sites", "sites", multiple=True, metavar="SITE", help="As for compare; all when not given.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="bfloat16 on a GPU.")
@click.option("--device", help="cpu, cuda, cuda:0; a GPU where there is one when not given.")
@click.option(
    "--mode",
    type=click.Choice(["eager", "graph", "auto"]),
    default="auto",
    show_default=True,
    help="auto: CUDA graphs, of dense too, up to 1024 tokens on a GPU.",
)
@click.option("--repeats", type=click.IntRange(1), metavar="N", help="Rounds; 30 on a GPU, 9 on a CPU.")
@click.option("--rows", multiple=True, type=click.IntRange(1), metavar="N", help="Rows for the kernel. Repeatable.")
@click.option("--head", is_flag=True, help="Add the LM head, which makes the ratios of a few layers look smaller.")
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A checkout of the paper's repository; its code runs.",
)
@click.option("--json", "file", type=click.Path(path_type=Path, dir_okay=False), help="Write all times to this file.")
def bench(
    file: Path | None, batch: tuple[tuple[int, int], ...], rule: str, strength: float | None, **options: Any
) -> None:
    """Time a forward pass without and with sparsification, in turn in one process, and print ratios.

    The model has random weights and a published model's widths. On a GPU the kernel is timed too, beside a plain copy.
    """
    if strength is None and rule != "top_p":
        raise UserError(f"no strength given for rule {rule}", "add --strength X")
    if file is not None and not (file.parent.is_dir() and os.access(file if file.exists() else file.parent, os.W_OK)):
        raise UserError(f"cannot write {file}", "give --json a file in a folder that can be written to")
    if options["shape"] is not None:
        from dllm_sparsity.bench.shapes import find

        find(options["shape"])  # before torch is imported

    from dllm_sparsity.bench.run import bench as run
    from dllm_sparsity.bench.settings import Settings

    given = {name: value for name, value in options.items() if value not in (None, (), "")}
    settings = Settings(batches=batch, rule=rule, strength=0.9 if strength is None else strength, **given)
    results = run(settings, say=lambda line: click.echo(line, err=True))
    if file is not None:
        file.write_text(json.dumps(results, allow_nan=False, indent=1) + "\n", encoding="utf-8")

    from rich.console import Console

    from dllm_sparsity.bench.show import render

    Console().print(render(results))
    if file is not None:
        click.echo(f"\ntimes: {file}")
