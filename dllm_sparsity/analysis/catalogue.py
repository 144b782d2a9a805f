"""The populations that searches are tried on: how quality falls with strength, in many shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from dllm_sparsity.analysis.worlds import Blend, World, sparsity_at


def _power(scale: float, power: float) -> Callable[[np.ndarray], np.ndarray]:
    return partial(_powered, scale, power)


def _powered(scale: float, power: float, s: np.ndarray) -> np.ndarray:
    return scale * sparsity_at(s) ** power


def _hump(s: np.ndarray) -> np.ndarray:
    """Improve at first, fall later."""
    x = sparsity_at(s)
    return 2.0 * x**5 - 0.06 * np.sin(np.minimum(x / 0.5, 1) * math.pi)


def _dip(s: np.ndarray) -> np.ndarray:
    """Fall into a dip, come back, and fall for good."""
    x = sparsity_at(s)
    return 0.3 * np.exp(-(((x - 0.4) / 0.1) ** 2)) + 2.0 * np.maximum(x - 0.7, 0) ** 2


def _scaled(shape: Callable[[np.ndarray], np.ndarray], scale: float) -> Callable[[np.ndarray], np.ndarray]:
    return partial(_times, shape, scale)


def _times(shape: Callable[[np.ndarray], np.ndarray], scale: float, s: np.ndarray) -> np.ndarray:
    return scale * shape(s)


def _stairs(s: np.ndarray) -> np.ndarray:
    """Fall by two smooth steps."""
    x = sparsity_at(s)
    return 0.1 / (1 + np.exp(-(x - 0.35) / 0.05)) + 0.8 / (1 + np.exp(-(x - 0.7) / 0.04)) - 0.1 / (1 + math.exp(7))


def _waves(s: np.ndarray) -> np.ndarray:
    """Fall slowly, to and fro."""
    x = sparsity_at(s)
    return 0.02 * x + 0.01 * np.sin(12 * x) * np.minimum(x / 0.2, 1)


def _cliff(s: np.ndarray) -> np.ndarray:
    """Lose nearly nothing for long, then all at once."""
    x = sparsity_at(s)
    return 0.003 * x + 60.0 * np.maximum(x - 0.82, 0) ** 2


def _brink(s: np.ndarray) -> np.ndarray:
    """Lose nearly nothing for longer, then everything."""
    x = sparsity_at(s)
    return 0.003 * x + 300.0 * np.maximum(x - 0.88, 0) ** 2


def _break(s: np.ndarray) -> np.ndarray:
    """Fall a little, then at once much faster."""
    x = sparsity_at(s)
    return 0.01 * x + 6.0 * np.maximum(x - 0.6, 0) ** 1.5


def _plunge(s: np.ndarray) -> np.ndarray:
    """Lose nearly nothing, then everything within a few points."""
    x = sparsity_at(s)
    return 0.004 * x + 0.5 / (1 + np.exp(-(x - 0.55) / 0.01))


def _hump_and_cliff(s: np.ndarray) -> np.ndarray:
    """Improve at first, come back to dense, and fall off a cliff there."""
    x = sparsity_at(s)
    return -0.05 * np.sin(np.minimum(x / 0.7, 1) * math.pi) + 40 * np.maximum(x - 0.7, 0) ** 2


def _ledge(s: np.ndarray) -> np.ndarray:
    """Lose a little at once, nothing more for long, then much."""
    x = sparsity_at(s)
    return 0.012 * np.minimum(x / 0.1, 1) + 3.0 * np.maximum(x - 0.55, 0) ** 1.5


def _dip_and_cliff(s: np.ndarray) -> np.ndarray:
    """Lose a part early, come back, and fall off a cliff."""
    x = sparsity_at(s)
    return 0.04 * np.exp(-(((x - 0.3) / 0.08) ** 2)) + 30 * np.maximum(x - 0.66, 0) ** 2


WORLDS = (
    World("accuracy, monotone", "accuracy", _power(1.5, 5), 4000),
    World("accuracy, steep", "accuracy", _power(60.0, 8), 4000, flips=0.1),
    World("accuracy, few items", "accuracy", _power(1.5, 5), 600),
    World("accuracy, rises first", "accuracy", _hump, 4000),
    World("accuracy, dip and recovery", "accuracy", _dip, 4000),
    World("accuracy, fails at once", "accuracy", _power(1.5, 1.0), 4000),
    World("accuracy, never fails", "accuracy", _power(0.002, 2), 4000),
    World("accuracy, fails at the end", "accuracy", _power(0.05, 3), 4000),
    World("NLL, monotone", "nll", _power(1.0, 5), 1000),
    World("NLL, rises first", "nll", _scaled(_hump, 0.5), 1000),
    World("NLL, dip and recovery", "nll", _scaled(_dip, 0.5), 1000),
    World("NLL, fails at once", "nll", _power(0.5, 1.0), 1000),
    World("NLL, never fails", "nll", _power(0.005, 2), 1000),
    World("NLL, fails at the end", "nll", _power(0.0125, 3), 1000),
    World("accuracy, groups of 4", "accuracy", _power(1.5, 4), 4000, together=4),
    World("accuracy, 95 % kept", "accuracy", _power(1.5, 4), 2000, retention=0.95),
    World("accuracy, hard items, two steps", "accuracy", _stairs, 3000, skill=0.1),
    World("accuracy, loosely paired", "accuracy", _power(2.0, 4), 6000, flips=0.6),
    World("accuracy, easy items, 98 % kept", "accuracy", _power(2.0, 3), 1500, retention=0.98, skill=1.6),
    World("accuracy, groups of 5, 95 % kept", "accuracy", _power(3.0, 4), 3000, 0.95, together=5),
    World("NLL, 95 % kept", "nll", _power(1.0, 3), 600, retention=0.95),
    World("NLL, to and fro", "nll", _waves, 1500),
    World("NLL, groups of 5, two steps", "nll", _scaled(_stairs, 0.3), 2000, together=5),
    World("accuracy, slow fall, 97 % kept", "accuracy", _power(0.8, 2.5), 5000, 0.97, skill=0.5),
    World("accuracy, pairs, loosely paired", "accuracy", _power(1.0, 4), 2500, flips=0.45, together=2),
    World("NLL, rises first, 98 % kept", "nll", _scaled(_hump, 0.8), 800, retention=0.98),
    World("NLL, groups of 3, slow fall", "nll", _power(0.3, 2.2), 1200, together=3),
    Blend(
        "average of 3 tasks, accuracy",
        (
            World("", "accuracy", _power(1.5, 5), 1500),
            World("", "accuracy", _power(2.0, 3), 1500, skill=0.3),
            World("", "accuracy", _hump, 1500, skill=1.4),
        ),
    ),
    Blend(
        "average of 4 tasks of 200 to 4000 items, accuracy",
        (
            World("", "accuracy", _power(1.5, 4), 200),
            World("", "accuracy", _power(3.0, 5), 1000, together=4),
            World("", "accuracy", _stairs, 600, skill=0.1),
            World("", "accuracy", _power(1.0, 3), 4000, flips=0.5),
        ),
    ),
    Blend(
        "average of 3 tasks, NLL",
        (
            World("", "nll", _power(1.0, 5), 500),
            World("", "nll", _power(0.5, 2), 300),
            World("", "nll", _scaled(_hump, 0.5), 900),
        ),
    ),
    World("accuracy, wavy, 98 % kept", "accuracy", _scaled(_waves, 6), 3500, 0.98, skill=0.6),
    World("accuracy, groups of 3, steep", "accuracy", _power(20.0, 6), 3000, skill=1.1, together=3),
    World("NLL, slow fall, 97 % kept", "nll", _power(0.4, 3), 1000, 0.97),
    Blend(
        "average of 2 tasks, accuracy",
        (
            World("", "accuracy", _power(1.2, 4), 1000, skill=0.4),
            World("", "accuracy", _stairs, 2500, flips=0.4, skill=1.0),
        ),
    ),
    World("accuracy, hard items, slow fall", "accuracy", _power(0.6, 2), 4000, flips=0.2, skill=0.2),
    World(
        "accuracy, pairs, rises first, 98 % kept",
        "accuracy",
        _scaled(_hump, 1.5),
        2000,
        0.98,
        skill=0.4,
        together=2,
    ),
    World("NLL, steep", "nll", _power(30.0, 7), 900),
    Blend(
        "average of 3 tasks, accuracy, 97 % kept",
        (
            World("", "accuracy", _power(2.0, 4), 800, 0.97, skill=1.0),
            World("", "accuracy", _hump, 2000, 0.97, skill=0.5),
            World("", "accuracy", _power(1.0, 2), 1200, 0.97, flips=0.4),
        ),
    ),
    World("accuracy, slow fall, 96 % kept", "accuracy", _power(0.9, 2.2), 3000, 0.96, skill=0.9),
    World(
        "accuracy, pairs, two steps, 98 % kept",
        "accuracy",
        _scaled(_stairs, 1.3),
        3600,
        0.98,
        skill=0.6,
        together=2,
    ),
    World("NLL, dip and recovery, 98 % kept", "nll", _scaled(_dip, 0.9), 700, 0.98),
    Blend(
        "average of 2 tasks, NLL",
        (
            World("", "nll", _power(0.7, 3), 400),
            World("", "nll", _scaled(_hump, 0.9), 900, together=3),
        ),
    ),
    World("accuracy, grazes, then a cliff", "accuracy", _scaled(_cliff, 2), 4000, skill=0.5),
    World("NLL, cliff", "nll", _cliff, 1000),
    World("accuracy, cliff", "accuracy", _scaled(_cliff, 2), 4000, flips=0.1, skill=0.5),
    World("accuracy, cliff, 98 % kept", "accuracy", _scaled(_cliff, 2), 4000, 0.98, skill=0.5),
    World("accuracy, brink, 98 % kept", "accuracy", _brink, 2500, 0.98, flips=0.2, skill=0.9),
    World("NLL, brink", "nll", _brink, 800),
    World("NLL, break, 98 % kept", "nll", _break, 700, 0.98),
    World("accuracy, pairs, break, 97 % kept", "accuracy", _break, 3000, 0.97, skill=0.7, together=2),
    World("accuracy, plunge, 98 % kept", "accuracy", _plunge, 3000, 0.98, flips=0.2),
    World("NLL, plunge", "nll", _plunge, 1000),
    World("accuracy, rises, then a cliff", "accuracy", _hump_and_cliff, 2500, flips=0.2, skill=0.4),
    World("accuracy, ledge, then a fall", "accuracy", _ledge, 3000, flips=0.25, skill=0.6),
    World("NLL, rises, then a cliff", "nll", _scaled(_hump_and_cliff, 0.5), 900),
    World(
        "accuracy, groups of 4, dip, then a cliff, 97 % kept",
        "accuracy",
        _dip_and_cliff,
        3600,
        0.97,
        skill=0.7,
        together=4,
    ),
    World("NLL, ledge, then a fall", "nll", _scaled(_ledge, 0.7), 900),
    World(
        "accuracy, groups of 5, ledge, 98 % kept",
        "accuracy",
        _scaled(_ledge, 2.5),
        3500,
        0.98,
        skill=0.5,
        together=5,
    ),
    World(
        "accuracy, easy items, rises, then a cliff, 97 % kept",
        "accuracy",
        _hump_and_cliff,
        2000,
        0.97,
        skill=1.4,
    ),
    World("accuracy, few easy items, fails at once", "accuracy", _power(0.8, 1.2), 800, skill=1.2),
    Blend(
        "average of 2 tasks, accuracy, one with a cliff",
        (
            World("", "accuracy", _power(1.5, 4), 1500),
            World("", "accuracy", _scaled(_cliff, 2), 2000, skill=0.5),
        ),
    ),
    World("NLL, groups of 4, ledge, 97 % kept", "nll", _scaled(_ledge, 2.0), 1200, 0.97, together=4),
    World("accuracy, easy items, two steps, 97 % kept", "accuracy", _stairs, 1000, 0.97, skill=1.5),
    World("accuracy, hard items, early fall", "accuracy", _power(0.5, 1.3), 2500, flips=0.4, skill=0.2),
    World("NLL, early fall, 98 % kept", "nll", _power(0.3, 1.1), 500, 0.98),
    Blend(
        "average of 3 tasks, accuracy, one with a ledge",
        (
            World("", "accuracy", _power(1.5, 5), 1500),
            World("", "accuracy", _power(0.6, 1.5), 800, skill=1.1),
            World("", "accuracy", _ledge, 2000, flips=0.25),
        ),
    ),
    World("accuracy, groups of 3, rises first, 97 % kept", "accuracy", _hump, 3200, 0.97, together=3, held_out=True),
    World("accuracy, hard items, steep, 95 % kept", "accuracy", _power(8.0, 7), 1800, 0.95, skill=0.3, held_out=True),
    World("accuracy, few items, slow fall, 96 % kept", "accuracy", _power(0.7, 1.8), 900, 0.96, held_out=True),
    World("NLL, two steps, 96 % kept", "nll", _scaled(_stairs, 0.4), 750, 0.96, held_out=True),
    Blend(
        "average of 3 tasks of 300 to 3000 items, accuracy, 98 % kept",
        (
            World("", "accuracy", _power(1.2, 3.5), 300, 0.98, skill=1.3),
            World("", "accuracy", _scaled(_hump, 1.2), 3000, 0.98, flips=0.2),
            World("", "accuracy", _power(2.5, 4.5), 1200, 0.98, skill=0.2, together=2),
        ),
        held_out=True,
    ),
)
