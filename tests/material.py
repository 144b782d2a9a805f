"""Fixtures: a folder with a tiny causal and a tiny diffusion model, a task file and a text, as a user would have them."""

import json

import pytest
import tiny


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    for name, causal in (("ar", True), ("dm", False)):
        tiny.llama(causal, forbid_mask=not causal).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    items = [{"q": f"question {n}", "a": ["yes", "no way"], "gold": n % 2} for n in range(6)]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (folder / "choice.yaml").write_text(
        f"task: tiny_choice\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/items.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: a\ndoc_to_target: gold\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\nmetadata: {version: 1}\n"
    )
    (folder / "write.yaml").write_text(
        f"task: tiny_write\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/items.jsonl}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a[0]}}'\n"
        "generation_kwargs: {until: [], max_gen_toks: 6, do_sample: false}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\nmetadata: {version: 1}\n"
    )
    (folder / "own.txt").write_text(
        "A first paragraph of text.\n\nA second one.\n\nAnd a third, longer than the others.\n"
    )
    return folder


def make_study(material):
    return {
        "name": "tiny",
        "models": [
            {"paradigm": "autoregressive", "model": str(material / "ar"), "batch_size": 4},
            {"paradigm": "diffusion", "model": str(material / "dm"), "batch_size": 4, "mc": 2, "block_length": 3},
        ],
        "tasks": [
            {"name": str(material / "choice.yaml"), "limit": 4},
            {"name": str(material / "write.yaml"), "limit": 2},
            {"text": str(material / "own.txt")},
        ],
        "rules": [{"name": "top_p", "strengths": [0.9, 0.5], "sites": ["input", "all"]}],
    }


@pytest.fixture
def study(material):
    return make_study(material)


OTHER_DIFFUSION = {
    "mask_token": "[M]",
    "logits_shift": True,
    "mc": 7,
    "steps": 5,
    "block_length": 4,
    "temperature": 0.5,
    "cfg_scale": 1.5,
    "sampler": "random",
    "confidence_threshold": 0.9,
}
"""A value of each setting of a diffusion model that is not its default."""
