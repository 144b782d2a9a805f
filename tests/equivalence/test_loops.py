"""observe() on loops of other codebases: phases, steps, states, counts and overlap equal what the loops say of themselves.

Each loop tells a log what it does. From the log alone, token by token, comes what a clock must have said; from plain
hooks, what a tracker must have counted.
"""

from __future__ import annotations

from collections import Counter

import loop_models
import loops
import pytest
import tiny
import torch
from loop_log import Listener, Log, expected
from tiny_families import diffusion_gemma

from dllm_sparsity import TopP, observe, sparsify
from dllm_sparsity.sparsity.clock import TokenState

PROMPTS = torch.tensor([[10, 20, 30, 40, 50], [60, 70, 80, 90, 15]])
LONGER = torch.tensor([[10, 20, 30, 40, 50, 60, 70, 80, 90, 11, 12], [7, 8, 9, 17, 18, 19, 27, 28, 29, 37, 38]])
RAGGED = [[10, 20, 30, 40, 50], [60, 70, 80, 90, 15, 25, 35, 45]]
EIGHT = torch.tensor([RAGGED[1]])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors are slower on several threads, above all where others use the processor too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bidirectional():
    return tiny.llama(causal=False, forbid_mask=True)


LOOPS = {
    "llada": (loop_models.blocks, lambda m, log: loops.llada(m, PROMPTS, log)),
    "llada guided": (loop_models.blocks, lambda m, log: loops.llada(m, PROMPTS, log, cfg=1.0)),
    "llada on a stock model": (bidirectional, lambda m, log: loops.llada(m, PROMPTS, log)),
    "dream": (bidirectional, lambda m, log: loops.dream(m, PROMPTS, log)),
    "dream, masks put back": (bidirectional, lambda m, log: loops.dream(m, PROMPTS, log, new=8, remask_at=(2, 4, 5))),
    "dream, tokens edited": (bidirectional, lambda m, log: loops.dream(m, PROMPTS, log, edit_at=(1, 3))),
    "a growing window, edited": (bidirectional, lambda m, log: loops.edited(m, PROMPTS, log, new=8)),
    "sdar": (loop_models.qwen3, lambda m, log: loops.sdar(m, PROMPTS[:1], log)),
    "sdar, two rows": (loop_models.qwen3, lambda m, log: loops.sdar(m, PROMPTS, log)),
    "sdar, whole blocks of prompt": (loop_models.qwen3, lambda m, log: loops.sdar(m, EIGHT, log)),
    "sdar, no block of prompt": (loop_models.qwen3, lambda m, log: loops.sdar(m, PROMPTS[:, :3], log)),
    "sdar guided": (loop_models.qwen3, lambda m, log: loops.sdar(m, PROMPTS, log, cfg=1.0)),
    "mdlm": (bidirectional, lambda m, log: loops.mdlm(m, RAGGED, log)),
    "mdlm guided": (bidirectional, lambda m, log: loops.mdlm(m, RAGGED, log, cfg=1.0)),
    "bd3lm": (loop_models.qwen3, lambda m, log: loops.bd3lm(m, RAGGED, log)),
    "bd3lm guided": (loop_models.qwen3, lambda m, log: loops.bd3lm(m, RAGGED, log, cfg=1.0)),
    "fast": (loop_models.blocks, lambda m, log: loops.fast(m, LONGER, log)),
    "fast, prefix cache": (loop_models.blocks, lambda m, log: loops.fast(m, LONGER, log, cache="prefix")),
    "fast, dual cache": (loop_models.blocks, lambda m, log: loops.fast(m, LONGER, log, cache="dual")),
    "fast, dual cache, threshold": (
        loop_models.blocks, lambda m, log: loops.fast(m, LONGER, log, cache="dual", threshold=0.9),
    ),
}  # fmt: skip


def down_projections(model):
    return [
        module
        for name, module in model.named_modules()
        if name.endswith(("down_proj", "blocks.0.ff_out", "blocks.1.ff_out"))
    ]


class Recount:
    """The input of every down projection, seen by plain hooks."""

    def __init__(self, model):
        self.rows = [[] for _ in down_projections(model)]
        self.handles = [
            module.register_forward_pre_hook(
                lambda module, args, into=into: into.append(args[0].flatten(0, -2).clone())
            )
            for module, into in zip(down_projections(model), self.rows, strict=True)
        ]

    def stop(self):
        for handle in self.handles:
            handle.remove()


def run(make, loop, rule, times=1, **options):
    model, log, listener = make(), Log(), Listener()
    with observe(model, loops.MASK, **{"pad_token_id": loops.PAD, **options}) as clock:
        clock.listeners.append(listener)
        with sparsify(model, rule, "intermediate", clock=clock) as tracker:
            recount = Recount(model)
            results = [loop(model, log) for _ in range(times)]
            recount.stop()
    return tracker.read(), log, listener.said, recount, results, clock


@pytest.mark.parametrize("name", LOOPS)
def test_every_forward_pass_is_what_the_loop_says(name):
    make, loop = LOOPS[name]
    _, log, said, recount, _, clock = run(make, loop, None, times=2)
    told = list(expected(log))
    assert [one.slots for one in said] == [slots for slots, *_ in told]
    for one, (_, states, compare, request) in zip(said, told, strict=True):
        assert one.states.tolist() == states
        assert one.compare is compare
        assert {item[0] for item in one.items} == {request}
    for rows in recount.rows:
        assert [len(seen) for seen in rows] == [one.states.numel() for one in said]
    assert not clock.notes


@pytest.mark.parametrize("name", LOOPS)
def test_tokens_behind_an_end_token_are_told_apart(name):
    make, loop = LOOPS[name]
    log = Log()
    made = loop(make(), log)
    new = ~(log.passes[-1].given | log.passes[-1].pad)
    end = int(made[0, : new.shape[1]][new[0]][1])  # the second token that the first row got
    _, log, said, *_ = run(make, loop, None, eos_token_id=end)
    states = [states for _, states, *_ in expected(log, end)]
    assert [one.states.tolist() for one in said] == states
    assert TokenState.AFTER_EOS in {state for table in states for row in table for state in row}


@pytest.mark.parametrize("name", LOOPS)
def test_counts_and_overlap_equal_a_recount(name):
    make, loop = LOOPS[name]
    reading, log, _, recount, _, _ = run(make, loop, TopP(0.6), times=2)
    density, overlap = Counter(), Counter()
    for layer, rows in enumerate(recount.rows):
        sets, request = {}, 0
        for entry, seen, (slots, states, *_) in zip(log.passes, rows, expected(log), strict=True):
            if entry.request != request:
                sets, request = {}, entry.request
            wide = len(entry.columns)
            for number, values in enumerate(seen):
                row, column = divmod(number, wide)
                key, state = (*slots[row], layer), states[row][column].name.lower()
                kept = {int(place) for place in values.nonzero()}
                density[(*key, state, "rows")] += 1
                density[(*key, state, "kept")] += len(kept)
                density[(*key, state, "total")] += len(values)
                before = sets.get((slots[row][1], row, entry.columns[column]))
                if before is not None and before[0] == entry.columns and state != "pad":
                    overlap[(*key, "rows_prev")] += 1
                    overlap[(*key, "inter_prev")] += len(kept & before[1])
                    overlap[(*key, "union_prev")] += len(kept | before[1])
            for branch in entry.branches:  # only the pass before of this branch counts
                sets = {place: value for place, value in sets.items() if place[0] != branch}
            for number, values in enumerate(seen):
                row, column = divmod(number, wide)
                kept = {int(place) for place in values.nonzero()}
                sets[slots[row][1], row, entry.columns[column]] = entry.columns, kept
    assert counted(reading, ("rows", "kept", "total"), with_state=True) == +density
    assert counted(reading, ("rows_prev", "inter_prev", "union_prev"), without="pad") == +overlap
    assert overlap
    assert sum(n for key, n in density.items() if key[-1] == "kept") < 0.5 * sum(
        n for key, n in density.items() if key[-1] == "total"
    )


def counted(reading, columns, with_state=False, without=None):
    found = Counter()
    for number in range(len(reading["rows"])):
        state = reading["token_state"][number]
        if state == without:
            continue
        key = tuple(reading[name][number] for name in ("phase", "branch", "block", "step", "layer"))
        for column in columns:
            found[(*key, state, column) if with_state else (*key, column)] += reading[column][number]
    return +found


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_gives_the_same_tokens_when_observed(name):
    make, loop = LOOPS[name]
    plain = loop(make(), Log())
    assert torch.equal(run(make, loop, None)[4][0], plain)
    assert (plain != loops.MASK).all() or "dream" in name


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_diffusion_gemma_without_a_mask_token(cache):
    model, listener, prompt = diffusion_gemma(), Listener(), PROMPTS
    seen, handles = [], []
    for side, stack in (("encode", model.model.encoder.language_model), ("denoise", model.model.decoder)):
        mlp = stack.layers[-1].mlp.down_proj
        handles.append(mlp.register_forward_pre_hook(lambda m, args, side=side: seen.append((side, args[0].shape[:2]))))

    def generate():
        torch.manual_seed(0)
        made = model.generate(
            prompt, max_new_tokens=16, max_denoising_steps=3, stability_threshold=None, confidence_threshold=None,
            cache_implementation=cache, disable_compile=True, eos_token_id=None, pad_token_id=loops.PAD,
        )  # fmt: skip
        return made.sequences

    plain = generate()
    del seen[:]
    with observe(model, None, pad_token_id=loops.PAD) as clock:
        clock.listeners.append(listener)
        assert all(torch.equal(generate(), plain) for _ in range(2))
    for handle in handles:
        handle.remove()
    one = [("encode", 0, 0, 5), *[("denoise", 0, step, 8) for step in range(3)]]
    two = [("encode", 0, 1, 8), *[("denoise", 1, step, 8) for step in range(3, 6)]]
    said = [(slot[0], slot[2], slot[3], one.states.shape[1]) for one in listener.said for slot in one.slots[:1]]
    assert said == [*one, *two] * 2
    assert [(entry.slots[0][0], entry.states.shape) for entry in listener.said] == seen
    starts = ["start", "start", "previous", "previous", "start", "start", "previous", "previous"]
    assert [str(entry.compare) for entry in listener.said] == starts * 2
    states = [set(entry.states.flatten().tolist()) for entry in listener.said[:8]]
    unknown, prompt_, now = ({int(s)} for s in (TokenState.UNKNOWN, TokenState.PROMPT, TokenState.COMMITTED_NOW))
    assert states == [prompt_, *[unknown] * 3, now, *[unknown] * 3]
    assert {item[0] for entry in listener.said for item in entry.items} == {1, 2}
    assert any("no mask token" in note for note in clock.notes)


def test_loops_of_all_kinds_one_after_another():
    model, log, listener = loop_models.qwen3(), Log(), Listener()
    with observe(model, loops.MASK, pad_token_id=loops.PAD) as clock:
        clock.listeners.append(listener)
        for cfg in (0.0, 1.0, 0.0):
            for prompts in (PROMPTS, PROMPTS[:1], PROMPTS.flip(0), PROMPTS[:, :4]):
                loops.sdar(model, prompts, log, cfg=cfg)
                loops.llada(model, prompts, log, cfg=cfg)
                loops.bd3lm(model, RAGGED, log, cfg=cfg)
                loops.mdlm(model, RAGGED[::-1], log, cfg=cfg)
                loops.bd3lm(model, prompts.tolist(), log, cfg=cfg)
    told = list(expected(log))
    assert [one.slots for one in listener.said] == [slots for slots, *_ in told]
    assert [{item[0] for item in one.items} for one in listener.said] == [{entry.request} for entry in log.passes]


def test_tokens_gathered_by_a_cache_are_counted_and_not_compared():
    prompts = torch.cat([LONGER, LONGER.flip(0)], dim=1)[:, :11]
    make = lambda: loop_models.blocks(layers=3)  # noqa: E731
    model, log, listener = make(), Log(), Listener()
    plain = loops.llada(loop_models.gather_tokens(make(), 11), prompts, Log())
    with observe(model, loops.MASK) as clock:
        clock.listeners.append(listener)
        with sparsify(model, None, "intermediate", clock=clock) as tracker:
            loop_models.gather_tokens(model, 11)
            recount = Recount(model)
            assert torch.equal(loops.llada(model, prompts, log), plain)
            recount.stop()
    reading = tracker.read()
    assert [[len(seen) // 2 for seen in rows] for rows in recount.rows] == [[19] * 8, [19, 2, 8, 2] * 2]
    found = Counter()
    for layer, step, state, rows in zip(
        *(reading[name] for name in ("layer", "step", "token_state", "rows")), strict=True
    ):
        found[layer, step, state == "unknown"] += rows
    for layer, seen in enumerate(recount.rows):
        for step, rows in enumerate(seen):
            assert found[layer, step, len(rows) != 38] == len(rows)
            assert found[layer, step, len(rows) == 38] == 0
    compared = {step for step, rows in zip(reading["step"], reading["rows_prev"], strict=True) if rows}
    assert compared <= {1}
    assert {str(entry.compare) for entry in listener.said[2:]} == {"off"}
    assert any("overlap is off" in note for note in clock.notes)
