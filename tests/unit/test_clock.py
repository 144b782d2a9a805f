"""The clock: what a loop may say, what it may not, and where its counts go."""

from __future__ import annotations

import pytest
import torch
from tiny_families import LAYERS, logits
from torch import nn

from dllm_sparsity.sparsity.clock import Clock, Compare, Phase, Slot, TokenState
from dllm_sparsity.sparsity.rules.top_k import TopK
from dllm_sparsity.sparsity.rules.top_p import TopP
from dllm_sparsity.sparsity.sparsifier import sparsify

P, M, N, C, E, X = (
    TokenState.PROMPT,
    TokenState.MASKED,
    TokenState.COMMITTED_NOW,
    TokenState.COMMITTED,
    TokenState.AFTER_EOS,
    TokenState.PAD,
)


def table(*rows: list[TokenState]) -> torch.Tensor:
    return torch.tensor([[int(state) for state in row] for row in rows])


def denoise(step: int, branch: str = "cond") -> Slot:
    return Slot(Phase.DENOISE, branch, step=step)


def counts(reading: object, *names: str) -> dict:
    """Sum `rows` of one layer by the named columns."""
    found: dict = {}
    for n in range(len(reading["rows"])):
        if reading["layer"][n] == 0:
            key = tuple(reading[name][n] for name in names)
            found[key] = found.get(key, 0) + reading["rows"][n]
    return found


def test_states_slots_and_items(llama: nn.Module, ids: torch.Tensor) -> None:
    clock = Clock()
    first = table([P, P, M, M, M, X, X], [P, N, C, C, M, E, E], [P, P, P, P, M, M, M])
    second = first.clone()
    second[0, 2] = N
    with sparsify(llama, TopK(0.5), clock=clock) as tracker:
        with clock.batch(["a", "b", "a"]):
            clock.tick(denoise(0), first, Compare.START)
            logits(llama, ids)
            clock.tick(denoise(1), second, Compare.PREVIOUS)
            logits(llama, ids)
        with clock.batch(["b"]):
            clock.tick(denoise(0), first[1:2])
            logits(llama, ids[1:2])
    reading = tracker.read()
    assert counts(reading, "token_state") == {
        ("prompt",): 2 * 7 + 1, ("masked",): 7 + 6 + 1, ("pad",): 4, ("committed_now",): 1 + 2 + 1,
        ("committed",): 2 * 2 + 2, ("after_eos",): 2 * 2 + 2,
    }  # fmt: skip
    assert counts(reading, "step") == {(0,): 28, (1,): 21}
    assert set(reading["phase"]) == {"denoise"}
    assert set(reading.per_item) == {"a", "b"}
    per_token = {"kept": LAYERS * 32, "total": LAYERS * 64}
    for item, tokens in (("a", 2 * (5 + 7)), ("b", 2 * 5 + 5)):
        assert reading.per_item[item]["intermediate"] == (tokens * per_token["kept"], tokens * per_token["total"])
    compared = {(s, r) for s, r in zip(reading["step"], reading["rows_prev"], strict=True) if r}
    assert {step for step, _ in compared} == {1}
    assert sum(reading["rows_prev"]) == sum(reading["rows_first"]) == LAYERS * 21


@pytest.mark.parametrize("canvas", [20, 40, 100, 10_000])
@pytest.mark.parametrize("k", range(21))
def test_noise_bins_at_exact_fractions(k: int, canvas: int) -> None:
    def bin_of(masked: int) -> int:
        clock = Clock()
        clock.begin([0])
        row = [P] * 3 + [M] * masked + [C] * (canvas - masked) + [X] * 2
        clock.tick(denoise(0), torch.tensor([row]))
        return int(clock.noise[0][0])

    masked = canvas * k // 20
    assert bin_of(masked) == min(k, 19)
    if k:
        assert bin_of(masked - 1) == k - 1


def test_rows_have_bins_of_their_own(llama: nn.Module) -> None:
    clock = Clock()
    states = table([M, M, M, M], [C, C, C, M], [P, P, P, P])
    with sparsify(llama, TopP(0.5), clock=clock) as tracker, clock.batch([0, 1, 2]):
        clock.tick(denoise(0), states)
        logits(llama, torch.zeros(3, 4, dtype=torch.long))
    assert counts(tracker.read(), "noise_bin") == {(19,): 4, (5,): 4, (0,): 4}


def test_branches_in_one_doubled_batch(llama: nn.Module, ids: torch.Tensor) -> None:
    clock, states = Clock(), table([P, P, M, M, M, M, M])
    with sparsify(llama, TopK(0.5), clock=clock) as tracker, clock.batch(["a", "a"]):
        for step in range(3):
            slots = [denoise(step), denoise(step, "uncond")]
            clock.tick(slots, states.expand(2, -1), Compare.PREVIOUS if step else Compare.START)
            logits(llama, ids[:2])
    reading = tracker.read()
    assert counts(reading, "branch", "step") == {(b, s): 7 for b in ("cond", "uncond") for s in range(3)}
    assert reading.per_item["a"]["intermediate"][1] == 3 * 7 * LAYERS * 64  # without the uncond rows
    assert sum(reading["inter_prev"]) == sum(reading["union_prev"]) > 0  # the same ids each time


def test_a_slot_is_announced_once(llama: nn.Module) -> None:
    clock, states = Clock(), table([P, M], [P, M])
    clock.begin([0, 1])
    clock.tick([denoise(0), denoise(0, "uncond")], states)
    for again in (denoise(0), [denoise(1), denoise(0, "uncond")], [denoise(0, "uncond"), denoise(1)]):
        with pytest.raises(ValueError, match="announced before"):
            clock.tick(again, states)
    assert list(clock.slots.values()) == [0, 1]
    clock.tick(denoise(1), states)
    clock.begin([0, 1])
    clock.tick(denoise(0), states)


def test_what_a_loop_may_not_say(llama: nn.Module, ids: torch.Tensor) -> None:
    clock, states = Clock(), torch.full((3, 7), int(M))
    with pytest.raises(ValueError, match="no request batch is open"):
        clock.tick(denoise(0), states)
    with pytest.raises(ValueError, match="at least one item"):
        clock.begin([])
    with sparsify(llama, TopP(0.5), clock=clock) as tracker:
        clock.begin([0, 1, 2])
        with pytest.raises(ValueError, match="for a batch of 3 items"):
            clock.tick(denoise(0), states[:2])
        with pytest.raises(ValueError, match="2 slots for 3 rows"):
            clock.tick([denoise(0), denoise(1)], states)
        with pytest.raises(ValueError, match=r"call clock\.tick before each one"):
            logits(llama, ids)
        clock.tick(denoise(0), states)
        with pytest.raises(ValueError, match="announced 21 rows, an FFN sees 18"):
            logits(llama, ids[:, :6])
        logits(llama, ids)
        clock.end()
    assert counts(tracker.read(), "step") == {(0,): 21}


def test_growth_beyond_capacity(llama: nn.Module, ids: torch.Tensor) -> None:
    readings = []
    for forwards in (1, 2, 100):
        clock = Clock()
        with sparsify(llama, TopP(0.5), clock=clock) as tracker, clock.batch([0, 1, 2], forwards):
            for step in range(9):
                clock.tick([denoise(step, branch) for branch in ("cond", "uncond", "cond")], torch.full((3, 7), int(M)))
                logits(llama, ids)
        readings.append(tracker.read())
    assert readings[0].columns == readings[1].columns == readings[2].columns
    assert counts(readings[0], "step") == {(step,): 21 for step in range(9)}


def test_an_exception_in_a_batch_counts_nothing(llama: nn.Module, ids: torch.Tensor) -> None:
    clock, states = Clock(), torch.full((3, 7), int(M))
    with sparsify(llama, TopP(0.5), clock=clock) as tracker:
        with pytest.raises(KeyError), clock.batch([0, 1, 2]):  # noqa: PT012
            clock.tick(denoise(0), states)
            logits(llama, ids)
            raise KeyError
        assert not tracker.read()["rows"]
        with clock.batch([0, 1, 2]):
            clock.tick(denoise(5), states)
            logits(llama, ids)
    assert counts(tracker.read(), "step") == {(5,): 21}
    assert not clock.listeners


def test_paused(llama: nn.Module, ids: torch.Tensor) -> None:
    clock, states = Clock(), torch.full((3, 7), int(M))
    dense = logits(llama, ids)
    with sparsify(llama, TopP(0.3), clock=clock) as tracker:
        with clock.paused():
            assert not torch.equal(logits(llama, ids), dense)  # the rule acts
        with clock.batch([0, 1, 2]):
            clock.tick(denoise(0), states)
            with clock.paused():
                logits(llama, ids[:, :4])  # any shape
                clock.tick(denoise(1), states)
                logits(llama, ids)
                with clock.batch([7]):
                    clock.tick(denoise(0), states[:1])
                    logits(llama, ids[:1])
            logits(llama, ids)
            clock.tick(denoise(1), states)  # what was said inside is forgotten
            logits(llama, ids)
    assert counts(tracker.read(), "step") == {(0,): 21, (1,): 21}
    assert set(tracker.read().per_item) == {0, 1, 2}


def test_two_trackers_on_one_clock(llama: nn.Module, ids: torch.Tensor) -> None:
    clock, states = Clock(), torch.full((3, 7), int(M))
    with sparsify(llama, None, "input", clock=clock) as outer, clock.batch([0, 1, 2]):
        clock.tick(denoise(0), states)
        logits(llama, ids)
        with sparsify(
            llama, TopP(0.5), "intermediate", clock=clock
        ) as inner:  # joins an open batch, leaves before its end
            assert not [note for note in inner.notes if "dry run" in note]
            clock.tick(denoise(1), states)
            logits(llama, ids)
        clock.tick(denoise(2), states)
        logits(llama, ids)
    assert counts(outer.read(), "step", "site") == {(step, "input"): 21 for step in range(3)}
    assert counts(inner.read(), "step", "site") == {(1, "intermediate"): 21}
    assert not clock.listeners


def test_sequence_scope_takes_padding_from_the_clock(llama: nn.Module, ids: torch.Tensor) -> None:
    outputs = []
    for pad in (5, 50):
        clock, given = Clock(), ids[:1].clone()
        given[0, -2:] = pad  # causal: the others do not see it
        with sparsify(llama, TopP(0.6, scope="sequence"), clock=clock), clock.batch([0]):
            clock.tick(denoise(0), table([P, P, M, M, M, X, X]))
            outputs.append(logits(llama, given)[:, :-2])
    assert torch.equal(*outputs)


def test_a_clock_that_is_not_exact_counts_other_rows_as_unknown() -> None:
    clock, states = Clock(exact=False), torch.full((4, 3), int(M))
    slots = [denoise(0), denoise(0), denoise(0, "uncond"), denoise(0, "uncond")]
    with clock.batch(["a", "b"] * 2):
        clock.tick(slots, states, Compare.START)
        frame = clock.rows(12, states.device)
        assert frame is clock.frame
        other = clock.rows(8, states.device)
        assert other is clock.rows(8, states.device)
        assert (other.compare, other.comparing) == (Compare.OFF, False)
        assert other.sequence.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert other.states.tolist() == [int(TokenState.UNKNOWN)] * 8
        assert other.index.tolist() == [len(TokenState) * n for n in (0, 0, 1, 1, 6, 6, 7, 7)]  # uncond is slot 1
        with pytest.raises(ValueError, match="announced 12 rows, an FFN sees 7"):
            clock.rows(7, states.device)
        clock.tick(denoise(1), states, Compare.PREVIOUS)
        assert clock.rows(12, states.device).compare is Compare.OFF
        assert clock.rows(4, states.device).index.tolist() == [len(TokenState) * (8 + n) for n in range(4)]
    assert len(clock.notes) == 1
    assert clock.overlap_refused
    assert "overlap is off" in clock.notes[0]


def test_a_pause_leaves_what_was_announced(llama: nn.Module) -> None:
    clock, states = Clock(exact=False), torch.full((2, 3), int(M))
    with clock.batch([0, 1]):
        clock.tick([denoise(0), denoise(0, "uncond")], states)
        before = clock.rows(2, states.device).index.tolist()
        with clock.paused(), clock.batch([7]):
            clock.tick(denoise(5), states[:1])
            clock.rows(2, states.device)
        assert clock.rows(2, states.device).index.tolist() == before == [0, len(TokenState) * 3]
        assert clock.rows(6, states.device) is clock.frame
