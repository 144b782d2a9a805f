"""The source files that code from outside this package stands in and imports, and their hash. Imports no torch."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

_COVERED = ("dllm_sparsity", "autoregressive", "lm_eval", "torch", "transformers", "tokenizers", "datasets", "numpy")
"""Packages whose code or version a fingerprint has anyway."""
_INSTALLED = {"site-packages", "dist-packages"}


def source_hash(files: Iterable[Path]) -> str:
    """Return a hash of what files hold and of what they import; where they lie does not matter.

    Installed packages are left out, but for the one that a file belongs to.

    Args:
        files: Python files.
    """
    each = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in _with_imports(files))
    return hashlib.sha256("".join(each).encode()).hexdigest()[:16]


def module_files(names: Iterable[str]) -> set[Path]:
    """Return the files of modules that are not covered by this package's own code.

    Args:
        names: Names of modules.
    """
    specs = (importlib.util.find_spec(name) for name in names)
    return {path for spec in specs if spec is not None and (path := _own(spec.origin)) is not None}


def function_files(value: Any) -> set[Path]:
    """Return the files in which the functions of a setting stand, but for those of packages that are covered anyway.

    Args:
        value: A function or class, or a mapping, a sequence or a dataclass that holds some, however deep.
    """
    return {path for function in _functions(value) if (path := _own(_file_of(function))) is not None}


def _functions(value: Any) -> Iterator[Any]:
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):  # lm-eval's are mappings too, and empty
        value = list(vars(value).values())
    elif isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from _functions(each)
    elif callable(value):
        yield value
        yield inspect.unwrap(value)
        if hasattr(value, "func"):  # a partial
            yield from _functions(value.func)


def _file_of(function: Any) -> str | None:
    known = inspect.isroutine(function) or inspect.isclass(function)
    try:
        return inspect.getsourcefile(function if known else type(function))
    except TypeError:  # built in
        return None


def _own(name: str | None) -> Path | None:
    path = Path(name or "").resolve()
    return path if path.suffix == ".py" and path.is_file() and not _covered().intersection(path.parents) else None


@cache
def _covered() -> set[Path]:
    """Return the folders of the packages that are covered; none is imported."""
    specs = (importlib.util.find_spec(name) for name in _COVERED)
    return {Path(spec.origin).resolve().parent for spec in specs if spec is not None and spec.origin}


def _with_imports(files: Iterable[Path]) -> set[Path]:
    found: set[Path] = set()
    left = list(files)
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            left += {target for near in _imports(path) if (target := _own(str(near))) is not None}
    return found


def _imports(path: Path) -> Iterator[Path]:
    """Give the files that a file imports, found without importing; of installed packages its own alone."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    home = _top_folder(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            wanted = [f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names]
        else:
            continue
        for name in wanted:
            parts = name.split(".")
            if isinstance(node, ast.ImportFrom) and node.level:
                yield from _below(path.parents[node.level - 1], parts)
                continue
            for folder in _places(parts[0]):
                if not _INSTALLED.intersection(folder.parts) or folder / parts[0] == home:
                    yield from _below(folder, parts)


def _top_folder(path: Path) -> Path:
    """Return the folder of the outermost package that a file is in."""
    folder = path.parent
    while (folder.parent / "__init__.py").is_file():
        folder = folder.parent
    return folder


def _places(name: str) -> list[Path]:
    """Return the folders in which a module or package of the first level lies."""
    if name in sys.stdlib_module_names or name in _COVERED:
        return []
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return []
    if spec is None:
        return []
    folders = spec.submodule_search_locations
    found = [Path(each).resolve().parent for each in folders] if folders else [Path(spec.origin or "").resolve().parent]
    return list(dict.fromkeys(found))


def _below(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Give the files on the way from a folder to a module, or to a name in one."""
    if (folder / "__init__.py").is_file():
        yield folder / "__init__.py"
    for part in parts:
        if (folder / f"{part}.py").is_file():
            yield folder / f"{part}.py"
            return
        folder /= part
        if (folder / "__init__.py").is_file():
            yield folder / "__init__.py"
