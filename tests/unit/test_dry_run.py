"""The dry run against the run: its forward passes, its FLOPs against torch's own counter, and its smallest difference."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from autoregressive.backend import AutoregressiveBackend
from dllm_sparsity.families import find_ffns
from dllm_sparsity.sparsity.sparsifier import sparsify
from dllm_sparsity.study import dry_run as module
from dllm_sparsity.study.config import ModelConfig, TaskSpec, build_config
from dllm_sparsity.study.cost import costs
from dllm_sparsity.study.models import open_backend
from dllm_sparsity.study.tasks import load_tasks
from dllm_sparsity.study.workload import Workload, make_planner, workload


def run_for_real(lm, task, spec):
    """Return calls, rows and tokens that the model really sees."""
    seen = []

    def count(_, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        seen.append(tuple(ids.shape))

    handle = lm.model.register_forward_pre_hook(count, with_kwargs=True)
    from dllm_sparsity.study.run import needs_greedy

    lm.check_greedy = needs_greedy(task.task)
    task.task.build_all_requests(limit=spec.limit)
    try:
        kind = task.task.instances[0].request_type
        with sparsify(lm.model, None, clock=lm.clock):  # as in a cell
            seen.clear()
            getattr(lm, kind)(task.task.instances)
    finally:
        handle.remove()
    return len(seen), sum(rows for rows, _ in seen)


@pytest.mark.parametrize("paradigm", ["autoregressive", "diffusion"])
@pytest.mark.parametrize("name", ["choice.yaml", "write.yaml", "own.txt"])
def test_the_forward_passes_are_those_of_the_run(material, paradigm, name):
    folder = material / ("ar" if paradigm == "autoregressive" else "dm")
    more = {"mc": 3, "block_length": 3} if paradigm == "diffusion" else {}
    config = ModelConfig(paradigm=paradigm, model=str(folder), batch_size=4, **more)
    spec = TaskSpec(text=str(material / name)) if name == "own.txt" else TaskSpec(name=str(material / name), limit=5)
    (task,) = load_tasks(spec, 0)
    lm = open_backend(config, "cpu", 0)
    planner = make_planner(config, lm.model, {}, lm.tokenizer, 0)
    planned, batches = workload(planner, task, spec)
    forwards, rows = run_for_real(lm, task, spec)
    assert batches
    if planned.bounded:  # the random model may meet the end token
        assert 0 < forwards <= planned.forwards
        assert rows <= planned.rows
    else:
        assert (forwards, rows) == (planned.forwards, planned.rows)


def test_generation_is_bounded_exactly_where_nothing_ends_early(material):
    spec = TaskSpec(name=str(material / "write.yaml"), limit=5)
    (task,) = load_tasks(spec, 0)
    config = ModelConfig(paradigm="diffusion", model=str(material / "dm"), batch_size=4, steps=3, cfg_scale=1.0)
    lm = open_backend(config, "cpu", 0)
    planned, _ = workload(make_planner(config, lm.model, {}, lm.tokenizer, 0), task, spec)
    assert planned.forwards == 2 * 3 * 2  # two batches, three steps, with and without the prompt
    assert planned.bounded


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_of_torchs_own_counter(tied):
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = LlamaConfig(**shape, **heads, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    rows, length = 3, 7
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(rows, length, dtype=torch.long), use_cache=False)
    work = Workload(tokens=rows * length, pairs=rows * length**2, scored=rows * length)
    price = costs(model, find_ffns(model), config.to_dict(), 4)
    ffn, whole = price.flops(work)
    rotary = counter.get_flop_counts()["Global"]
    assert whole == pytest.approx(counter.get_total_flops(), rel=0.01), rotary
    assert ffn == 2 * 3 * 32 * 88 * 3 * rows * length


def test_experts_count_as_often_as_a_token_meets_them():
    from tiny_families import tiny_model

    model = tiny_model("qwen3_moe")
    ffns = find_ffns(model)
    fields = model.config.to_dict()
    price = costs(model, ffns, fields, 4)
    sparse = [ffn for ffn in ffns if ffn.experts]
    assert sparse
    assert fields["num_experts_per_tok"] < sparse[0].experts
    met = sum(6 * f.d_model * f.d_ffn * (fields["num_experts_per_tok"] if f.experts else 1) for f in ffns)
    assert price.ffn == met
    del fields["num_experts_per_tok"]
    assert costs(model, ffns, fields, 4).flops(Workload(tokens=1)) is None


def test_the_smallest_difference_is_the_binomial_one():
    from scipy.stats import norm

    n = 400
    error = math.sqrt(2 * 0.25 / n)
    for comparisons in (1, 50):
        least, point = module.detectable(n, comparisons), norm.ppf(1 - 0.025 / comparisons)
        assert least / error == pytest.approx(point + norm.ppf(0.8), rel=1e-5)
        assert norm.sf(point - least / error) == pytest.approx(0.8, abs=1e-4)
    assert module.detectable(0) == 1.0


def test_a_model_without_weights_is_counted_and_not_timed(material, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "config.json").write_bytes((material / "ar" / "config.json").read_bytes())
    fields = {
        "models": [{"paradigm": "autoregressive", "model": str(folder)}],
        "tasks": [{"name": str(material / "choice.yaml"), "limit": 4}, {"name": "no_such_data"}],
        "rules": [{"name": "top_p", "strengths": [0.9]}],
    }
    found = module.dry_run(build_config(fields))
    first, second = found.parts
    assert first.work.forwards > 0
    assert not first.work.counted_tokens
    assert first.flops > first.ffn_flops > 0
    assert first.seconds is None
    assert "model.safetensors" in first.no_probe
    assert "its tokenizer" in first.no_probe
    assert second.work is None
    assert "no_such_data" in second.why
    assert any("no_such_data" in problem for problem in found.problems)


def test_a_probe_leaves_the_study_timed_and_the_disk_as_it_was(material, study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = module.dry_run(build_config(study))
    assert not found.problems
    assert [part.no_probe for part in found.parts] == [""] * 6
    assert all(part.seconds > 0 and part.peak > 0 and part.disk > 0 for part in found.parts)
    assert found.cells == 2 * 3 * 5
    told = {part.task: part.detectable is not None for part in found.parts}
    assert told == {"tiny_choice": True, "tiny_write": True, "text_own": False}  # a text is neither right nor wrong
    assert {part.comparisons for part in found.parts} == {2 * 4}  # both models' cells are of one family
    first = found.parts[0]
    assert first.detectable == module.detectable(first.work.items, 8) > module.detectable(first.work.items)
    assert not list(tmp_path.iterdir())


def test_strengths_that_share_forward_passes_make_fewer_and_take_more_memory(material, monkeypatch):
    def dry_run(stack):
        fields = {
            "models": [{"paradigm": "autoregressive", "model": str(material / "ar"), "stack": stack}],
            "tasks": [{"name": str(material / "choice.yaml"), "limit": 4}],
            "rules": [{"name": "top_p", "strengths": [0.9, 0.8, 0.7, 0.6, 0.5], "sites": ["input", "all"]}],
        }
        (part,) = module.dry_run(build_config(fields)).parts
        return part

    alone, stacked = dry_run(1), dry_run(4)
    assert (alone.cells, alone.passes, alone.stack) == (11, 11, 1)
    assert (stacked.cells, stacked.runs, stacked.passes, stacked.stack) == (11, 11, 1 + 2 * 2, 4)
    assert stacked.peak > alone.peak
    assert stacked.flops == alone.flops
    monkeypatch.setattr(AutoregressiveBackend, "stacks", False)  # as of a backend of one's own
    found = dry_run(4)
    assert (found.passes, found.stack, found.peak) == (11, 1, alone.peak)
