"""Code that comes with a task is part of what the task is: functions, what stands beside them, and what they import."""

import json
import shutil

import pytest

from dllm_sparsity import compare
from dllm_sparsity.analysis.joining import join
from dllm_sparsity.analysis.loading import load
from dllm_sparsity.errors import UserError
from dllm_sparsity.study.config import TaskSpec
from dllm_sparsity.study.source import module_files, source_hash
from dllm_sparsity.study.tasks import load_tasks
from dllm_sparsity.tasks import FOLDER

CONFIG = """
task: own_code
custom_dataset: !function utils.build
test_split: test
output_type: generate_until
doc_to_text: !function utils.text
doc_to_target: "{{text}}"
process_results: !function utils.results
generation_kwargs: {max_gen_toks: 4, until: []}
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
filter_list: [{name: made, filter: [{function: custom, filter_fn: !function utils.first}]}]
metadata: {version: 1}
"""
UTILS = """
import json, sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
from own_code_constants import PREFIX
sys.path.pop(0)
UNUSED = 1

def shown():
    return (Path(__file__).parent / "shown.txt").read_text()

def build(**_):
    from datasets import Dataset
    return {"test": Dataset.from_dict({"text": ["hello world", "some other words"]})}

def score(answer):
    return float(len(answer) > 2)

def text(document):
    return PREFIX + shown() + document["text"]

def other_text(document):
    return PREFIX + shown() + document["text"]

def results(document, answers):
    return {"acc": score(answers[0])}

def first(answers, documents):
    return [each[0] for each in answers]

def last(answers, documents):
    return [each[-1] for each in answers]
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    import sys

    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own_code.yaml").write_text(CONFIG)
    (folder / "utils.py").write_text(UTILS)
    (folder / "own_code_constants.py").write_text('PREFIX = "Say: "\n')
    (folder / "shown.txt").write_text("aloud ")
    (folder / "unrelated.py").write_text("X = 1\n")
    yield folder / "own_code.yaml"
    sys.modules.pop("own_code_constants", None)


def change(path, before, after):
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def identity(path):
    return load_tasks(TaskSpec(name=str(path)), 0)[0].identity


@pytest.mark.parametrize(
    ("file", "before", "after", "fields"),
    [
        ("utils.py", "UNUSED = 1", "UNUSED = 2", {"code"}),
        ("utils.py", "len(answer) > 2", "len(answer) > 3", {"code"}),
        ("utils.py", "+ document[", "+ '!' + document[", {"code", "config", "requests"}),
        ("utils.py", '["hello world", ', '["hello worlds", ', {"code", "config", "documents", "requests"}),
        ("own_code_constants.py", "Say: ", "Write: ", {"code"}),  # Python has what it imported before
        ("shown.txt", "aloud", "softly", {"requests"}),
        ("own_code.yaml", "utils.text", "utils.other_text", {"config"}),
        ("own_code.yaml", "utils.first", "utils.last", {"config"}),
        ("own_code.yaml", "version: 1", "version: 2", {"config", "version"}),
        ("own_code.yaml", "task: own_code", "task: other", {"config", "name"}),
        ("unrelated.py", "1", "2", set()),
    ],
)
def test_each_change_is_in_the_field_that_it_belongs_to(task, file, before, after, fields):
    old = identity(task)
    assert set(old) == {"name", "version", "documents", "config", "code", "requests"}
    assert identity(task) == old
    change(task.parent / file, before, after)
    new = identity(task)
    assert {name for name in old if old[name] != new[name]} == fields


def test_it_is_the_same_wherever_it_lies(task, tmp_path):
    import sys

    old = identity(task)
    shutil.copytree(task.parent, tmp_path / "elsewhere" / "deeper")
    sys.modules.pop("own_code_constants")
    assert identity(tmp_path / "elsewhere" / "deeper" / task.name) == old


def test_a_task_without_functions_of_its_own_has_no_code(material):
    for name in (material / "choice.yaml", FOLDER / "easy_endings.yaml"):
        assert set(identity(name)) == {"name", "version", "documents", "config"}


def test_other_code_is_other_work_and_is_not_joined_with_the_old(task, material, tmp_path):
    study = {
        "models": [{"paradigm": "autoregressive", "model": str(material / "ar")}],
        "tasks": [{"name": str(task)}],
        "rules": [{"name": "top_p", "strengths": [0.5], "sites": ["input"]}],
    }
    first = {path.name for path in (compare(study, tmp_path / "one").path / "cells").iterdir()}
    change(task.parent / "utils.py", "len(answer) > 2", "len(answer) > 3")
    again = compare(study, tmp_path / "one").path
    planned = {entry["fingerprint"] for entry in json.loads((again / "plan.json").read_text())}
    assert len(planned) == 2
    assert not planned & first
    change(task.parent / "utils.py", "len(answer) > 3", "len(answer) > 4")
    compare(study, tmp_path / "two")
    with pytest.raises(UserError, match=r"one and two are not comparable: task own_code: task\.code differs"):
        join([load(tmp_path / "one"), load(tmp_path / "two")], tmp_path)


def test_what_a_package_imports_of_itself_counts_where_it_is_installed(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "plugin_of_parts"
    for name, text in {
        "__init__.py": "",
        "rules/__init__.py": "",
        "rules/mine.py": "import os, stranger, plugin_of_parts.deep.last\nfrom ..core import half\nfrom . import beside\n",
        "rules/beside.py": "def late():\n    from plugin_of_parts import lazy\n",
        "core.py": "half = 0.5\n",
        "lazy.py": "x = 1\n",
        "deep/__init__.py": "",
        "deep/last.py": "x = 1\n",
        "alone.py": "x = 1\n",
        "../stranger.py": "x = 1\n",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(package.parent)
    assert module_files(["dllm_sparsity.sparsity.rules.top_p", "autoregressive.backend"]) == set()
    files = module_files(["plugin_of_parts.rules.mine"])
    marks = [source_hash(files)]
    for name in ("rules/mine.py", "rules/beside.py", "core.py", "lazy.py", "deep/last.py", "rules/__init__.py"):
        with (package / name).open("a") as stream:
            stream.write("y = 1\n")
        marks.append(source_hash(files))
    assert len(set(marks)) == 7
    for name in ("alone.py", "../stranger.py"):
        (package / name).write_text("z = 1\n")
    assert source_hash(files) == marks[-1]
