"""What users hear of the hub, and what fetch brings from it: against a server with the hub's status codes and headers."""

import json

import hub as stand_in
import pytest
from huggingface_hub import constants

from dllm_sparsity.cli.fetch import fetch as command
from dllm_sparsity.errors import UserError
from dllm_sparsity.lm.hub import check_exists
from dllm_sparsity.study import fetch, offline
from dllm_sparsity.study.check import check_study
from dllm_sparsity.study.config import ModelConfig, build_config


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = stand_in.Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.close()


def told(model, revision=None):
    with pytest.raises(UserError) as error:
        check_exists(model, revision)
    return error.value.message, error.value.hint


def test_one_that_does_not_exist(hub):
    assert told("some/typo") == ("no model 'some/typo' on the hub", "check the id; a private one needs: hf auth login")


def test_one_that_does_not_exist_for_who_is_logged_in(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", stand_in.TOKEN)
    message, hint = told("some/typo")
    assert message == "no model 'some/typo' on the hub"
    assert "hf auth login" not in hint


def test_gated_and_not_logged_in(hub):
    hub.add("meta/gated", {"config.json": b"{}"}, gated=True)
    message, hint = told("meta/gated")
    assert message == "meta/gated is gated, and you are not logged in"
    assert hint == f"hf auth login, then accept its terms at {hub.url}/meta/gated"


def test_gated_and_terms_not_accepted(hub, monkeypatch):
    hub.add("meta/gated", {"config.json": b"{}"}, gated=True)
    monkeypatch.setenv("HF_TOKEN", "hf_somebody")
    message, hint = told("meta/gated")
    assert message == "meta/gated is gated, and your account may not read it"
    assert hint == f"accept its terms at {hub.url}/meta/gated"


def test_gated_and_accepted(hub, monkeypatch):
    hub.add("meta/gated", {"config.json": b"{}"}, gated=True)
    monkeypatch.setenv("HF_TOKEN", stand_in.TOKEN)
    check_exists("meta/gated")


def test_a_token_that_is_wrong(hub, monkeypatch):
    hub.add("free/model", {"config.json": b"{}"})
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert told("free/model")[0] == "the hub refuses your token for free/model"


def test_offline_and_not_cached(hub, monkeypatch):
    hub.add("free/model", {"config.json": b"{}"})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message, hint = told("free/model")
    assert message == "model 'free/model' is not on this machine and HF_HUB_OFFLINE is set"
    assert "dllm-sparsity fetch CONFIG" in hint
    assert hub.requests == []


def test_the_hub_does_not_answer(hub, monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)  # of the client's retries
    hub.close()
    assert "the hub cannot be reached" in told("free/model")[0]
    assert waits == []


def test_no_such_revision_and_no_config(hub):
    hub.add("free/model", {"model.safetensors": b"x"})
    assert told("free/model", "v9")[0] == "free/model has no revision 'v9'"
    assert told("free/model")[0] == "free/model holds no config.json on the hub"


def study(model, material, **more):
    return build_config(
        {
            "models": [{"paradigm": "autoregressive", "model": model, **more}],
            "tasks": [{"text": str(material / "own.txt")}],
            "rules": [{"name": "top_p", "strengths": [0.9]}],
        }
    )


@pytest.fixture
def served(hub, material):
    files = {path.name: path.read_bytes() for path in (material / "ar").iterdir() if path.is_file()}
    pickles = {"pytorch_model.bin": b"pickle", "modeling_x.py": b"code", "onnx/model.safetensors": b"other"}
    hub.add("free/model", {**files, **pickles})
    return hub, files


def test_fetch_says_what_it_brings_brings_it_and_the_study_is_offline(served, material, tmp_path):
    _, files = served
    config = study("free/model", material)
    assert offline.missing_files(config.models[0]) == ["config.json", "model.safetensors", "its tokenizer"]
    need, task = fetch.needs(config)
    size = sum(map(len, files.values()))
    assert (need.source, need.missing, need.total) == ("free/model", size - len(files["config.json"]), size)
    assert task.source == ""
    assert not list(tmp_path.rglob("*.safetensors"))  # only said
    fetch.fetch(config, need)
    assert {path.name for path in tmp_path.rglob("snapshots/*/*")} == set(files)
    assert offline.missing_files(config.models[0]) == []
    assert fetch.needs(config)[0].missing == 0


def test_code_comes_only_where_it_is_trusted(served, material, tmp_path):
    config = study("free/model", material, trust_remote_code=True)
    fetch.fetch(config, fetch.needs(config)[0])
    names = {path.name for path in tmp_path.rglob("snapshots/*/*")}
    assert "modeling_x.py" in names
    assert "pytorch_model.bin" not in names


@pytest.fixture
def coded(hub, material):
    """A model whose code is in its repository, and its tokenizer's in another; both import a file beside them."""
    files = {path.name: path.read_bytes() for path in (material / "ar").iterdir() if path.is_file()}
    config = {**json.loads(files["config.json"]), "model_type": "blocks"}
    config["auto_map"] = {
        "AutoConfig": "free/coded--configuration_x.Config",
        "AutoModelForCausalLM": "modeling_x.Model",
        "AutoModelForTokenClassification": "nowhere.Model",
    }
    tokenizer = json.loads(files["tokenizer_config.json"])
    tokenizer["auto_map"] = {"AutoTokenizer": [None, "free/code--tokenization_x.Tokenizer"]}
    files["config.json"], files["tokenizer_config.json"] = (json.dumps(own).encode() for own in (config, tokenizer))
    code = {"configuration_x.py": b"x = 1", "modeling_x.py": b"from .layers_x import y", "layers_x.py": b"y = 1"}
    hub.add("free/coded", {**files, **code})
    hub.add("free/code", {"tokenization_x.py": b"import os\nfrom .words_x import z", "words_x.py": b"z = 1"})
    return hub


def test_the_code_of_a_trusted_model_is_part_of_what_is_fetched(coded, material, monkeypatch):
    plain, trusted = (study("free/coded", material, trust_remote_code=own) for own in (False, True))
    fetch.fetch(plain, fetch.needs(plain)[0])
    assert offline.missing_files(plain.models[0]) == []
    lacking = ["configuration_x.py", "modeling_x.py", "tokenization_x.py of free/code"]
    assert offline.missing_files(trusted.models[0]) == lacking
    with pytest.raises(UserError, match=", ".join(lacking)) as error:
        offline.check_offline(trusted)
    assert "dllm-sparsity fetch" in error.value.hint
    with pytest.raises(UserError) as error:
        offline.check_offline(trusted, is_file=False)
    assert "hf download free/coded && hf download free/code" in error.value.hint
    need = fetch.needs(trusted)[0]
    assert (need.source, need.files) == ("free/coded, free/code", 5)
    fetch.fetch(trusted, need)
    assert offline.missing_files(trusted.models[0]) == []
    assert fetch.needs(trusted)[0].source == ""


def test_check_and_dry_run_name_the_code_that_is_not_here(coded, material, monkeypatch):
    from dllm_sparsity.study.dry_run import dry_run

    plain, trusted = (study("free/coded", material, trust_remote_code=own) for own in (False, True))
    fetch.fetch(plain, fetch.needs(plain)[0])
    for name in offline.SWITCHES:
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for found in (check_study(trusted, here=True), dry_run(trusted)):
        assert any("configuration_x.py, modeling_x.py, tokenization_x.py" in line for line in found.problems)
        assert any("dllm-sparsity fetch" in line for line in found.problems)


def test_check_says_what_is_to_be_downloaded_and_whether_there_is_room(served, material, monkeypatch):
    _, files = served
    config = study("free/model", material)
    found = check_study(config, here=True)
    assert found.problems == ()
    assert found.models[0].lacking == sum(map(len, files.values())) - len(files["config.json"])
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 10}))
        assert "are to be downloaded, the disk of" in check_study(config, here=True).problems[0]
    fetch.fetch(config, fetch.needs(config)[0])
    assert check_study(config, here=True).models[0].lacking == 0


def test_check_says_that_a_model_is_gated_though_its_description_is_shipped(hub, material, monkeypatch):
    hub.add("meta-llama/Llama-3.1-8B", {"config.json": b"{}"}, gated=True)
    found = check_study(study("meta-llama/Llama-3.1-8B", material), here=True)
    assert found.models[0].source == "shipped description"
    assert (len(found.problems), found.models[0].ok) == (1, False)
    assert "is gated, and you are not logged in; hf auth login" in found.problems[0]


def test_check_asks_once_whether_the_hub_is_there(served, material, monkeypatch):
    from huggingface_hub import get_hf_file_metadata

    asked = []
    monkeypatch.setattr(
        "huggingface_hub.get_hf_file_metadata", lambda url, **keys: asked.append(url) or get_hf_file_metadata(url)
    )
    assert check_study(study("free/model", material), here=True).problems == ()
    assert len(asked) == 1


def test_check_asks_once_for_a_model_that_is_given_twice(served, material, monkeypatch):
    hub, _ = served
    one = study("free/model", material).models[0]
    twice = (one, one.model_copy(update={"revision": "main"}))
    found = check_study(study("free/model", material).model_copy(update={"models": twice}), here=True)
    assert found.models[0].lacking == found.models[1].lacking
    assert sum("/tree/" in path for _, path, _ in hub.requests) == 1


def test_a_tokenizer_of_which_the_cache_holds_a_part_is_not_at_hand(served, material, monkeypatch):
    from huggingface_hub import hf_hub_download

    hf_hub_download("free/model", "tokenizer_config.json")
    assert check_study(study("free/model", material), here=True).problems == ()


def test_check_of_a_hub_that_does_not_answer_says_what_is_not_known(hub, material, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.close()
    found = check_study(study("meta-llama/Llama-3.1-8B", material), here=True)
    assert found.problems == ()
    assert "the hub was not reached: whether it gives Llama-3.1-8B to you is not known" in found.notes


def test_pickles_alone_are_refused_alike_everywhere(hub, material, tmp_path, capfd):
    from dllm_sparsity import compare
    from dllm_sparsity.lm.registered import check
    from dllm_sparsity.study.dry_run import dry_run

    config = (material / "ar" / "config.json").read_bytes()
    hub.add("old/model", {"config.json": config, "pytorch_model.bin": b"pickle"})
    asked = study("old/model", material)
    refusal = "old/model has no safetensors weights; pickles are never loaded"
    for found in (check_study(asked, here=True), dry_run(asked)):
        assert sum(refusal in line for line in found.problems) == 1
    for refuse in (
        lambda: fetch.needs(asked),
        lambda: compare(asked, tmp_path / "run"),
        lambda: check("autoregressive", {"pretrained": "old/model"}),
    ):
        with pytest.raises(UserError) as error:
            refuse()
        assert error.value.message == refusal
    assert not (tmp_path / "run").exists()
    assert "Fetching" not in capfd.readouterr().err  # nothing is


def test_an_interrupted_download_goes_on(served, material, tmp_path, monkeypatch):
    hub, files = served
    config = study("free/model", material)
    need = fetch.needs(config)[0]
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 256)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.cut_after = 1000
    with pytest.raises(UserError, match="the download of free/model stopped") as error:
        fetch.fetch(config, need)
    assert error.value.hint == "run the same command again: files that are whole are kept"
    ranges = [asked for command, path, asked in hub.requests if command == "GET" and path.endswith(".safetensors")]
    assert any(ranges[1:])  # a broken connection goes on where it broke
    hub.cut_after, hub.requests[:] = None, []
    assert fetch.needs(config)[0].files == 1
    fetch.fetch(config, need)
    got = [path.rsplit("/", 1)[-1] for command, path, _ in hub.requests if command == "GET" and "/resolve/" in path]
    assert got == ["model.safetensors"]
    found = next(tmp_path.rglob("snapshots/*/model.safetensors"))
    assert found.read_bytes() == files["model.safetensors"]


def test_an_index_names_the_shards_that_are_needed(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / offline.INDEX).write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    (tmp_path / "one.safetensors").write_bytes(b"")
    model = ModelConfig(paradigm="autoregressive", model=str(tmp_path))
    assert offline.missing_files(model) == ["two.safetensors"]


def test_embedded_models_go_by_their_name(material):
    config = study("embedded:autoregressive", material)
    assert fetch.needs(config)[0].name == "embedded:autoregressive"


def test_the_command_downloads_nothing_on_a_dry_run(served, material, tmp_path):
    import yaml
    from click.testing import CliRunner

    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study("free/model", material).model_dump(mode="json", exclude_unset=True)))
    said = CliRunner().invoke(command, [str(path), "--dry-run"], catch_exceptions=False)
    assert "model free/model: " in said.stdout
    assert "files to download" in said.stdout
    assert not list(tmp_path.rglob("*.safetensors"))
    done = CliRunner().invoke(command, [str(path)], catch_exceptions=False)
    assert "--offline" in done.stdout.splitlines()[-1]
    assert list(tmp_path.rglob("*.safetensors"))
