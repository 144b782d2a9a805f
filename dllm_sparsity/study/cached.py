"""Files of a model on this machine, in its folder or in the cache of the hub, and the code that a model brings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dllm_sparsity.study.config import ModelConfig
from dllm_sparsity.study.models import resolve

_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoTokenizer")
"""What a study loads; an auto_map may name more, and files that are nowhere."""


@dataclass(frozen=True)
class CodeFile:
    """A file of code that is run when a model is loaded.

    Args:
        repo: Hub id or folder that holds it; the model's own, or another.
        revision: Branch, tag or commit on the hub.
        name: In that repository.
    """

    repo: str
    revision: str | None
    name: str


def find_file(model: str, file: str, revision: str | None) -> Path | None:
    """Return a file of a model where it is on this machine, else None.

    Args:
        model: Folder or hub id.
        file: Its name in there.
        revision: Branch, tag or commit on the hub.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, file, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def code_files(model: str, revision: str | None) -> list[CodeFile]:
    """Return the code that a model names and what that imports beside it, as far as its files here tell.

    Args:
        model: Folder or hub id.
        revision: Branch, tag or commit on the hub.
    """
    from transformers.dynamic_module_utils import get_relative_imports

    found: dict[CodeFile, None] = {}
    waiting = list(_named(model, revision))
    while waiting:
        code = waiting.pop(0)
        if code in found:
            continue
        found[code] = None
        if (path := find_file(code.repo, code.name, code.revision)) is not None:
            beside = sorted(get_relative_imports(path))
            below = Path(code.name).parent
            waiting += [CodeFile(code.repo, code.revision, (below / f"{own}.py").as_posix()) for own in beside]
    return list(found)


def missing_code(model: str, revision: str | None) -> list[str]:
    """Return which files of the code that a model names this machine lacks.

    Args:
        model: Folder or hub id.
        revision: Branch, tag or commit on the hub.
    """
    absent = [code for code in code_files(model, revision) if not find_file(code.repo, code.name, code.revision)]
    return [code.name if code.repo == model else f"{code.name} of {code.repo}" for code in absent]


def code_elsewhere(model: ModelConfig) -> list[str]:
    """Return the other repositories of the hub that hold code of a model that is trusted.

    Args:
        model: The model.
    """
    name = resolve(model.model)
    named = code_files(name, model.revision) if model.trust_remote_code else []
    return list(dict.fromkeys(code.repo for code in named if code.repo != name))


def _named(name: str, revision: str | None) -> Iterator[CodeFile]:
    for file in ("config.json", "tokenizer_config.json"):
        path = find_file(name, file, revision)
        try:
            fields = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        except (OSError, ValueError):
            continue  # said where it is read
        given = fields.get("auto_map") if isinstance(fields, dict) else None
        classes = {"AutoTokenizer": given} if isinstance(given, list) else given if isinstance(given, dict) else {}
        for kind in _CLASSES:
            both = classes.get(kind)  # of a tokenizer: the slow one and the fast one
            for reference in both if isinstance(both, list) else [both]:
                if isinstance(reference, str) and "." in reference:
                    repo, _, within = reference.rpartition("--")
                    own = not repo or repo == name
                    module = within.partition(".")[0]
                    yield CodeFile(repo or name, revision if own else None, f"{module}.py")
