"""One registry for everything that is one file to add: names, first lines, and classes on demand.

A file `top_p.py` in a registered package is the name `top_p` and holds the class `TopP`. Other packages add theirs
through the entry-point groups `dllm_sparsity.<kind>`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from dllm_sparsity.errors import UserError, did_you_mean

PACKAGES = {
    "rules": "dllm_sparsity.sparsity.rules",
    "metrics": "dllm_sparsity.sparsity.metrics",
    "families": "dllm_sparsity.families",
    "samplers": "dllm_sparsity.diffusion.samplers",
    "sections": "dllm_sparsity.report.sections",
}
FIXED = {
    "backends": {
        "autoregressive": "autoregressive.backend:AutoregressiveBackend",
        "diffusion": "dllm_sparsity.diffusion.backend:DiffusionBackend",
    },
}
_SINGULAR = {"families": "family"}
KINDS = (*PACKAGES, *FIXED)


@cache
def _targets(kind: str) -> dict[str, str]:
    """Return name -> `module:attr` for one kind, our own first, then other packages'."""
    if kind in PACKAGES:
        spec = importlib.util.find_spec(PACKAGES[kind])
        folder = Path(next(iter(spec.submodule_search_locations or []))) if spec else Path()
        stems = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
        found = {stem: f"{PACKAGES[kind]}.{stem}:{_class_name(stem)}" for stem in stems}
    else:
        found = dict(FIXED[kind])
    for point in entry_points(group=f"dllm_sparsity.{kind}"):
        if found.get(point.name, point.value) != point.value:
            raise UserError(
                f"two packages define {kind} {point.name!r}: {found[point.name]} and {point.value}",
                "uninstall one of them, or ask its authors for another name",
            )
        found[point.name] = point.value
    return found


def _class_name(stem: str) -> str:
    return "".join(part.capitalize() for part in stem.split("_"))


def names(kind: str) -> list[str]:
    """Return the registered names of one kind, sorted.

    Args:
        kind: One of `KINDS`.
    """
    return sorted(_targets(kind))


def distributions() -> list[str]:
    """Return the installed packages that register something here, sorted."""
    points = [point for kind in KINDS for point in entry_points(group=f"dllm_sparsity.{kind}")]
    return sorted({point.dist.name for point in points if point.dist is not None})


def get(kind: str, name: str) -> Any:
    """Import and return what a name stands for.

    Args:
        kind: One of `KINDS`.
        name: A registered name, as on the command line.

    Raises:
        UserError: There is no such name.
    """
    check(kind, name)
    return load(_targets(kind)[name])


def check(kind: str, name: str) -> None:
    """Refuse a name that is not registered, without importing anything.

    Args:
        kind: One of `KINDS`.
        name: A name, as on the command line.

    Raises:
        UserError: There is no such name.
    """
    targets = _targets(kind)
    if name not in targets:
        raise UserError(
            f"unknown {_SINGULAR.get(kind, kind[:-1])} {name!r}{did_you_mean(name, list(targets))}",
            f"list them with: dllm-sparsity ls {kind}",
        )


def load(target: str) -> Any:
    """Import what a `module:attr` string names; for a floor above the caller's.

    Args:
        target: The string.
    """
    module, attribute = target.split(":")
    return getattr(importlib.import_module(module), attribute)


def name_of(kind: str, cls: type) -> str:
    """Return the registered name of a class.

    Args:
        kind: One of `KINDS`.
        cls: The class.
    """
    target = f"{cls.__module__}:{cls.__qualname__}"
    return next((name for name, value in _targets(kind).items() if value == target), cls.__name__)


def describe(kind: str, name: str) -> str:
    """Return the first line of the file behind a name, without importing it.

    Args:
        kind: One of `KINDS`.
        name: A registered name.
    """
    module = _targets(kind)[name].split(":")[0]
    package, _, stem = module.rpartition(".")
    spec = importlib.util.find_spec(package)  # imports the package only, never the module
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / f"{stem}.py"
        if path.is_file():
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            return text.partition("\n")[0]
    return ""
