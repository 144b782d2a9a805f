"""Answer a planned batch for several rules at once: a copy of it for each, all in one forward pass."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dllm_sparsity.lm.items import PromptBatch
from dllm_sparsity.lm.journal import Work
from dllm_sparsity.sparsity.stack import Copy, StackClock

if TYPE_CHECKING:
    from dllm_sparsity.lm.base import SparsityLM


def copied(work: Work, copies: int) -> Work:
    """Return several copies of a batch as one, one copy behind the other; each draws what it would draw alone.

    Args:
        work: The batch.
        copies: How many.
    """
    batch, numbers = work.batch, range(copies)
    if not isinstance(batch, PromptBatch):
        targets = [replace(target, item=Copy(number, target.item)) for number in numbers for target in batch]
        return Work(targets, work.check_greedy)
    items = [Copy(number, item) for number in numbers for item in batch.items]
    return Work(replace(batch, prompts=batch.prompts * copies, items=items, draws=batch.draws * copies))


def compute_copies(lm: SparsityLM, work: Work, clock: StackClock) -> list[list[Any]]:
    """Answer a batch once for each copy of a stack; return the answers of each.

    Args:
        lm: The backend, whose model has the stack attached; one that `stacks`.
        work: The batch.
        clock: The stack's.
    """
    copies = len(clock.parts)
    before, lm.clock, lm.copies = lm.clock, clock, copies
    try:
        found = lm.compute(copied(work, copies))
    finally:
        lm.clock, lm.copies = before, 1
    size = len(found) // copies
    return [found[number * size : (number + 1) * size] for number in range(copies)]
