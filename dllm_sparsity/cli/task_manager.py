"""The tasks that dllm-sparsity eval can name: the embedded ones beside lm-eval's own and the user's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dllm_sparsity.errors import UserError, did_you_mean, shorten


@contextlib.contextmanager
def our_tasks(tasks: str | list[str]) -> Iterator[None]:
    """Let lm-eval find the embedded tasks; its command line makes its task manager itself and takes one folder.

    Args:
        tasks: Names and files, as lm-eval's --tasks has them.

    Raises:
        UserError: Inside the block, one does not exist or cannot be loaded.
    """
    import lm_eval.tasks

    theirs = lm_eval.tasks.TaskManager
    names = tasks.split(",") if isinstance(tasks, str) else [name for task in tasks for name in str(task).split(",")]
    ours = Path(__file__).parent.parent / "tasks"

    class Manager(theirs):
        """lm-eval's manager, that knows which tasks look at is_greedy."""

        def load(self, *args: Any, **kwargs: Any) -> Any:
            """Load tasks, as lm-eval does."""
            try:
                loaded = super().load(*args, **kwargs)
            except (OSError, ValueError, LookupError, ImportError, AttributeError) as error:
                why = shorten(error)
                raise UserError(
                    f"{', '.join(names)} cannot be loaded: {why}", "the data may need the network, or a package"
                ) from error
            _spare_greedy(loaded["tasks"].values())
            return loaded

    def make(include_path: str | None = None, metadata: dict | None = None, **more: Any) -> Any:
        folders: list[str | Path] = [ours, *([include_path] if include_path else [])]
        # reading lm-eval's own tasks takes seconds, so it is done only for a name that is found nowhere else
        manager = Manager(include_path=folders, include_defaults=False, metadata=metadata, **more)
        missing = _missing(manager, names)
        if files := [name for name in missing if name.endswith(".yaml")]:
            raise UserError(f"no such task file: {files[0]}", "give the path of an lm-eval YAML, or a task name")
        if missing:
            manager = Manager(include_path=folders, metadata=metadata, **more)
            missing = _missing(manager, names)
        for name in missing:
            raise UserError(
                f"unknown task {name!r}{did_you_mean(name, list(manager.all_tasks))}",
                "list them with: dllm-sparsity ls tasks --all",
            )
        return manager

    lm_eval.tasks.TaskManager = make  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        lm_eval.tasks.TaskManager = theirs  # type: ignore[misc]


def _missing(manager: Any, names: list[str]) -> list[str]:
    import glob

    return [
        name
        for name in names
        if not (glob.glob(name) if name.endswith(".yaml") else Path(name).is_dir() or manager.match_tasks([name]))
    ]


def _spare_greedy(tasks: Any) -> None:
    """Save a diffusion model one decoding a request where no task looks at is_greedy."""
    from dllm_sparsity.lm import registered
    from dllm_sparsity.study.run import needs_greedy

    if (lm := registered.latest()) is not None:
        lm.check_greedy = lm.check_greedy and any(needs_greedy(task) for task in tasks)
