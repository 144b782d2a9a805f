"""The bench of strengths that share forward passes, on a CPU: the rows it prints, and what bad input gets."""

import pytest

from dllm_sparsity.bench import stacked
from dllm_sparsity.bench.settings import Settings, plan


def test_a_row_for_each_batch_and_number_of_copies(capsys):
    stacked.main(["--device", "cpu"])
    head, names, *rows = capsys.readouterr().out.splitlines()
    assert "CPU, torch " in head
    assert names.split() == ["model", "layers", "batch", "k", "dense", "apart", "stacked", "ratio", "GiB"]
    found = [row.split() for row in rows]
    assert [(row[0], row[2], row[3]) for row in found] == [
        ("embedded", batch, copies) for batch in ("1x16", "4x16") for copies in "248"
    ]
    for row in found:
        dense, apart, together, ratio = map(float, row[4:8])
        assert min(dense, apart, together) > 0
        assert ratio == pytest.approx(apart / together, abs=0.01 + 0.02 * ratio)


def test_strengths_that_do_not_order_the_sparsity_are_refused(monkeypatch):
    monkeypatch.setattr(stacked, "STRENGTHS", (0.5, 0.9, *stacked.STRENGTHS[2:]))
    chosen = plan(Settings(shape="embedded", layers=1, batches=((1, 2),), device="cpu"))
    with pytest.raises(RuntimeError, match="does not rise"):
        list(stacked.race_stacks(chosen))


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--shape", "embeded"], "did you mean embedded?"), (["--device", "gpu"], "unknown device")]
)
def test_what_is_missing_is_said_first_in_two_lines(arguments, said):
    with pytest.raises(SystemExit) as stopped:
        stacked.main(arguments)
    first, second = str(stopped.value.code).splitlines()
    assert first.startswith("error: ")
    assert said in first
    assert second.startswith("hint:  ")
