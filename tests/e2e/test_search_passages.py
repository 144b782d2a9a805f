"""A search on a task whose items share passages, in blocks of which some hold no two items of one passage."""

import json

import pyarrow.parquet as pq
import pytest
import yaml

from dllm_sparsity import compare

ITEMS, PASSAGES = 96, 88


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory):
    folder = tmp_path_factory.mktemp("passages")
    rows = [
        {"passage": f"Scene {n % PASSAGES}. She sat down and", "choices": [" sang.", " stone."]} for n in range(ITEMS)
    ]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        **{"task": "scenes", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"},
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        **{"doc_to_text": "passage", "doc_to_choice": "choices", "doc_to_target": 0, "target_delimiter": ""},
        **{"metric_list": [{"metric": "acc"}], "num_fewshot": 0},
    }
    (folder / "scenes.yaml").write_text(yaml.safe_dump(task))
    study = {
        "name": "passages",
        "models": [{"paradigm": "autoregressive", "model": str(material / "ar"), "batch_size": 64}],
        "tasks": [{"name": str(folder / "scenes.yaml")}, {"name": "easy_endings", "limit": 40}],
        "rules": [{"name": "top_p", "sites": ["intermediate"]}],
        "search": {"quality": "nll", "width": 0.001},
    }
    return compare(study, folder / "run")


def test_every_block_names_the_passages(finished):
    blocks = []
    for folder in finished.path.glob("cells/*"):
        record = json.loads((folder / "cell.json").read_text())
        if record["task"] == "scenes":
            blocks.append(pq.read_table(folder / "samples.parquet"))
    assert all("group" in block.column_names for block in blocks)
    assert any(len(block["group"].unique()) == len(block) for block in blocks)  # no two of one passage
    documents = {own["doc_id"]: own["group"] for block in blocks for own in block.to_pylist()}
    assert len(documents) == ITEMS
    assert all(documents[n] == documents[n + PASSAGES] for n in range(ITEMS - PASSAGES))


def test_a_search_that_meets_them_has_answers(finished):
    search = json.loads((finished.path / "search.json").read_text())
    assert [own["items"] for own in search["curves"]] == [ITEMS, 40]
    (average,) = search["averages"]
    assert average["value"] is not None
