"""A cell's rule on its model, in this process or elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from dllm_sparsity.sparsity.sparsifier import sparsify
from dllm_sparsity.study import environment
from dllm_sparsity.study.counted import Facts, Here, Source
from dllm_sparsity.study.models import resolve
from dllm_sparsity.study.setting import Setting
from dllm_sparsity.study.stacked import StackedHere
from dllm_sparsity.study.weights import hub_blobs

if TYPE_CHECKING:
    from dllm_sparsity.sparsity.sites import FFN


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
        self._ffns: list[FFN] = []

    @contextmanager
    def attached(self, setting: Setting) -> Iterator[Here]:
        """Put a cell's rule on the model, for one `with` block.

        Args:
            setting: Of the cell.

        Raises:
            UserError: A site is missing, or the rule refuses the strength.
        """
        rule = setting.make_rule()
        with sparsify(self.lm.model, rule, setting.sites, layers=setting.layers, clock=self.lm.clock) as tracker:
            self._ffns = tracker.ffns
            try:
                yield Here(tracker)
            finally:
                self._ffns = []

    @contextmanager
    def stacked(self, settings: Sequence[Setting]) -> Iterator[StackedHere]:
        """Be ready to put the rules of several cells on the model, for one `with` block.

        Args:
            settings: Of the cells, which differ in strength alone.

        Raises:
            UserError: As in `attached`, or the model has experts there.
        """
        here = StackedHere(self.lm, settings)
        self._ffns = here.ffns
        try:
            yield here
        finally:
            self._ffns = []

    def facts(self, setting: Setting) -> Facts:
        """Return what a sealed cell says of the model.

        Args:
            setting: Of the cell; it is attached.
        """
        if not self._ffns:
            raise RuntimeError("facts are there while a setting is attached")
        ffns = self._ffns
        ffn = {
            "d_model": ffns[0].d_model,
            "d_ffn": ffns[0].d_ffn,
            "num_layers": len({each.layer for each in ffns}),
            "gated": ffns[0].gated,
            "uniform": len({(each.d_model, each.d_ffn) for each in ffns}) == 1,
        }
        commit = getattr(getattr(self.lm.model, "config", None), "_commit_hash", None) or setting.model.revision
        settings = {**environment.model_settings(self.lm), "blobs": hub_blobs(resolve(setting.model.model), commit)}
        return Facts(ffn, tuple(getattr(self.lm.model, "shims", ())), settings)


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
