"""dllm-sparsity ls: the names that can be used, each with the first line of its file."""

from __future__ import annotations

from pathlib import Path

import click

from dllm_sparsity import registry

_KINDS = ("rules", "samplers", "families", "metrics", "sections", "backends", "tasks")


@click.command(short_help="List rules, samplers, families, tasks, backends.")
@click.argument("kind", type=click.Choice(_KINDS))
@click.option("--all", "everything", is_flag=True, help="With tasks: lm-eval's own tasks too; takes some seconds.")
def ls(kind: str, everything: bool) -> None:
    """List what can be named, with a line about each."""
    if kind != "tasks":
        _print([(name, registry.describe(kind, name).removeprefix(f"{name}: ")) for name in registry.names(kind)])
        return
    import yaml

    folder = Path(__file__).parent.parent / "tasks"
    found = []
    for path in sorted(folder.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        fields = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
        if isinstance(fields, dict) and "task" in fields:
            found.append((str(fields["task"]), first.removeprefix("#").strip().removeprefix(f"{fields['task']}: ")))
    _print(found)
    if everything:
        from lm_eval.tasks import TaskManager

        click.echo("\n".join(sorted(TaskManager().all_tasks)))
    else:
        click.echo("Any other lm-eval task can be given by its name or YAML file; --all lists them.")


def _print(rows: list[tuple[str, str]]) -> None:
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        click.echo(f"{name:<{width}}  {text}".rstrip())


def _loader() -> type:
    """Return a YAML loader that reads lm-eval's `!function` tags as plain text."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: str(node.value))
    return Loader


_Loader = _loader()
