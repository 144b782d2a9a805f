"""Loads the code released with the paper from a user's checkout, and attaches its hooks; nothing of it is kept here."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

from dllm_sparsity.errors import UserError

_CLONE = "give a checkout of github.com/fszatkowski/activation-sparsity-benchmarking, the paper's code"
_FUNCTION = "sparsify_tensor"
_MANAGER = "SparsificationManager"
_RULES = {"top_p": "topp", "top_k": "topk", "max_p": "maxp"}


class Paper:
    """The paper's own functions.

    Args:
        folder: The checkout.
        rule: Our name of the rule.
        strength: Its main parameter.

    Raises:
        UserError: The folder does not hold the code, the code does not load, or it lacks the rule.
    """

    def __init__(self, folder: Path, rule: str, strength: float) -> None:
        if rule not in _RULES:
            raise UserError(
                f"the paper's code has no rule {rule}", f"it has {', '.join(_RULES)}; or leave --against out"
            )
        self.file = _find(folder)
        self._module, self._rule, self._strength = _load(self.file), _RULES[rule], strength
        self.has_manager = hasattr(self._module, _MANAGER)
        self.commit = _commit(folder)

    @property
    def note(self) -> str:
        """How its hooks get onto a model."""
        way = (
            f"its {_MANAGER}" if self.has_manager else "hooks of ours that call its sparsify_tensor and keep its lists"
        )
        return f"the paper's hooks: by {way}, from {self.file.name}{f' at {self.commit}' if self.commit else ''}"

    def sparsify(self, rows: Tensor) -> Tensor:
        """Return rows after its `sparsify_tensor`, whose counts come back to the host as lists.

        Args:
            rows: `[batch, tokens, width]`.
        """
        return self._module.sparsify_tensor(rows, self._rule, self._strength)[0]

    def attach(self, model: nn.Module, places: Sequence[tuple[str, str]]) -> Callable[[], object]:
        """Put its hooks onto a model for good; returns what forgets the counts so far.

        Args:
            model: A model that is thrown away afterwards.
            places: Path of a module, and which side of it: `input` or `output`.
        """
        return self._attach_manager(model, places) if self.has_manager else self._attach_function(model, places)

    def _attach_manager(self, model: nn.Module, places: Sequence[tuple[str, str]]) -> Callable[[], object]:
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder, "sites.json")
            sites = {"embedding_layer_name": "", "layers_to_sparsify": {}, "modules_to_sparsify": dict(places)}
            config.write_text(json.dumps(sites), encoding="utf-8")
            manager = getattr(self._module, _MANAGER)(
                sparsification_config_path=str(config),
                output_dir=folder,
                sparsification_rule=self._rule,
                th_val=self._strength,
            )
        manager.initialize(SimpleNamespace(model=model))
        return manager.restart

    def _attach_function(self, model: nn.Module, places: Sequence[tuple[str, str]]) -> Callable[[], object]:
        counts: list[Any] = []

        def act(value: Tensor) -> Tensor:
            result, *lists = self._module.sparsify_tensor(value, self._rule, self._strength)
            counts.append(lists)
            return result

        def before(module: nn.Module, args: tuple[Any, ...]) -> Tensor:
            return act(args[0])

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
            return act(output)

        for name, side in places:
            module = model.get_submodule(name)
            if side == "input":
                module.register_forward_pre_hook(before)
            else:
                module.register_forward_hook(after)
        return counts.clear


def _find(folder: Path) -> Path:
    """Return the file that defines the paper's function, its manager of plain models in preference."""
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}", _CLONE)
    defined = {path: _defined(path) for path in sorted(folder.rglob("*.py"))}
    found = [path for path, names in defined.items() if _FUNCTION in names]
    if not found:
        raise UserError(f"no file in {folder} defines {_FUNCTION}", _CLONE)
    return next((path for path in found if _MANAGER in defined[path]), found[0])


def _defined(path: Path) -> set[str]:
    """Return the functions and classes of a file that may be the paper's, without running it."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        tree = ast.parse(text) if f"def {_FUNCTION}(" in text else ast.Module([], [])
    except (OSError, SyntaxError, ValueError):
        return set()
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def _load(file: Path) -> ModuleType:
    """Run one file of a package, with what it takes from files beside it, but not the package itself."""
    top = file.resolve().parent
    packages: list[Path] = []
    while (top / "__init__.py").is_file():
        packages.insert(0, top)
        top = top.parent
    parts = [*(folder.name for folder in packages), file.stem]
    with _own_modules(parts[0]):
        for depth, folder in enumerate(packages, start=1):
            package = ModuleType(".".join(parts[:depth]))
            package.__path__ = [str(folder)]
            sys.modules[package.__name__] = package
        name = ".".join(parts)
        spec: Any = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # foreign code fails in ways of its own
            raise UserError(
                f"{file} does not load: {type(error).__name__}: {error}",
                "install what it needs, or leave --against out",
            ) from error
    return module


@contextmanager
def _own_modules(name: str) -> Iterator[None]:
    """Hide the loaded modules of a package inside the block, and forget those that the block loads."""

    def members() -> dict[str, ModuleType]:
        return {key: sys.modules[key] for key in list(sys.modules) if key == name or key.startswith(f"{name}.")}

    before, writes = members(), sys.dont_write_bytecode
    for key in before:
        del sys.modules[key]
    sys.dont_write_bytecode = True  # a user's checkout stays as it is
    try:
        yield
    finally:
        for key in members():
            del sys.modules[key]
        sys.modules.update(before)
        sys.dont_write_bytecode = writes


def _commit(folder: Path) -> str:
    """Return the short commit of a checkout, or nothing where git does not know it, or knows a folder around it."""
    try:
        asked = ["git", "-C", str(folder), "rev-parse", "--show-toplevel", "--short", "HEAD"]
        ran = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    top, _, commit = ran.stdout.strip().partition("\n")
    return commit if ran.returncode == 0 and Path(top).resolve() == folder.resolve() else ""
