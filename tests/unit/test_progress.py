"""The progress line: a share while the total holds, and none once a search outruns its guess."""

import io
from contextlib import redirect_stderr

import pytest

from dllm_sparsity.cli import progress


@pytest.fixture
def lines(monkeypatch):
    monkeypatch.setattr(progress, "_LINE_EVERY_SECONDS", 0)
    with redirect_stderr(io.StringIO()) as stream:
        made = progress.make_progress()
    return made, stream


def test_a_search_that_takes_longer_than_expected_never_says_100_percent(lines):
    told, stream = lines
    told.start(10.0, 0.0)
    for number in range(3):
        told.cell(f"cell {number}", 4.99)
        told.share(1, 1)
    first, second, third = stream.getvalue().splitlines()
    assert first.startswith(" 49%")
    assert second.startswith(" 99%")
    assert third == "more than was expected  cell 2"


def test_the_last_cell_of_a_grid_ends_at_100_percent(lines):
    told, stream = lines
    told.start(0.1 + 0.2, 0.1)
    told.cell("last", 0.2)
    told.share(3, 3)
    assert stream.getvalue().startswith("100%")
