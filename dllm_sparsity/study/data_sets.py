"""The data sets of tasks, as lm-eval's index names them, and whether they are on this machine; none is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dllm_sparsity.study.offline import without_network
from dllm_sparsity.study.tasks import FOLDER, find_task

_OWN_DATA = ("json", "csv", "text", "parquet", "arrow")
"""Readers of files that a task names; such files are on this machine or are named with their address."""


@dataclass(frozen=True)
class DataSet:
    """One data set of a task.

    Args:
        path: Its id on the hub; empty where code of the task gets it.
        name: Of its configuration, where it has several.
        options: What else it is loaded with.
    """

    path: str
    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def title(self) -> str:
        """What people see."""
        return f"{self.path} ({self.name})" if self.name else self.path

    def is_here(self) -> bool:
        """Tell whether it was loaded on this machine before."""
        from datasets import load_dataset_builder

        try:
            with without_network():
                load_dataset_builder(self.path, self.name, **self.options)
        except Exception:  # whatever the library raises for what it does not find
            return False
        return True


def data_sets(name: str) -> list[DataSet]:
    """Return the data sets of a task, or of those that a group or tag stands for, as far as they are named.

    Args:
        name: Task, group, tag or file.

    Raises:
        UserError: There is no such task.
    """
    found: list[DataSet] = []
    for own in _data_sets(find_task(name).task_index, name):
        if own not in found:
            found.append(own)
    return found


def _data_sets(index: Any, name: str) -> Iterator[DataSet]:
    entry = index.get(name)
    fields = (entry.cfg if entry is not None else _file(name)) or {}
    below = fields.get("task") if "group" in fields else sorted(entry.tags) if entry and entry.cfg is None else ()
    for each in below if isinstance(below, list) else ():
        inner = each if isinstance(each, str) else each.get("task") if isinstance(each, dict) else None
        if isinstance(inner, str) and inner != name:
            yield from _data_sets(index, inner)
    path = fields.get("dataset_path")
    if "class" in fields or "custom_dataset" in fields:
        if Path(getattr(entry, "yaml_path", None) or name).parent != FOLDER:
            yield DataSet("")
    elif isinstance(path, str) and path not in _OWN_DATA and not Path(path).exists():
        options = {key: own for key, own in (fields.get("dataset_kwargs") or {}).items() if key != "trust_remote_code"}
        yield DataSet(path, fields.get("dataset_name"), options)


def _file(name: str) -> dict[str, Any]:
    """Read a task file as far as its data set; lm-eval's `!function` tags are of no matter here."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: None)
    try:
        found = yaml.load(Path(name).read_text(encoding="utf-8"), Loader=Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
