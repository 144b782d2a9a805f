"""Fixtures: a tiny model and token ids."""

from __future__ import annotations

import pytest
import torch
from material import material, study  # noqa: F401 - fixtures
from tiny_families import VOCAB, tiny_model
from torch import nn


@pytest.fixture(scope="session")
def llama() -> nn.Module:
    return tiny_model("llama")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (3, 7), generator=torch.Generator().manual_seed(0))
