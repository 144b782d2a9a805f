"""A task that runs code which the model wrote runs with consent only, and its answers are kept."""

import json

import pytest
from material import make_study

from dllm_sparsity import compare
from dllm_sparsity.errors import UserError
from dllm_sparsity.study.config import TaskSpec
from dllm_sparsity.study.tasks import load_tasks


@pytest.fixture
def task(material, tmp_path):
    (tmp_path / "utils.py").write_text(
        "def candidates(resps, docs):\n    return [list(each) for each in resps]\n\n"
        "def passes(references, predictions):\n    return {'pass@1': float(len(predictions[0][0]) > 2)}\n"
    )
    path = tmp_path / "code.yaml"
    path.write_text(
        f"task: tiny_code\nunsafe_code: true\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {material}/items.jsonl}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a[0]}}'\n"
        "generation_kwargs: {until: [], max_gen_toks: 6, do_sample: false}\n"
        "metric_list: [{metric: !function utils.passes, aggregation: mean, higher_is_better: true}]\n"
        "filter_list: [{name: made, filter: [{function: custom, filter_fn: !function utils.candidates}]}]\n"
        "metadata: {version: 1}\n"
    )
    return path


def test_without_consent_it_is_refused(task):
    with pytest.raises(UserError, match="runs code that the model wrote") as refused:
        load_tasks(TaskSpec(name=str(task)), 0)
    assert "run_code: true" in refused.value.hint


def test_with_consent_its_score_and_its_answers_are_sealed(task, material, tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    study = make_study(material)
    study["tasks"] = [{"name": str(task), "limit": 2, "run_code": True}]
    study["rules"] = [{"name": "top_p", "strengths": [0.5], "sites": ["all"]}]
    found = compare(study)
    cells = [json.loads(path.read_text()) for path in found.path.glob("cells/*/cell.json")]
    assert {cell["qualities"][0]["name"] for cell in cells} == {"pass@1"}
    answers = [pq.read_table(path)["answer"].to_pylist() for path in found.path.glob("cells/*/samples.parquet")]
    assert all(any(answer for answer in each) for each in answers)
