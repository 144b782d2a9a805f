"""The bench on a terminal, in 80 columns; needs the package rich, which nothing else here does."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import dedent
from typing import Any

_HEADER = ("median", "min", "max", "ratio", "min-max", "floor")


def render(results: dict[str, Any]) -> Any:
    """Return what the terminal shows.

    Args:
        results: From `bench`.
    """
    from rich.console import Group

    parts: list[Any] = [_text(_title(results)), "", _models(results["models"])]
    if results["kernels"] is not None:
        parts += ["", _kernels(results["kernels"]["passes"])]
    return Group(*parts, "", *(_text(line) for line in _notes(results)))


def _title(results: dict[str, Any]) -> str:
    settings, machine = results["settings"], results["environment"]
    packages = ", ".join(
        f"{name} {machine['packages'][name]}"
        for name in ("torch", "triton", "transformers")
        if machine["packages"][name] != "not installed"
    )
    return dedent(f"""\
        {settings["shape"]}, {settings["layers"]} of {settings["shape_layers"]} layers, random weights, \
{settings["dtype"]}; LM head {"included" if settings["head"] else "left out"}
        {settings["rule"]} {settings["strength"]:g} at {", ".join(settings["sites"])}
        {machine["device"]}, {machine["threads"]} CPU threads; {packages}
        {settings["repeats"]} rounds, each of them all variants in turn; {machine["date"][:10]}""")


def _models(models: Sequence[dict[str, Any]]) -> Any:
    table = _table("forward pass, ms", floor=False)
    for model in models:
        how = "CUDA graphs" if model["mode"] == "graph" else "eager"
        _head(table, f"{model['batch']}x{model['tokens']} tokens, {how}")
        for timed in model["timings"]:
            stays_eager = timed["mode"] != model["mode"] and "eager" not in timed["name"]
            _row(table, timed, 1e3, f"{timed['name']}, eager" if stays_eager else timed["name"])
    return table


def _kernels(passes: Sequence[dict[str, Any]]) -> Any:
    table = _table("one site, us", floor=True)
    for each in passes:
        _head(table, f"{each['rows']} rows of {each['width']}")
        for timed in each["timings"]:
            share = f"{100 * timed['floor_share']:.0f} %" if "floor_share" in timed else ""
            _row(table, timed, 1e6, timed["name"], share)
    return table


def _table(title: str, floor: bool) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    table.add_column(title, min_width=28)
    for name in _HEADER if floor else _HEADER[:-1]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _head(table: Any, line: str) -> None:
    table.add_row(_text(line, "bold"))


def _row(table: Any, timed: dict[str, Any], units: float, name: str, *more: str) -> None:
    times = [_number(timed[f"{kind}_seconds"] * units) for kind in ("median", "min", "max")]
    ratio = ["", ""]
    if timed["over"] is not None:
        ratio = [f"{_number(timed['ratio'])}x", f"{_number(timed['ratio_min'])}-{_number(timed['ratio_max'])}"]
    table.add_row(_text(f"  {name}"), *times, *ratio, *more)


def _notes(results: dict[str, Any]) -> list[str]:
    models, passes = results["models"], results["kernels"]
    lines = ["Ratios are over dense, the median of the rounds' own ratios with their least and largest."]
    for model in models:
        size, sparsity = f"{model['batch']}x{model['tokens']}", model["sparsity"]
        lines.append(
            f"{size}: zeros {', '.join(f'{site} {100 * share:.1f} %' for site, share in sparsity.items())}; sites "
            f"{', '.join(f'{count} {how}' for how, count in model['sites'].items())}; "
            f"telling the clock of a step, not timed above: {model['clock_seconds'] * 1e3:.3f} ms."
        )
        if model["difference_from_paper"] is not None:
            lines.append(f"{size}: {_difference(model['difference_from_paper'])}")
    if any(timed["mode"] != model["mode"] for model in models for timed in model["timings"]):
        lines.append(
            "The paper's hooks wait for the device, so no CUDA graph can hold them: they run eagerly, over dense run "
            "eagerly."
        )
    if passes is not None:
        speed = passes["bandwidth_bytes_per_second"] / 1e12
        lines.append(
            "One site: L2 cache flushed before each call. Ratios are over the copy, the paper's over the rule. Floor: "
            f"what the least bytes take at the {speed:.2f} TB/s of a copy of 1 GiB in this run, over the time."
        )
        lines += [_masks(each) for each in passes["passes"] if each["masks"] is not None]
    return [*lines, *(f"note: {note}" for note in results["notes"])]


def _difference(share: float) -> str:
    if share == 0:
        return "the model's output is that of the paper's hooks, bit for bit."
    return f"the model's output differs from that of the paper's hooks by up to {share:.1e} of its largest entry."


def _masks(each: dict[str, Any]) -> str:
    masks = each["masks"]
    return (
        f"{each['rows']} rows of {each['width']}: {masks['differ']} masks differ from the paper's, "
        f"{masks['differ_exact']} of them among the {masks['exact']} rows whose float64 sum is exact."
    )


def _number(value: float) -> str:
    """Return four digits, or all before the point."""
    return f"{value:.{max(0, 3 - len(str(int(value))) + 1)}f}" if value < 1e3 else f"{value:.0f}"


def _text(content: str, style: str = "") -> Any:
    from rich.text import Text

    return Text("".join(mark for mark in content if mark.isprintable() or mark == "\n"), style=style)
