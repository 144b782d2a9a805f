"""dllm-sparsity check: whether studies can run, found out before a weight or a document is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dllm_sparsity.cli.naming import named
from dllm_sparsity.cli.silence import silence
from dllm_sparsity.errors import UserError

if TYPE_CHECKING:
    from dllm_sparsity.study.check import ModelCheck, StudyCheck

_PROBLEM = "problem: "
_SHORT = {"autoregressive": "AR", "diffusion": "diff."}
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@click.command(short_help="Validate studies without weights or data.")
@click.argument("configs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="CONFIG...")
@click.option("--offline", is_flag=True, help="Look nothing up on a network; what is not on this machine is a problem.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as one JSON object.")
@click.pass_context
def check(context: click.Context, configs: tuple[Path, ...], offline: bool, as_json: bool) -> None:
    """Check studies: fields, rules, strengths, samplers, task names, and every site on every layer of every model.

    Models are built without memory for their weights. A model's configuration comes from its folder, else from the
    hub or its cache, else from the descriptions that ship with this package; the output says from where.

    Of models that are not on this machine it asks the hub whether you may have them, and how much there is to
    download for the disk that is there. It compares the weights with the memory, and looks for a mask token, and for
    a chat template where a task asks for one. Whether the data of the tasks is on this machine is noted.

    Exit code 0 when all is well; 1 otherwise, with one line for each problem.
    """
    if offline:
        from dllm_sparsity.study.offline import go_offline

        go_offline()  # before a library of the hub is imported
    with silence():
        found = {str(path): _check(path, len(configs) == 1) for path in configs}
    bad = any(isinstance(each, UserError) or each.problems for each in found.values())
    if as_json:
        click.echo(json.dumps({path: _plain(each) for path, each in found.items()}, allow_nan=False))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        for number, (path, each) in enumerate(found.items()):
            if number:
                console.print()
            for part in _render(path, each):
                is_problem = str(part).startswith(_PROBLEM)  # off a terminal one line for each, whatever its length
                console.print(part, soft_wrap=is_problem and not console.is_terminal)
    if bad:
        context.exit(1)


def _check(path: Path, alone: bool) -> StudyCheck | UserError:
    """Check one file; of several, one that cannot be read does not hide what the others are."""
    from dllm_sparsity.study.config import read_config

    try:
        config = read_config(path)
    except UserError as error:
        if alone:
            raise
        return error
    from dllm_sparsity.study.check import check_study

    found = check_study(config, here=True, data=True)
    problems, notes = (tuple(named(line, path) for line in own) for own in (found.problems, found.notes))
    return replace(found, problems=problems, notes=notes)


def _plain(found: StudyCheck | UserError) -> dict[str, Any]:
    if isinstance(found, UserError):
        return {"problems": [f"{found.message}; {found.hint}"]}
    from dataclasses import asdict

    models = [{**asdict(model), "gigabytes": model.gigabytes} for model in found.models]
    return {**asdict(found), "models": models}


def _render(path: str, found: StudyCheck | UserError) -> Iterator[Any]:
    from rich.text import Text

    yield Text(path, style="bold")
    if isinstance(found, UserError):
        yield Text(f"{_PROBLEM}{found.message}; {found.hint}", style="red")
        return
    yield _table(found.models)
    for label, value in (
        ("sites on every layer", _sites),
        ("configuration", lambda model: model.source),
        ("files of models", _files),
    ):
        yield from (Text(f"{label}: {line}") for line in _grouped(found.models, value))
    cells = [f"{found.cells:,} cells"] if found.cells or not found.searches else []
    cells += ["the search chooses its cells"] if found.searches else []
    yield Text(f"acted on: {', '.join(found.sites)}; {', and '.join(cells)}")
    for note in found.notes:
        yield Text(f"note: {note}")
    for problem in found.problems:
        yield Text(f"{_PROBLEM}{problem}", style="red")
    if any(model.ok and model.lacking != 0 and model.source != "folder" for model in found.models):
        yield Text(f"to fetch what is missing: dllm-sparsity fetch {path}")
    if not found.problems:
        yield Text("OK", style="green")


def _files(model: ModelCheck) -> str | None:
    if model.source is None:
        return None
    if model.lacking == 0:
        return "on this machine"
    if model.source == "folder":
        return "not all in the folder"
    if not model.ok and model.lacking is None:
        return None  # why not is a problem
    return "to be fetched" if model.lacking is None else f"{model.lacking / 1e9:.1f} GB to be fetched"


def _sites(model: ModelCheck) -> str | None:
    return ", ".join(model.sites) if model.source is not None else None


def _grouped(models: tuple[ModelCheck, ...], value: Callable[[ModelCheck], str | None]) -> Iterator[str]:
    """Give what models have in common once, and their names only where they differ."""
    groups: dict[str, list[str]] = {}
    for model in models:
        if (text := value(model)) is not None:
            groups.setdefault(text, []).append(model.name)
    for text, names in groups.items():
        yield text if len(names) == len(models) else f"{text} ({', '.join(names)})"


def _table(models: tuple[ModelCheck, ...]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", expand=False)
    table.add_column("model", overflow="fold", max_width=32)
    table.add_column("")
    columns: dict[str, Callable[[ModelCheck], str]] = {
        "layers": lambda model: f"{model.stacks} x {model.layers}" if model.stacks > 1 else str(model.layers),
        "input x FFN": _widths,
        "params": lambda model: f"{model.parameters / 1e9:.2f} B",
        "weights": lambda model: f"{model.gigabytes[model.dtype]:.1f} GB {_DTYPES[model.dtype]}",
    }
    if any(model.paradigm == "diffusion" for model in models):
        columns["mask"] = lambda model: model.mask_token or "-"
    for name in (*columns, ""):
        table.add_column(name, justify="right", no_wrap=True)
    for model in models:
        cells = ["-" if model.source is None else cell(model) for cell in columns.values()]
        verdict = Text("ok", style="green") if model.ok else Text("no", style="red")
        title = "".join(sign for sign in model.name if sign.isprintable())
        table.add_row(Text(title), Text(_SHORT.get(model.paradigm, model.paradigm)), *map(Text, cells), verdict)
    return table


def _widths(model: ModelCheck) -> str:
    """Write the widths of each kind of FFN on a line of its own, and how many experts have them."""
    return "\n".join(
        f"{f'{experts} of ' if experts else ''}{d_model} x {d_ffn}" for d_model, d_ffn, experts in model.widths
    )
