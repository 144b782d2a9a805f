"""Shares of the work: padding is found, counts add up exactly, and each process knows its place."""

import pytest
import torch
from lm_eval.api.instance import Instance

from dllm_sparsity.errors import UserError
from dllm_sparsity.lm import distributed
from dllm_sparsity.lm.distributed import KEYS, Processes, merge, without_padding
from dllm_sparsity.sparsity.reading import Reading


def request(number, repeats=1):
    return Instance("loglikelihood", {}, ("a", "b"), 0, ("task", number, repeats))


def test_what_stands_more_often_than_it_repeats_is_padding():
    first, second = request(0, 2), request(1, 2)
    own, back = without_padding([first, first, second, second, *[second] * 4])
    assert [id(each) for each in own] == [id(first), id(first), id(second), id(second)]
    assert back == [0, 1, 2, 3, 2, 3, 2, 3]


def test_equal_requests_are_not_the_same_request():
    own, back = without_padding([request(0), request(0)])
    assert (len(own), back) == (2, [0, 1])


def test_a_request_made_by_hand_repeats_once():
    each = Instance("loglikelihood", {}, ("a", "b"), 0)
    assert without_padding([each, each])[1] == [0, 0]


def rows(*lines, items=None, notes=()):
    """Build a reading from (phase, step, site, state, rows, kept, jaccard) lines."""
    columns = {name: [] for name in (*KEYS, "rows", "kept", "jaccard_sum_prev")}
    for phase, step, site, state, *counts in lines:
        key = (phase, "cond", 0, step, 3, 0, site, -1, state)
        for name, value in zip(columns, (*key, *counts), strict=True):
            columns[name].append(value)
    return Reading(columns, items or {}, notes)


def test_merging_adds_rows_of_one_key_and_keeps_all_others():
    one = rows(
        ("prefill", 0, "input", "prompt", 3, 10, 0.5),
        ("decode", 2, "input", "committed", 1, 4, 0.25),
        items={("t", 0): {"input": (10, 20)}},
        notes=("a",),
    )
    two = rows(
        ("prefill", 0, "input", "prompt", 2, 7, 2**-24),
        ("decode", 1, "up", "committed", 1, 1, 0.0),
        ("decode", 1, "input", "committed", 5, 6, 0.0),
        ("decode", 1, "input", "masked", 1, 1, 1.0),
        items={("t", 1): {"input": (1, 2)}, ("t", 0): {"input": (1, 1)}},
        notes=("a", "b"),
    )
    merged = merge([one, two])
    lines = list(zip(*(merged[name] for name in ("phase", "step", "site", "token_state", "rows", "kept")), strict=True))
    assert lines == [
        ("prefill", 0, "input", "prompt", 5, 17),
        ("decode", 1, "input", "masked", 1, 1),
        ("decode", 1, "input", "committed", 5, 6),
        ("decode", 1, "up", "committed", 1, 1),
        ("decode", 2, "input", "committed", 1, 4),
    ]
    assert merged["jaccard_sum_prev"][0] == 0.5 + 2**-24
    assert merged.per_item == {("t", 0): {"input": (11, 21)}, ("t", 1): {"input": (1, 2)}}
    assert merged.notes == ("a", "b")
    assert list(merged.columns) == list(one.columns)


def test_merging_is_the_same_in_every_grouping():
    generator = torch.Generator().manual_seed(0)

    def draw():
        return [int(number) for number in torch.randint(0, 1000, (3,), generator=generator)]

    parts = []
    for _ in range(5):
        lines = {}
        for _ in range(30):
            a, b, c = draw()
            key = ("likelihood", a % 3, ("input", "up")[b % 2], ("prompt", "masked")[c % 2])
            lines[key] = (a, b, c / 2**24)
        parts.append(rows(*((*key, *counts) for key, counts in lines.items())))
    at_once, in_pairs = merge(parts), merge([merge(parts[:2]), merge(parts[2:])])
    assert at_once.columns == in_pairs.columns
    assert sum(at_once["kept"]) == sum(sum(part["kept"]) for part in parts)


def test_what_cannot_be_merged():
    with pytest.raises(ValueError, match="no readings"):
        merge([])
    one = rows(("prefill", 0, "input", "prompt", 3, 10, 0.5))
    other = Reading({name: values for name, values in one.columns.items() if name != "jaccard_sum_prev"})
    with pytest.raises(ValueError, match="different columns"):
        merge([one, other])
    assert merge([one]) is one


def test_each_process_has_a_device_of_its_own(monkeypatch):
    assert Processes().device("cuda:3") == "cuda:3"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    second = Processes(rank=5, size=8, local_rank=1)
    assert second.device("auto") == second.device("cuda") == "cuda:1"
    assert second.device("cpu") == "cpu"
    with pytest.raises(UserError, match="device cuda:0 for 8 processes"):
        second.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert second.device("auto") == "cpu"


@pytest.mark.parametrize(
    ("variables", "several"),
    [
        ({}, False),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, False),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, True),
        ({"WORLD_SIZE": "2"}, False),  # left over in a shell: nothing says which process this is
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
    ],
)
def test_a_launcher_is_seen_by_what_it_sets(monkeypatch, variables, several):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed.launched() is several
    if not several:
        assert Processes.start() == Processes()
        assert distributed.speaks()


def test_one_of_several_reports_an_error(monkeypatch):
    monkeypatch.setattr(distributed, "_PATIENCE_SECONDS", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    spoke = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        spoke.append(distributed.speaks())
    assert spoke == [True, False]
