"""A cell's rule on its model: what of a cell a process needs to know to answer the cell's batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dllm_sparsity.sparsity.sparsifier import sparsify
from dllm_sparsity.study import environment
from dllm_sparsity.study.config import ModelConfig, RuleConfig
from dllm_sparsity.study.counted import Facts, Here, Source
from dllm_sparsity.study.models import make_rule
from dllm_sparsity.study.plan import Cell


@dataclass(frozen=True)
class Setting:
    """How a model is run in a cell; it can be sent to another process.

    Args:
        model: The model.
        seed: The study's seed.
        rule: None when dense.
        strength: The rule's main parameter.
        sites: Primitive sites that are recorded.
        mc: Monte-Carlo draws; None for the model's own.
    """

    model: ModelConfig
    seed: int
    rule: RuleConfig | None
    strength: float | None
    sites: tuple[str, ...]
    mc: int | str | None

    @classmethod
    def of(cls, cell: Cell, seed: int) -> Setting:
        """Return the setting of a cell.

        Args:
            cell: The cell.
            seed: The study's seed.
        """
        folder = Path(cell.model.model).expanduser()
        placed = {"model": str(folder.resolve())} if folder.is_dir() else {}  # workers may stand elsewhere
        return cls(cell.model.model_copy(update=placed), seed, cell.rule, cell.strength, cell.sites, cell.task.mc)


class Host(Protocol):
    """Where the model of a cell is."""

    @property
    def lm(self) -> Any:
        """The backend that plans batches: its tokenizer and settings are those of the model that answers them."""
        ...

    def attached(self, setting: Setting) -> AbstractContextManager[Source]:
        """Put a cell's rule on the model.

        Args:
            setting: Of the cell.
        """
        ...

    def facts(self, setting: Setting) -> Facts:
        """Return what a sealed cell says of the model; to be asked for inside `attached`.

        Args:
            setting: Of the cell.
        """
        ...


class LocalHost:
    """A model in this process.

    Args:
        lm: Its backend, loaded.
    """

    def __init__(self, lm: Any) -> None:
        self.lm = lm
        self._here: Here | None = None

    @contextmanager
    def attached(self, setting: Setting) -> Iterator[Here]:
        """Put a cell's rule on the model, for one `with` block.

        Args:
            setting: Of the cell.

        Raises:
            UserError: A site is missing, or the rule refuses the strength.
        """
        rule, layers = None, None
        if setting.rule is not None and setting.strength is not None:
            rule = make_rule(setting.rule.name, setting.strength, setting.rule.parameters)
            layers = setting.rule.layers
        with sparsify(self.lm.model, rule, setting.sites, layers=layers, clock=self.lm.clock) as tracker:
            self._here = Here(tracker)
            try:
                yield self._here
            finally:
                self._here = None

    def facts(self, setting: Setting) -> Facts:
        """Return what a sealed cell says of the model.

        Args:
            setting: Of the cell; it is attached.
        """
        if self._here is None:
            raise RuntimeError("facts are there while a setting is attached")
        ffns = self._here.tracker.ffns
        ffn = {
            "d_model": ffns[0].d_model,
            "d_ffn": ffns[0].d_ffn,
            "num_layers": len({each.layer for each in ffns}),
            "gated": ffns[0].gated,
            "uniform": len({(each.d_model, each.d_ffn) for each in ffns}) == 1,
        }
        return Facts(ffn, tuple(getattr(self.lm.model, "shims", ())), environment.model_settings(self.lm))


@contextmanager
def prepared(lm: Any, setting: Setting) -> Iterator[None]:
    """Set a backend up for one cell, and leave it as it was: no cell knows what ran before it.

    Args:
        lm: The backend.
        setting: Of the cell.
    """
    lm.log.clear()
    mc, notes, refused = getattr(lm, "mc", None), len(lm.clock.notes), lm.clock.overlap_refused
    if setting.mc is not None and mc is not None:
        lm.mc = setting.mc
    try:
        yield
    finally:
        lm.journal = lm.order_seed = None
        if mc is not None:
            lm.mc = mc
        del lm.clock.notes[notes:]
        lm.clock.overlap_refused = refused
