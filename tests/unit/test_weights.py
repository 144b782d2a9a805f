"""What identifies weights: the files of a folder, the commit of the hub, and the names that its cache gives to files."""

# ruff: noqa: F811 - fixtures of another file
import hashlib
import json
import os
from types import SimpleNamespace

import pytest
from huggingface_hub import snapshot_download
from test_hub import hub, served, study  # noqa: F401

from dllm_sparsity import compare
from dllm_sparsity.lm import hub as lm_hub
from dllm_sparsity.study import environment
from dllm_sparsity.study.weights import hub_blobs, weights_identity


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "tokenizer.model",
        "chat_template.jinja",
        "modeling.py",
        "merges.txt",
        "model.gguf",
        "qwen.tiktoken",
    ],
)
def test_every_file_that_a_model_is_loaded_from_counts(tmp_path, name):
    (tmp_path / name).write_bytes(b"one")
    (tmp_path / "README.md").write_bytes(b"one")
    assert weights_identity(str(tmp_path), None) == {name: sha256(b"one")}
    (tmp_path / name).write_bytes(b"other")
    assert weights_identity(str(tmp_path), None) == {name: sha256(b"other")}


def test_blobs_are_named_by_the_hub_and_not_read(served, tmp_path):
    server, files = served
    snapshot_download("free/model", allow_patterns=["*.json", "model.safetensors"])
    asked = len(server.requests)
    os.truncate(next(tmp_path.rglob("snapshots/*/model.safetensors")), 0)
    assert hub_blobs("free/model", None) == {"model.safetensors": sha256(files["model.safetensors"])}
    assert hub_blobs("free/other", None) == {}
    assert len(server.requests) == asked


def test_shards_are_those_of_the_index(hub):
    index = json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}).encode()
    files = {"one.safetensors": b"1", "two.safetensors": b"2", "model.safetensors.index.json": index}
    hub.add("free/sharded", {**files, "config.json": b"{}", "consolidated.safetensors": b"3"})
    snapshot = snapshot_download("free/sharded")
    assert hub_blobs("free/sharded", None) == {name: sha256(data) for name, data in files.items()}
    os.remove(f"{snapshot}/two.safetensors")
    assert hub_blobs("free/sharded", None) == {}


def test_a_cache_without_links_is_none_to_read_names_from(served, tmp_path):
    snapshot_download("free/model", allow_patterns=["*.json", "model.safetensors"])
    link = next(tmp_path.rglob("snapshots/*/model.safetensors"))
    data = link.read_bytes()
    link.unlink()
    link.write_bytes(data)
    assert hub_blobs("free/model", None) == {}
    (tmp_path / "elsewhere").write_bytes(data)
    link.unlink()
    link.symlink_to(tmp_path / "elsewhere")
    assert hub_blobs("free/model", None) == {}
    assert hub_blobs(str(link.parent), None) == {}


def test_the_hash_says_what_it_is_of():
    config, commit = SimpleNamespace(revision=None), {"hub": "free/model", "commit": "c" * 40}
    told = [
        environment.describe_model({"dtype": "float32", "blobs": blobs}, config, weights)
        for blobs, weights in (({}, {"model.safetensors": "1"}), ({}, commit), ({"model.safetensors": "1"}, commit))
    ]
    assert [own["weights"].split(maxsplit=1)[1] for own in told] == [
        "of the files",
        "of the hub's commit",
        "of the hub's blobs",
    ]
    assert all(set(own) == {"revision", "weights", "dtype"} for own in told)
    assert len({own["weights"][:16] for own in told}) == 2  # of the same hashes


def test_a_cell_has_the_hub_s_hashes_under_a_fingerprint_that_was_there_before_them(
    served, material, tmp_path, monkeypatch
):
    _, files = served
    monkeypatch.setattr(lm_hub, "_answers", {})
    config = study("free/model", material)
    cells = []
    for name in ("first", "again"):  # before the first, the cache has no weights
        cells.append(
            [json.loads(path.read_text()) for path in compare(config, tmp_path / name).path.glob("cells/*/cell.json")]
        )
    assert {cell["fingerprint"] for cell in cells[0]} == {cell["fingerprint"] for cell in cells[1]}
    blobs = json.dumps({"model.safetensors": sha256(files["model.safetensors"])})
    assert {cell["environment"]["model"]["weights"] for own in cells for cell in own} == {
        f"{sha256(blobs.encode())[:16]} of the hub's blobs"
    }
    assert all(cell["parts"]["weights"]["hub"] == "free/model" for own in cells for cell in own)
