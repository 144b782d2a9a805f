"""Every embedded task loads through lm-eval, and its items are what the task file promises."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dllm_sparsity.errors import UserError
from dllm_sparsity.pair import folder
from dllm_sparsity.pair.making.items import Maker
from dllm_sparsity.pair.reference import reference_loglikelihood
from dllm_sparsity.study.config import TaskSpec
from dllm_sparsity.study.tasks import _shared, load_tasks
from dllm_sparsity.tasks import FOLDER
from dllm_sparsity.tasks.utils import build_items, choose_per_token

lm_eval_tasks = pytest.importorskip("lm_eval.tasks")
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
FEWEST = {"easy_endings": 1000, "piqa_local": 1000, "heldout_text": 1000, "heldout_continuation": 200}


@pytest.fixture(scope="module")
def tasks() -> Mapping[str, Any]:
    """Load all embedded tasks the way a study does."""
    manager = lm_eval_tasks.TaskManager(include_path=str(FOLDER), include_defaults=False)
    return manager.load(NAMES)["tasks"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Load the pair's tokenizer."""
    return AutoTokenizer.from_pretrained(folder("autoregressive"), local_files_only=True)


def items(name: str) -> list[dict[str, Any]]:
    """Read the items of a task without lm-eval."""
    return list(build_items(name)["test"])


def test_the_four_tasks_are_there() -> None:
    assert set(FEWEST) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_task_has_version_and_enough_documents(name: str, tasks: Mapping[str, Any]) -> None:
    task = tasks[name]
    assert task.VERSION == 1.0
    assert len(list(task.test_docs())) >= FEWEST[name]


@pytest.mark.parametrize("name", ["easy_endings", "piqa_local"])
def test_choice_requests_hold_query_and_choices(name: str, tasks: Mapping[str, Any]) -> None:
    task = tasks[name]
    task.build_all_requests(limit=2, rank=0, world_size=1)
    doc = next(iter(task.test_docs()))
    arguments = [request.args for request in task.instances if request.doc_id == 0]
    assert arguments == [(doc["query"], f" {choice}") for choice in doc["choices"]]


@pytest.mark.parametrize(("name", "num_choices"), [("easy_endings", 4), ("piqa_local", 2)])
def test_token_counts_are_those_of_the_scored_choices(
    name: str, num_choices: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    for doc in items(name)[:200]:
        context = tokenizer.encode(doc["query"])
        wholes = [tokenizer.encode(f"{doc['query']} {choice}") for choice in doc["choices"]]
        assert len(set(doc["choices"])) == num_choices
        assert [len(whole) - len(context) for whole in wholes] == doc["tokens"]
        assert max(map(len, wholes)) <= 120


@pytest.mark.parametrize("name", ["easy_endings", "piqa_local"])
def test_items_are_distinct_and_gold_is_spread(name: str) -> None:
    docs = items(name)
    assert len({(doc["query"], *doc["choices"]) for doc in docs}) == len(docs)
    num_choices = len(docs[0]["choices"])
    for place in range(num_choices):
        share = sum(doc["gold"] == place for doc in docs) / len(docs)
        assert share == pytest.approx(1 / num_choices, abs=0.05)


@pytest.fixture(scope="module")
def pool() -> list[tuple[str, str, str]]:
    """Make 40 scenes of 8 activities; no ending shares a word with a context, so nothing may be filtered by words."""
    return [
        (f"A{n % 8}", f"A{n % 8}: Somebody waits, scene {n}.", f"then they leave room {n + 100}.") for n in range(40)
    ]


def test_every_scene_gives_an_item_with_true_endings_of_other_activities(
    pool: list[tuple[str, str, str]], tokenizer: PreTrainedTokenizerBase
) -> None:
    made = Maker(tokenizer, ()).easy_endings(pool)
    activity_of, truth = {ending: label for label, _, ending in pool}, {query: ending for _, query, ending in pool}
    assert sorted(item["query"] for item in made) == sorted(truth)
    for item in made:
        assert item["choices"][item["gold"]] == truth[item["query"]]
        assert len({activity_of[choice] for choice in item["choices"]}) == 4


def test_items_follow_the_seed(pool: list[tuple[str, str, str]], tokenizer: PreTrainedTokenizerBase) -> None:
    maker = Maker(tokenizer, ())
    assert maker.easy_endings(pool, seed=1) == maker.easy_endings(pool, seed=1) != maker.easy_endings(pool, seed=2)


def test_scenes_whose_sentences_were_trained_on_are_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    seen = "A man in a red shirt is standing on a long wooden ladder."
    pool = [(f"A{n}", f"A{n}: Scene {n} waits.", f"then they leave room {n}.") for n in range(8)]
    made = Maker(tokenizer, [seen]).easy_endings([*pool, ("A9", f"Painting. {seen}", "he paints the fence.")])
    assert len(made) == 8
    assert not any("he paints the fence." in item["choices"] for item in made)


def test_held_out_texts_have_64_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert {len(tokenizer.encode(doc["text"])) for doc in items("heldout_text")} == {64}


def test_continuations_have_32_and_32_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    for doc in items("heldout_continuation"):
        assert len(tokenizer.encode(doc["prompt"])) == 32
        assert len(tokenizer.encode(doc["prompt"] + doc["reference"])) == 64


def test_continuation_request_has_no_stop_strings(tasks: Mapping[str, Any]) -> None:
    task = tasks["heldout_continuation"]
    task.build_all_requests(limit=1, rank=0, world_size=1)
    _, generation = task.instances[0].args
    assert generation["until"] == []
    assert generation["max_gen_toks"] == 32


def test_per_token_choice_differs_from_the_sum() -> None:
    doc = {"gold": 1, "tokens": [1, 4]}
    assert choose_per_token(doc, [(-2.0, False), (-4.0, False)]) == {"acc_token": 1.0, "acc": 0.0}


def test_reference_prefers_the_true_continuation() -> None:
    docs = items("heldout_continuation")[:8]
    true = [reference_loglikelihood(doc["prompt"], doc["reference"]) for doc in docs]
    other = [reference_loglikelihood(a["prompt"], b["reference"]) for a, b in zip(docs, docs[::-1], strict=True)]
    assert sum(true) > sum(other)
    assert math.isfinite(reference_loglikelihood(docs[0]["prompt"], ""))


def test_a_field_is_shared_where_some_documents_have_the_same_text():
    passages = [{"passage": "a", "question": n} for n in range(2)] + [{"passage": "b", "question": 2}]
    assert _shared(passages) == "passage"
    assert (
        _shared([{**own, "passage": str(n), "article": own["passage"]} for n, own in enumerate(passages)]) == "article"
    )
    assert _shared([{"passage": "a"}, {"passage": "b"}]) is None  # each its own
    assert _shared([{"passage": "a"}, {"passage": "a"}]) is None  # all of one: nothing to resample
    assert _shared([{"question": "a"}, {"question": "a"}, {"question": "b"}]) is None
    assert _shared([{"passage": "a"}, {"passage": "a"}, {"passage": None}]) is None
    assert _shared([]) is None


def test_a_task_is_the_same_wherever_its_file_lies(tmp_path):
    config = {"task": "twins", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"}
    config |= {"doc_to_text": "text", "doc_to_choice": ["a", "b"], "doc_to_target": 0, "num_fewshot": 0}
    config["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "items.jsonl")}}
    (tmp_path / "items.jsonl").write_text('{"text": "x"}\n')
    found = []
    for name, text in (("here", "text"), ("there", "text"), ("changed", "{{text}}!")):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "twins.yaml"
        path.write_text(yaml.safe_dump({**config, "doc_to_text": text}))
        found.append(load_tasks(TaskSpec(name=str(path)), 0)[0].identity)
    assert found[0] == found[1] != found[2]


def test_a_file_that_names_tasks_instead_of_being_one_is_refused(material, tmp_path):
    group = tmp_path / "group.yaml"
    group.write_text("group: both\ntask: [tiny_choice, tiny_write]\n")
    with pytest.raises(UserError, match=r"group\.yaml cannot be loaded"):
        load_tasks(TaskSpec(name=str(group)), 0)
