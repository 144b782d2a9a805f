"""lm-eval tasks by name, from a YAML file or from one's own text; a file is read anew, for it may have changed."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from dllm_sparsity.errors import UserError, did_you_mean, shorten
from dllm_sparsity.study.config import TaskSpec
from dllm_sparsity.study.source import function_files, source_hash

FOLDER = Path(__file__).parent.parent / "tasks"
_SHARED = ("passage", "flores_passage", "article", "story", "paragraph", "context")
"""Fields of a document that several items may share."""
RUN_CODE = "in a sandbox, set run_code: true on the task in the study; or choose another task"


@dataclass(frozen=True)
class LoadedTask:
    """One lm-eval task, ready to run.

    Args:
        name: lm-eval's name.
        task: lm-eval's object.
        identity: What changes when the task's documents, prompts, version or the code of its functions change.
        cost: Rough number of characters a model reads and writes once through, for the time left.
        items: Documents that are run.
        shared: Field of which several documents have the same text, such as a passage, so that their errors are not
            independent; None where there is none.
    """

    name: str
    task: Any
    identity: dict[str, Any]
    cost: float
    items: int
    shared: str | None = None

    @property
    def output_type(self) -> str:
        """lm-eval's name of what is asked of the model."""
        return self.task.OUTPUT_TYPE


def load_tasks(spec: TaskSpec, seed: int) -> list[LoadedTask]:
    """Return the tasks that a name stands for; a group or tag stands for several.

    Args:
        spec: The task as the user gave it.
        seed: Seed of few-shot examples.

    Raises:
        UserError: There is no such task, or its data cannot be had.
    """
    found = _from_text(spec.text) if spec.text is not None else _by_name(spec.name or "", spec.num_fewshot)
    loaded = []
    for name, task in found.items():
        if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until"):
            raise UserError(
                f"task {name} asks for {task.OUTPUT_TYPE!r}, which no backend here can do", "choose another"
            )
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"task {name} reads images, which no backend here does", "choose another task")
        if getattr(task, "UNSAFE_CODE", False) and not spec.run_code:
            raise UserError(f"task {name} runs code that the model wrote", RUN_CODE)
        if spec.num_fewshot is not None:
            task.set_config(key="num_fewshot", value=spec.num_fewshot)
        task.set_fewshot_seed(seed=seed)
        documents = list(task.eval_docs)
        size = min(spec.limit or len(documents), len(documents))
        run = documents[:size]
        loaded.append(LoadedTask(name, task, _identity(name, task, run), _cost(run), size, _shared(run)))
    return loaded


@cache
def _manager(with_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    # reading lm-eval's own tasks takes seconds, so it is done only for a name that is not embedded
    return TaskManager(include_path=str(FOLDER), include_defaults=with_defaults)


def find_task(name: str) -> Any:
    """Return the lm-eval task manager that knows a name, or a path of a YAML file; no data is read.

    Args:
        name: Task, group, tag or file.

    Raises:
        UserError: There is no such task.
    """
    is_file = name.endswith((".yaml", ".yml"))
    if is_file and not Path(name).is_file():
        raise UserError(f"no such task file: {name}", "give the path of an lm-eval YAML, or a task name")
    manager = _manager(False)
    if not is_file and name not in manager.all_tasks:
        manager = _manager(True)
        if name not in manager.all_tasks:
            raise UserError(
                f"unknown task {name!r}{did_you_mean(name, list(manager.all_tasks))}",
                "list them with: dllm-sparsity ls tasks",
            )
    return manager


def _by_name(name: str, num_fewshot: int | None) -> dict[str, Any]:
    manager = find_task(name)
    try:
        return _load(manager, name, num_fewshot) if name in manager.all_tasks else manager.load([name])["tasks"]
    except (OSError, ValueError, KeyError, ImportError, ConnectionError, AttributeError, TypeError) as error:
        why = shorten(error)
        raise UserError(
            f"task {name} cannot be loaded: {why}", "its data may need the network, or a package"
        ) from error


@cache
def _load(manager: Any, name: str, num_fewshot: int | None) -> dict[str, Any]:
    """Build tasks; once for each number of examples, for the number is set on the object."""
    return manager.load([name])["tasks"]


def _from_text(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}", "give a UTF-8 text file") from error
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]
    if not paragraphs:
        raise UserError(f"{path} holds no text", "give a file with at least one paragraph")
    name = "text_" + re.sub(r"\W+", "_", Path(path).stem)

    def build(**_: Any) -> Any:
        from datasets import Dataset

        return {"test": Dataset.from_dict({"text": paragraphs})}

    config = {
        "task": name,
        "custom_dataset": build,
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
        "metadata": {"version": 1},
    }
    return _manager(False).load([config])["tasks"]


def _identity(name: str, task: Any, documents: list[dict]) -> dict[str, Any]:
    digest = hashlib.sha256()
    shots = list(task.fewshot_docs() or []) if task.config.num_fewshot else []
    for document in [*documents, *shots]:
        digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    dumped = task.dump_config()
    metadata = {key: own for key, own in (dumped.get("metadata") or {}).items() if key != "config_source"}  # a path
    config = json.dumps({**dumped, "metadata": metadata}, sort_keys=True, default=_named)
    config = re.sub(r" at 0x[0-9a-f]+", "", config)
    return {
        "name": name,
        "version": str(task.VERSION),
        "documents": digest.hexdigest()[:16],
        "config": hashlib.sha256(config.encode()).hexdigest()[:16],
        **_own_code(task, len(documents)),
    }


def _named(value: Any) -> str:
    """Return a function by its name, and any other object by its kind."""
    return getattr(value, "__qualname__", type(value).__name__)


def _own_code(task: Any, items: int) -> dict[str, str]:
    """Return what changes with functions that come with a task; nothing where it has none of its own.

    The config holds the source of a function alone. Constants and helpers beside it are in the hash of the files, and
    what it reads from other files is in the requests that it makes.
    """
    files = function_files([type(task), task.config])
    if not files:
        return {}
    with redirect_stderr(StringIO()):  # lm-eval shows a bar
        task.build_all_requests(limit=items, rank=0, world_size=1)
    digest = hashlib.sha256()
    for request in task.instances:
        digest.update(json.dumps(request.args, sort_keys=True, default=str).encode())
    return {"code": source_hash(files), "requests": digest.hexdigest()[:16]}


def _shared(documents: list[dict]) -> str | None:
    """Return which field of these documents several of them share, as not all do."""
    for field in _SHARED:
        texts = [document.get(field) for document in documents]
        if all(isinstance(text, str) for text in texts) and 1 < len(set(texts)) < len(texts):
            return field
    return None


def _cost(documents: list[dict]) -> float:
    """Estimate the characters of all requests, from the first documents."""
    few = documents[:20]
    if not few:
        return 1.0
    characters = sum(len(json.dumps(document, default=str)) for document in few) / len(few) * len(documents)
    return max(1.0, characters)
