"""The registry: names from files, classes on demand, errors that help."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from dllm_sparsity import registry
from dllm_sparsity.errors import UserError


@pytest.mark.parametrize("kind", ["rules", "metrics", "families"])
def test_every_file_is_a_class_with_a_first_line(kind: str) -> None:
    for name in registry.names(kind):
        cls = registry.get(kind, name)
        assert isinstance(cls, type)
        assert registry.name_of(kind, cls) == name
        assert registry.describe(kind, name).startswith(f"{name}: ")


def test_what_is_there() -> None:
    assert registry.names("rules") == ["layerwise", "max_p", "random", "threshold", "top_k", "top_p"]
    assert set(registry.names("metrics")) >= {"density", "overlap"}
    assert set(registry.names("families")) >= {"gated", "fused_gated", "plain", "llada"}


def test_unknown_names() -> None:
    with pytest.raises(UserError, match="unknown rule 'topp'; did you mean top_p") as caught:
        registry.get("rules", "topp")
    assert caught.value.hint == "list them with: dllm-sparsity ls rules"
    with pytest.raises(UserError, match="unknown family 'zzz'"):
        registry.get("families", "zzz")


def test_other_packages_add_names_and_clashes_name_both(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [SimpleNamespace(name="mine", value="collections:OrderedDict")]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "dllm_sparsity.rules" else [])
    registry._targets.cache_clear()
    try:
        assert "mine" in registry.names("rules")
        assert registry.get("rules", "mine").__name__ == "OrderedDict"
        points.append(SimpleNamespace(name="top_p", value="other:TopP"))
        registry._targets.cache_clear()
        with pytest.raises(UserError, match=r"two packages define .*top_p.*rules\.top_p:TopP and other:TopP"):
            registry.names("rules")
    finally:
        monkeypatch.undo()
        registry._targets.cache_clear()


def test_describing_imports_nothing(tmp_path: object) -> None:
    import subprocess

    code = "import sys; from dllm_sparsity import registry; [registry.describe('rules', n) for n in registry.names('rules')]; assert 'torch' not in sys.modules"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert importlib.util.find_spec("dllm_sparsity.sparsity.rules")
