"""The house rules: who may import whom, how long a file is, and what is documented."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    ["errors"],
    ["registry"],
    ["sparsity"],
    ["families"],
    ["bench"],
    ["lm"],
    ["diffusion", "autoregressive"],
    ["study"],
    ["analysis"],
    ["report"],
    ["layerwise"],
    ["compare", "comparison"],
    ["cli"],
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
RECORDS = "dllm_sparsity.study.records"
DATA_ROOMS = {"pair": ("errors", "registry", "pair"), "tasks": ("errors", "registry", "tasks", "pair")}
FILES = sorted([*(ROOT / "dllm_sparsity").rglob("*.py"), *(ROOT / "autoregressive").rglob("*.py")])
NO_TORCH = ("study.records", "study.config", "study.rundir", "analysis", "report", "cli", "registry")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    parts = module.split(".")
    if parts[0] == "autoregressive":
        return "autoregressive"
    return parts[1] if len(parts) > 1 else ""


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def only_for_types(tree: ast.Module) -> set[ast.AST]:
    """Return the nodes below `if TYPE_CHECKING:`."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


def imports(path: Path, types: bool = True) -> set[str]:
    """Return the full names that a file imports: modules, and what it takes from them."""
    tree, package = tree_of(path), name_of(path).split(".")
    left_out = set() if types else only_for_types(tree)
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = package if path.name == "__init__.py" else package[:-1]
                base = ".".join([*here[: len(here) - node.level + 1], *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def ours(name: str) -> bool:
    return name.split(".")[0] in ("dllm_sparsity", "autoregressive")


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_a_room_imports_from_floors_below(path: Path) -> None:
    module = name_of(path)
    room = room_of(module)
    for target in sorted(name for name in imports(path) if ours(name)):
        other = room_of(target)
        if not room or other == room:
            continue  # the package's own front door is lazy: see the next test
        if room in DATA_ROOMS:
            assert other in DATA_ROOMS[room], f"{module} imports {target}"
            continue
        if other in ("", *DATA_ROOMS):  # dllm_sparsity itself, as `from dllm_sparsity import registry` has its room
            assert other, f"{module} imports {target}"
            continue
        assert other in LEVEL, f"{module} imports {target}: a room without a floor"
        assert room in LEVEL, f"{module}: a room without a floor"
        if LEVEL[other] >= LEVEL[room]:
            pytest.fail(f"{module} imports {target}, which stands no lower")
        if room in ("analysis", "report") and other == "study":
            assert target.startswith(RECORDS), f"{module} imports {target}; only {RECORDS} is open to it"


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("dllm_sparsity") == set()


@pytest.mark.parametrize("path", [p for p in FILES if room_of(name_of(p)) in ("sparsity", "families")], ids=ids)
def test_the_core_needs_torch_and_numpy_alone(path: Path) -> None:
    allowed = {"torch", "numpy", "dllm_sparsity", *sys.stdlib_module_names}
    if path.parent.name == "kernels":
        allowed.add("triton")  # comes with torch for a GPU; on a CPU nothing asks for it
    if path.parent.name == "families":
        allowed.add("transformers")  # whose experts are a family
    assert {name.split(".")[0] for name in imports(path, types=False)} <= allowed
    assert {name.split(".")[0] for name in imports(path)} <= {*allowed, "jaxtyping"}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_jaxtyping_is_for_the_type_checker(path: Path) -> None:
    assert not any(name.split(".")[0] == "jaxtyping" for name in imports(path, types=False))


def loaded_by(module: str) -> set[str]:
    heavy = ("torch", "transformers", "lm_eval", "ray", "diffusers", "datasets")
    code = f"import sys; import {module}; print(*[n for n in {heavy} if n in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.split())


def light_modules() -> list[str]:
    found = []
    for path in FILES:
        module = name_of(path)
        if path.stem == "__main__":
            continue
        below = module.removeprefix("dllm_sparsity.")
        if module.startswith("dllm_sparsity.") and any(
            below == light or below.startswith(f"{light}.") for light in NO_TORCH
        ):
            found.append(module)
    return found


def test_disk_to_report_needs_no_torch() -> None:
    modules = light_modules()
    code = "; ".join(["import sys", *(f"import {module}" for module in modules), "print('torch' in sys.modules)"])
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    if ran.stdout.strip() != "False":
        guilty = [module for module in modules if "torch" in loaded_by(module)]
        pytest.fail(f"these import torch: {guilty}")


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_length_and_first_line(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    first = ast.get_docstring(tree_of(path))
    assert first, "the first line says what the file is for"
    assert text.lstrip().startswith('"""')


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_no_assert_and_no_print(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: raise an error instead of assert"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno}: print"


def public(tree: ast.Module) -> list[ast.AST]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    top = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    inner = [
        member
        for node in top
        if isinstance(node, ast.ClassDef)
        for member in node.body
        if isinstance(member, kinds) and not member.name.startswith("_")
    ]
    return [*top, *inner]


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_every_public_name_is_documented(path: Path) -> None:
    missing = [
        f"{node.name} (line {node.lineno})"
        for node in public(tree_of(path))
        if not ast.get_docstring(node)
        and not any("overload" in ast.unparse(mark) or "override" in ast.unparse(mark) for mark in node.decorator_list)
    ]
    assert not missing


@pytest.mark.parametrize("path", [path for path in FILES if not path.stem.startswith("triton")], ids=ids)
def test_every_argument_is_annotated(path: Path) -> None:  # Triton's functions take no Python types
    bare = [
        f"{node.name}({argument.arg})"
        for node in public(tree_of(path))
        if not isinstance(node, ast.ClassDef)
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if argument.annotation is None and argument.arg not in ("self", "cls")
    ]
    assert not bare
