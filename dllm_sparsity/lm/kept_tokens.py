"""Token ids of a task's texts, kept from cell to cell: every cell of a task asks for the same ones."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterable
from typing import Any

MOST_BYTES = 256 << 20
Key = str | tuple[str, str]


class KeptTokens:
    """Token ids by their texts, of one task at a time and up to a size; what is beyond it is tokenised each time.

    Args:
        most_bytes: Size of texts and ids up to which more are kept.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._bytes = most_bytes, 0
        self._owner: Any = None
        self._known: dict[Key, tuple[array[int], ...]] = {}
        self._first: dict[str, array[int]] = {}  # the options of an item share its context

    def open(self, tokenizer: Any, tasks: Iterable[Hashable]) -> None:
        """Say what is asked next; ids of other tasks or of another tokenizer are forgotten.

        Args:
            tokenizer: Makes the ids.
            tasks: Names of the tasks.
        """
        owner = (tokenizer, frozenset(tasks))
        if self._owner is None or self._owner[0] is not tokenizer or self._owner[1] != owner[1]:
            self._owner, self._bytes = owner, 0
            self._known.clear()
            self._first.clear()

    def text(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Return the ids of a text.

        Args:
            text: The text.
            encode: Makes them.
        """
        known = self._known.get(text)
        if known is None:
            found = encode(text)
            self._keep(text, (array("q", found),), len(text))
            return found
        return known[0].tolist()

    def pair(
        self, context: str, continuation: str, encode: Callable[[str, str], tuple[list[int], list[int]]]
    ) -> tuple[list[int], list[int]]:
        """Return the ids of a context and of what continues it.

        Args:
            context: The text before.
            continuation: The text that is scored.
            encode: Makes both.
        """
        known = self._known.get((context, continuation))
        if known is None:
            before, after = encode(context, continuation)
            shared, new = self._first.get(context), len(continuation)
            if shared is None or shared.tolist() != before:
                shared, new = array("q", before), new + len(context)
            self._keep((context, continuation), (shared, array("q", after)), new)
            return before, after
        return known[0].tolist(), known[1].tolist()

    def _keep(self, key: Key, ids: tuple[array[int], ...], characters: int) -> None:
        context = None if isinstance(key, str) else key[0]
        more = characters + sum(
            8 * len(each) for each in ids if context is None or each is not self._first.get(context)
        )
        if self._bytes + more <= self._most:
            self._bytes += more
            self._known[key] = ids
            if context is not None:
                self._first[context] = ids[0]
