"""Fixtures: a tiny model and token ids."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores; read when torch and numpy are imported

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the GPU kernels' code runs on the CPU; read when they are imported

from material import material, study  # noqa: F401 - fixtures
from tiny_families import VOCAB, tiny_model
from torch import nn


@pytest.fixture(scope="session")
def llama() -> nn.Module:
    return tiny_model("llama")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (3, 7), generator=torch.Generator().manual_seed(0))
