"""Several processes, each with its share of the requests: who this one is, and how their counts come together."""

from __future__ import annotations

import atexit
import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dllm_sparsity.errors import UserError
from dllm_sparsity.sparsity.clock import TokenState
from dllm_sparsity.sparsity.reading import KEYS, PerItem, Reading, add_items

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # torchrun, then what mpirun sets
_PATIENCE_SECONDS = 3.0  # a launcher kills the others when one process ends; let the one that reports finish first


@dataclass(frozen=True)
class Processes:
    """The processes of one run; by default this one alone.

    Args:
        rank: Number of this process.
        size: How many there are.
        local_rank: Number of this process on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def start(cls, device: str = "auto") -> Processes:
        """Join the processes that `accelerate launch`, torchrun or mpirun started; alone where none of them did.

        Args:
            device: What the model is to run on; `cpu` is joined by gloo, all else by NCCL where there is a GPU.
        """
        if not launched():
            return cls()
        # it takes the group of the moment of its import for a default argument: that would keep the group, and its
        # threads, until the interpreter is gone from under them, which aborts the process
        import torch.distributed.nn
        from accelerate import PartialState

        on_cpu = device == "cpu" or not torch.cuda.is_available()
        state = PartialState(cpu=on_cpu, timeout=timedelta(weeks=52))  # shares may take unequal time
        if dist.is_initialized() and dist.get_backend() == "gloo":  # leaving NCCL waits for the others
            atexit.register(state.destroy_process_group)  # where stop() is not reached
        return cls(state.process_index, state.num_processes, state.local_process_index)

    def device(self, name: str) -> str:
        """Return the device of this process; with several each takes a GPU of its own.

        Args:
            name: `auto`, `cpu`, `cuda` or a device with its number.

        Raises:
            UserError: One numbered GPU is named for several processes.
        """
        kind = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if self.size == 1 or kind == "cpu":
            return kind
        if kind != "cuda":
            raise UserError(
                f"device {kind} for {self.size} processes", "use --device cuda: each process takes its own GPU"
            )
        return f"cuda:{self.local_rank}"

    def gather(self, value: Any) -> list[Any]:
        """Return what each process gave, in the order of their ranks, on all of them; all must call it.

        Args:
            value: Anything that can be pickled.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def merge(self, reading: Reading) -> Reading:
        """Return the sum of all processes' readings, on all of them; all must call it.

        Args:
            reading: What this process counted.
        """
        return merge(self.gather(reading))

    def stop(self) -> None:
        """Leave the group and end its threads, so that the launcher sees a clean end."""
        if self.size > 1 and dist.is_initialized():
            from accelerate import PartialState

            PartialState().destroy_process_group()


def launched() -> bool:
    """Tell whether a launcher started several processes."""
    return any(os.environ.get(name, "1").isdecimal() and int(os.environ.get(name, "1")) > 1 for name in _SIZES) and (
        "LOCAL_RANK" in os.environ or "WORLD_SIZE" not in os.environ
    )


def speaks() -> bool:
    """Tell whether this process is the one to report an error: the first that failed. The others wait a little."""
    if not launched():
        return True
    first = int(os.environ.get("RANK", "0")) == 0  # what fails before the processes know each other fails in all alike
    if dist.is_available() and dist.is_initialized():
        with contextlib.suppress(Exception):  # the store may be gone with the process that held it: then speak
            first = True
            first = dist.distributed_c10d._get_default_store().add("dllm_sparsity/failed", 1) == 1
    if not first:
        time.sleep(_PATIENCE_SECONDS)
    return first


def merge(readings: Sequence[Reading]) -> Reading:
    """Add up readings of disjoint shares of the work.

    Sums are of integers, or of fixed-point values that a float64 holds exactly, so no order of adding changes them.

    Args:
        readings: One of each process, of the same model, sites and metrics.

    Raises:
        ValueError: There is none, or their columns differ.
    """
    if not readings:
        raise ValueError("no readings to merge")
    if len(readings) == 1:
        return readings[0]
    names = list(readings[0].columns)
    if any(list(reading.columns) != names for reading in readings):
        raise ValueError("readings with different columns were not made by the same metrics")
    keys, counts = [name for name in names if name in KEYS], [name for name in names if name not in KEYS]
    sums: dict[tuple, list] = {}
    for reading in readings:
        values = zip(*(reading.columns[name] for name in counts), strict=True)
        for key, row in zip(zip(*(reading.columns[name] for name in keys), strict=True), values, strict=True):
            old = sums.get(key)
            sums[key] = list(row) if old is None else [a + b for a, b in zip(old, row, strict=True)]
    order = sorted(sums, key=_order(keys, list(sums)))
    columns = {name: [key[place] for key in order] for place, name in enumerate(keys)}
    columns |= {name: [sums[key][place] for key in order] for place, name in enumerate(counts)}
    notes = dict.fromkeys(note for reading in readings for note in reading.notes)
    per_item: PerItem = {}
    for reading in readings:
        add_items(per_item, reading.per_item)
    return Reading({name: columns[name] for name in names}, per_item, tuple(notes))


def _order(keys: list[str], rows: list[tuple]) -> Callable[[tuple], tuple]:
    """Return a sort key: numbers by size, states as they are declared, other names by their first appearance."""
    ranks: list[dict[Any, Any]] = []
    for place, name in enumerate(keys):
        seen = list(dict.fromkeys(row[place] for row in rows))
        if name == "token_state":
            ranks.append({value: TokenState[value.upper()] for value in seen})
        else:
            ranks.append({value: value if isinstance(value, int) else n for n, value in enumerate(seen)})
    return lambda row: tuple(rank[value] for rank, value in zip(ranks, row, strict=True))


def without_padding(requests: Sequence[Instance]) -> tuple[list[Instance], list[int]]:
    """Leave out the duplicates with which lm-eval evens out the shares of several processes.

    A request stands in the list `repeats` times by right; whatever is more is padding.

    Args:
        requests: What lm-eval asks.

    Returns:
        The requests to answer, and for each given one the place of its answer among theirs.
    """
    seen: Counter[int] = Counter()
    places: dict[tuple[int, int], int] = {}
    own: list[Instance] = []
    back: list[int] = []
    for request in requests:
        number, repeats = seen[id(request)], request.repeats or 1
        seen[id(request)] += 1
        if number < repeats:
            places[id(request), number] = len(own)
            own.append(request)
        back.append(places[id(request), number % repeats])
    return own, back


def each_once(method: Callable[..., list]) -> Callable[..., list]:
    """Answer each request once, padding from its original; nothing of it runs, is counted or logged.

    Args:
        method: A method of an LM that answers requests.
    """

    @wraps(method)
    def answer(self: Any, requests: list[Instance], disable_tqdm: bool = False) -> list:
        if self.world_size == 1:  # lm-eval pads only where there are several processes
            return method(self, requests, disable_tqdm)
        own, back = without_padding(requests)
        answers = method(self, own, disable_tqdm)
        return [answers[place] for place in back]

    return answer
