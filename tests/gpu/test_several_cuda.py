"""On several GPUs: one process for each, or one model spread over all, gives the numbers of one."""

import pytest
import torch
from test_resume import numbers

from dllm_sparsity import compare
from dllm_sparsity.study.engines import Engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
]
STUDY = {
    "name": "several",
    "device": "cuda",
    "models": [
        {"paradigm": "autoregressive", "model": "embedded:autoregressive"},
        {"paradigm": "diffusion", "model": "embedded:diffusion", "mc": 4, "steps": 8},
    ],
    "tasks": [{"name": "easy_endings", "limit": 24}, {"name": "heldout_continuation", "limit": 8}],
    "rules": [{"name": "top_p", "strengths": [0.5], "sites": ["all"]}],
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    path = tmp_path_factory.mktemp("one") / "run"
    compare(STUDY, path, engine=Engine(workers=1))
    return numbers(path)


def test_a_process_for_each_gpu(expected, tmp_path):
    compare(STUDY, tmp_path / "run", engine=Engine())
    assert numbers(tmp_path / "run") == expected


def test_a_model_spread_over_gpus(expected, tmp_path):
    spread = {**STUDY, "models": [{**model, "device_map": "balanced"} for model in STUDY["models"]]}
    compare(spread, tmp_path / "run", engine=Engine(workers=1))
    found = numbers(tmp_path / "run")

    def by_cell(cells):
        keys = ("paradigm", "task", "strength")
        return {tuple(cell[0][key] for key in keys): cell[1:] for name, cell in cells.items() if name != "summary"}

    assert by_cell(found) == by_cell(expected)
