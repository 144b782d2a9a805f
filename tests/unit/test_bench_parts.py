"""The parts of bench that a CPU can run: shapes, shared copies, attention, the race, exact rows, and what it imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tiny_families import hooks

from dllm_sparsity.bench import kernels, timing
from dllm_sparsity.bench.model import build, share
from dllm_sparsity.bench.settings import Settings, plan
from dllm_sparsity.bench.shapes import SHAPES, Shape
from dllm_sparsity.bench.show import render
from dllm_sparsity.bench.variants import Sparsified
from dllm_sparsity.pair import folder
from dllm_sparsity.sparsity.rules.top_p import TopP
from dllm_sparsity.sparsity.sparsifier import sparsify

CPU = torch.device("cpu")
SMALL = {"hidden": 32, "ffn": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "vocabulary": 50}


def tiny(name: str, layers: int = 2, head: bool = False) -> torch.nn.Module:
    return build(replace(SHAPES[name], **SMALL), layers, torch.float32, CPU, head)


def test_the_embedded_shape_is_the_pairs() -> None:
    config = json.loads((folder("autoregressive") / "config.json").read_text())
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    widths = [config[name] for name in (*names, "head_dim", "vocab_size")]
    assert SHAPES["embedded"] == Shape("Llama", *widths)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_can_be_sparsified_and_looks_the_right_way(name: str) -> None:
    model = tiny(name)
    ids = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 50
    with torch.no_grad():
        first, second = (model(input_ids=each, use_cache=False)[0][:, 0] for each in (ids, other))
    assert torch.equal(first, second) == SHAPES[name].causal
    with torch.no_grad(), sparsify(model, TopP(0.5), ("input", "gate", "up", "intermediate")) as tracker:
        model(input_ids=ids, use_cache=False)
    assert 0 < tracker.read().sparsity() < 1


@pytest.mark.parametrize("name", ["llama-3.1-8b", "dream-7b", "qwen2.5-7b"])
def test_attention_is_that_of_transformers(name: str) -> None:
    model = tiny(name, head=True)
    ids = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model(input_ids=ids, use_cache=False).logits
        model.set_attn_implementation("eager")
        theirs = model(input_ids=ids, use_cache=False).logits
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_shared_copy_has_the_weights_and_not_the_hooks() -> None:
    model = tiny("embedded", layers=1)
    copy = share(model)
    assert [id(weight) for weight in copy.parameters()] == [id(weight) for weight in model.parameters()]
    with sparsify(copy, TopP(0.5)):
        assert hooks(copy) > 0
        assert hooks(model) == 0


def test_a_pass_that_was_not_counted_is_noticed() -> None:
    from contextlib import ExitStack

    ids = torch.zeros(2, 3, dtype=torch.long)
    with torch.inference_mode():
        with ExitStack() as stack:
            ours = Sparsified(stack, tiny("embedded"), ids, TopP(0.5), ("all",), ("density", "overlap"), 3)
            ours.tick()
            ours.run()
        assert set(ours.sparsity()) == {"input", "intermediate"}
        ours._passes += 1
        with pytest.raises(RuntimeError, match="saw 48 rows, 72 passed"):
            ours.sparsity()


def test_contestants_run_in_turn() -> None:
    calls: list[str] = []
    watch = timing.Watch(CPU)
    made = [
        timing.Contestant("a", lambda: calls.append("a")),
        timing.Contestant("b", lambda: calls.append("b"), before=lambda: calls.append("."), over="a"),
    ]
    first, second = timing.race(made, repeats=3, warmup=1, watch=watch)
    assert "".join(calls) == "a.b" * 4
    assert len(first["seconds"]) == len(second["seconds"]) == 3
    assert "ratio" not in first
    ratios = sorted(b / a for a, b in zip(first["seconds"], second["seconds"], strict=True))
    assert (second["ratio_min"], second["ratio"], second["ratio_max"]) == tuple(ratios)


def test_exact_rows() -> None:
    tiny_number = 2.0**-60
    rows = torch.tensor([[1.0, 2.0, 0.5], [1.0, tiny_number, 0.0], [0.0, 0.0, 0.0], [tiny_number, tiny_number, 0.0]])
    assert kernels.exact_rows(rows).tolist() == [True, False, True, True]
    assert kernels.exact_rows(rows.bfloat16()).tolist() == [True, False, True, True]


def test_masks_that_differ_are_counted() -> None:
    rows = torch.tensor([[1.0, 2.0], [1.0, 2.0**-70], [3.0, 4.0]])
    ours = torch.tensor([[True, True], [True, True], [False, True]])
    theirs = torch.tensor([[True, True], [True, False], [True, True]])
    found = kernels.compare_masks(rows, ours, theirs)
    assert found == {"rows": 3, "exact": 2, "differ": 2, "differ_exact": 1}


def test_rows_are_the_same_in_every_run() -> None:
    first, second = (kernels.make_rows(4, 100, torch.bfloat16, CPU) for _ in range(2))
    assert torch.equal(first, second)
    assert first.dtype == torch.bfloat16


def test_what_is_left_open_is_chosen() -> None:
    chosen = plan(Settings(device="cpu"))
    assert (chosen.name, chosen.layers, chosen.dtype) == ("embedded", 5, torch.float32)
    assert chosen.batches == ((8, 64), (1, 64), (1, 1))
    assert not chosen.is_graph(1, 1)
    there = replace(chosen, device=torch.device("cuda", 0))
    assert [there.is_graph(*size) for size in ((8, 512), (1, 512), (2, 512), (1, 1))] == [False, True, True, True]
    assert replace(there, mode="graph").is_graph(8, 512)
    assert not replace(there, mode="eager").is_graph(1, 1)
    json.dumps(there.describe())


def test_a_gpus_results_fit_80_columns() -> None:
    from rich.console import Console

    def timed(name: str, over: str | None, mode: str = "eager", **more: float) -> dict:
        ratios = {"ratio": 71.234, "ratio_min": 65.0, "ratio_max": 1234.5} if over else {}
        seconds = {f"{kind}_seconds": 0.00416 for kind in ("median", "min", "max")}
        return {"name": name, "mode": mode, "over": over, **seconds, **ratios, **more}

    raced = [
        timed("dense", None, "graph"),
        timed("sparsified, all statistics", "dense", "graph"),
        timed("dense, eager", None),
        timed("the paper's hooks", "dense, eager"),
    ]
    masks = {"rows": 4096, "exact": 4000, "differ": 2, "differ_exact": 0}
    passed = [timed("copy", None, floor_share=0.93), timed("the paper's function", "the rule")]
    chosen = replace(plan(Settings(device="cpu")), name="llama-3.1-8b", sites=("input", "gate", "up", "intermediate"))
    shown = {
        "environment": {
            "device": "NVIDIA H200",
            "threads": 16,
            "packages": {"torch": "2.11.0+cu128", "triton": "3.6.0", "transformers": "5.17.0"},
            "date": "2026-11-24T00:00:00+00:00",
        },
        "settings": chosen.describe(),
        "models": [
            {
                "batch": 1,
                "tokens": 512,
                "mode": "graph",
                "timings": raced,
                "clock_seconds": 1e-4,
                "sparsity": {"up": 0.5},
                "sites": {"made by the kernel": 16, "hooked": 0},
                "difference_from_paper": 0.0,
            }
        ],
        "kernels": {
            "bandwidth_bytes_per_second": 4.3e12,
            "passes": [{"rows": 4096, "width": 14336, "timings": passed, "masks": masks}],
        },
        "notes": [],
    }
    console = Console(width=80)
    with console.capture() as captured:
        console.print(render(shown))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(captured.get().split())
    for part in ("1x512 tokens, CUDA graphs", "the paper's hooks, eager", "71.23x 65.00-1234", "93 %", "4.30 TB/s"):
        assert part in text, captured.get()
    assert "2 masks differ from the paper's, 0 of them among the 4000 rows whose float64 sum is exact" in text


def test_it_imports_with_few_packages() -> None:
    absent = ("lm_eval", "datasets", "diffusers", "accelerate", "pyarrow", "pydantic", "plotly", "rich", "jaxtyping")
    modules = ("run", "show", "kernels", "variants", "against", "environment", "settings", "shapes", "model", "timing")
    code = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in absent)
    code += "".join(f"import dllm_sparsity.bench.{name}\n" for name in modules)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_the_kernel_part_under_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    code = (
        "import torch\nfrom dllm_sparsity.bench import kernels\nfrom dllm_sparsity.sparsity.rules.top_p import TopP\n"
        "rows = kernels.make_rows(2, 40, torch.bfloat16, torch.device('cpu'))\n"
        "found = kernels.race_kernels(rows, TopP(0.9), None, 1e9, 1)\n"
        "print(*[f\"{timed['name']}:{timed['bytes_an_element']}\" for timed in found['timings']])\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert ran.stdout.strip() == "copy:4 the rule:4 the rule, all statistics:4.375", ran.stderr
