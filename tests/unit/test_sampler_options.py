"""Options of samplers reach them from a study's configuration, and enter the cell's fingerprint."""

import pytest

from dllm_sparsity.diffusion.samplers.block_refinement import BlockRefinement
from dllm_sparsity.errors import UserError
from dllm_sparsity.study.config import ModelConfig, build_config
from dllm_sparsity.study.models import make_sampler
from dllm_sparsity.study.plan import cell_parts, expand, fingerprint

OPTIONS = {"editing_threshold": 0.5, "minimal_topk": 2}


def config(**changes):
    return ModelConfig(paradigm="diffusion", model="embedded:diffusion", sampler="block_refinement", **changes)


def test_options_reach_the_sampler():
    made = make_sampler(config(sampler_options=OPTIONS, confidence_threshold=0.7))
    assert made == BlockRefinement(confidence_threshold=0.7, editing_threshold=0.5, minimal_topk=2)
    assert make_sampler(config()) == BlockRefinement()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler_options": {"editing_treshold": 0.5}}, "did you mean editing_threshold"),
        ({"sampler_options": {"editing_threshold": 7}}, "out of range"),
        ({"sampler_options": {"editing_threshold": "high"}}, "block_refinement"),
        ({"sampler_options": {"confidence_threshold": 0.5}, "confidence_threshold": 0.6}, "given twice"),
    ],
)
def test_wrong_options_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        make_sampler(config(**changes))


def test_options_are_part_of_the_fingerprint():
    data = {"tasks": [{"name": "easy_endings"}], "rules": [{"name": "top_p", "strengths": [0.9]}]}
    prints = set()
    for options in ({}, OPTIONS, OPTIONS | {"minimal_topk": 3}):
        study = build_config({**data, "models": [config(sampler_options=options).model_dump()]})
        cell = expand(study)[0]
        assert {cell.model: 1}[study.models[0]] == 1  # models are keys of what is looked up
        prints.add(fingerprint(cell_parts(cell, 0, {}, {}, {})))
    assert len(prints) == 3
