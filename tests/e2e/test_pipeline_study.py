"""A study whose diffusion model generates by its pipeline of diffusers."""

import json

import pyarrow.parquet as pq
import pytest
import tiny
import tiny_pipelines

from dllm_sparsity import UserError, compare
from dllm_sparsity.study.config import build_config

TASK = """
task: continue_text
custom_dataset: !function build.build
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: ""
generation_kwargs: {max_gen_toks: 16, until: []}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""
BUILD = """
from datasets import Dataset


def build(**_):
    return {"test": Dataset.from_dict({"text": ["hello world", "some other words", "abc"]})}
"""


@pytest.fixture
def study(tmp_path):
    tiny_pipelines.diffusion_gemma().save_pretrained(tmp_path / "gemma")
    tiny.llama().save_pretrained(tmp_path / "ar")
    for name in ("gemma", "ar"):
        tiny.tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "task.yaml").write_text(TASK)
    (tmp_path / "build.py").write_text(BUILD)
    return {
        "name": "pipelines",
        "device": "cpu",
        "models": [
            {"paradigm": "autoregressive", "model": str(tmp_path / "ar")},
            {
                "paradigm": "diffusion",
                "model": str(tmp_path / "gemma"),
                "pipeline": "diffusion_gemma",
                "pipeline_options": {"num_inference_steps": 3},
            },
        ],
        "tasks": [{"name": str(tmp_path / "task.yaml")}],
        "rules": [{"name": "top_p", "strengths": [0.7], "sites": ["all"]}],
    }


@pytest.mark.filterwarnings("ignore::dllm_sparsity.diffusion.pipelines.PipelineOutputWarning")
def test_a_study_with_a_pipeline(study, tmp_path):
    compare(build_config(study), out=tmp_path / "run")
    cells = {}
    for path in (tmp_path / "run" / "cells").iterdir():
        record = json.loads((path / "cell.json").read_text())
        cells[record["paradigm"], record["dense"]] = (record, pq.read_table(path / "steps.parquet").to_pydict())
    assert len(cells) == 4
    record, steps = cells["diffusion", False]
    assert {"encode", "denoise"} == set(steps["phase"])
    assert {-1, 0, 1, 2, 3} == set(steps["expert"])
    assert record["ffn"]["num_layers"] == 6  # three in the encoder, three in the decoder
    assert any("EntropyBoundScheduler" in note for note in record["notes"])
    assert record["totals"]["sites"]["input"]["kept"] < cells["diffusion", True][0]["totals"]["sites"]["input"]["kept"]
    assert (tmp_path / "run" / "report.html").is_file()


def test_what_a_pipeline_cannot_be_is_refused(study, tmp_path):
    wrong = [{**study["models"][0], "pipeline": "llada2"}]
    with pytest.raises(UserError, match="a pipeline is of the paradigm diffusion"):
        build_config({**study, "models": wrong})
    wrong = [{**study["models"][1], "pipeline": None}]
    with pytest.raises(UserError, match="pipeline_options without a pipeline"):
        build_config({**study, "models": wrong})
    wrong = [{**study["models"][1], "pipeline_options": {"num_inference_stepz": 3}}]
    with pytest.raises(UserError, match="did you mean num_inference_steps"):
        compare(build_config({**study, "models": wrong}), out=tmp_path / "never")
