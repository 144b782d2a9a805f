"""Following a loop by its token ids: requests, guidance, blocks, and what is said where something is not known."""

from collections import Counter

import loop_models
import pytest
import tiny
import torch
from torch import nn
from transformers import DynamicCache

from dllm_sparsity import observe, sparsify


class Frames(list):
    """Every forward pass as (phase, branch of the last row, block, step, states, compare, request)."""

    def begin(self, clock):
        pass

    def end(self, clock):
        pass

    def tick(self, clock):
        slot, batch = list(clock.slots)[-1], len(clock.items)
        states = clock.frame.states.view(batch, -1).tolist()
        place = (str(slot.phase), slot.branch, slot.block, slot.step)
        self.append((*place, states, str(clock.frame.compare), clock.items[0][0]))


@torch.no_grad()
def watched(model, *calls, **options):
    frames = Frames()
    with observe(model, tiny.MASK, **options) as clock:
        clock.listeners.append(frames)
        for call in calls:
            call(model)
    return frames, clock


P, M, N, C, X, U = 1, 2, 3, 4, 6, 0
MASK = tiny.MASK


def canvas(*ids, **arguments):
    return lambda model: model(torch.tensor([list(ids)]), **arguments)


def test_a_prompt_that_stays_in_the_cache_for_the_next_request():
    model, cache = loop_models.qwen3(), DynamicCache()

    def block(*ids):
        def run(model):
            model(torch.tensor([list(ids)]), past_key_values=cache)
            cache.crop(-len(ids))

        return run

    prefill = canvas(10, 20, 30, past_key_values=cache)
    steps = [block(MASK, MASK), block(MASK, 40)]
    frames, _ = watched(model, prefill, *steps, *steps)
    assert [frame[:4] for frame in frames] == [
        ("prefill", "cond", 0, 0), ("denoise", "cond", 0, 0), ("denoise", "cond", 0, 1),
        ("denoise", "cond", 0, 0), ("denoise", "cond", 0, 1),
    ]  # fmt: skip
    assert [frame[4][0] for frame in frames] == [[P, P, P], [M, M], [M, N], [M, M], [M, N]]
    assert [frame[6] for frame in frames] == [1, 1, 1, 2, 2]


def test_a_prompt_in_two_parts_and_a_commit_without_prompt():
    model, cache = loop_models.qwen3(), DynamicCache()
    kept = [canvas(*ids, past_key_values=cache) for ids in ((10, 20), (30, 40))]
    frames, _ = watched(model, *kept)
    assert [frame[:4] for frame in frames] == [("prefill", "cond", 0, 0), ("prefill", "cond", 0, 1)]
    cache = DynamicCache()

    def first(*ids):
        def run(model):
            model(torch.tensor([list(ids)]), past_key_values=cache)
            cache.crop(-len(ids))

        return run

    frames, _ = watched(model, first(10, MASK), first(10, 20), first(10, 20))
    assert [frame[0] for frame in frames] == ["denoise", "commit", "commit"]
    frames, _ = watched(model, canvas(10, MASK), canvas(10, 20), canvas(10, 20))
    assert [frame[0] for frame in frames] == ["denoise", "correct", "correct"]


@pytest.mark.parametrize("kind", ["doubled", "two passes"])
def test_guidance_that_keeps_some_tokens_of_the_prompt(kind):
    model = tiny.llama(causal=False)
    full, free = [tiny.BOS, 9, 8, MASK, MASK], [tiny.BOS, MASK, MASK, MASK, MASK]
    if kind == "doubled":
        calls = [
            lambda model: model(torch.tensor([full, free])),
            lambda model: model(torch.tensor([[*full[:4], 7], [*free[:4], 7]])),
        ]
    else:
        calls = [canvas(*full), canvas(*free), canvas(*full[:4], 7), canvas(*free[:4], 7)]
    frames, _ = watched(model, *calls)
    assert [frame[1:4] for frame in frames if frame[1] == "uncond"] == [("uncond", 0, 0), ("uncond", 0, 1)]
    assert {frame[6] for frame in frames} == {1}
    assert all(row == [P, P, P, M, M] for frame in frames if frame[3] == 0 for row in frame[4])
    assert all(row == [P, P, P, M, N] for frame in frames if frame[3] == 1 for row in frame[4])


def test_two_rows_of_one_prompt_are_not_guidance():
    rows = lambda first, second: lambda model: model(torch.tensor([[9, 8, 7, *first], [9, 8, 7, *second]]))  # noqa: E731
    frames, _ = watched(
        tiny.llama(causal=False),
        rows((MASK, MASK), (MASK, MASK)),
        rows((5, MASK), (MASK, MASK)),
        rows((5, 6), (MASK, 6)),
    )
    assert {frame[1] for frame in frames} == {"cond"}
    assert {frame[6] for frame in frames} == {1}


def test_a_row_with_more_masks_of_the_same_text_is_not_guidance():
    both = torch.tensor([[9, 8, 7, 5, MASK], [9, 8, 7, MASK, MASK]])
    frames, _ = watched(tiny.llama(causal=False), lambda model: model(both))
    assert frames[0][4] == [[P, P, P, P, M], [P, P, P, M, M]]
    assert frames[0][1] == "cond"


def test_a_conversation_that_goes_on_is_a_new_request():
    frames, _ = watched(tiny.llama(causal=False), canvas(9, MASK), canvas(9, 5), canvas(9, 5, 7, MASK))
    assert [frame[6] for frame in frames] == [1, 1, 2]
    assert frames[2][4] == [[P, P, P, M]]


def test_blocks_are_known_by_the_columns_that_are_computed():
    model, ids = loop_models.blocks(), [9, *[MASK] * 6]

    def past(wide):
        with torch.no_grad():
            output = model.model.forward(torch.tensor([ids]), use_cache=True).past_key_values
        return [tuple(tensor[:, :, :wide] for tensor in layer) for layer in output]

    def suffix(left, *part):
        return canvas(*part, past_key_values=held[left])

    held = {left: past(left) for left in (1, 3)}
    frames, _ = watched(
        model,
        canvas(*ids), suffix(1, 5, *[MASK] * 5), suffix(3, *[MASK] * 4),  # the first block, then at once the second
        canvas(9, 5, 5, 6, *[MASK] * 3), canvas(9, 5, 5, 6, 6, *[MASK] * 2), canvas(9, 5, 5, 6, 6, 7, MASK),
    )  # fmt: skip
    assert [frame[2] for frame in frames] == [0, 0, 1, 2, 3, 4]
    assert [frame[3] for frame in frames] == [0, 1, 2, 3, 4, 5]


def test_an_attention_mask_tells_padding():
    mask = torch.tensor([[0, 1, 1, 1, 0]])
    frames, _ = watched(tiny.llama(causal=False), canvas(0, 9, MASK, MASK, MASK, attention_mask=mask))
    assert frames[0][4] == [[X, P, M, M, X]]
    cache = DynamicCache()
    parts = [
        canvas(9, 8, past_key_values=cache, attention_mask=torch.tensor([[1, 1]])),
        canvas(MASK, MASK, past_key_values=cache, attention_mask=torch.tensor([[1, 1, 1, 0]])),
    ]
    frames, _ = watched(loop_models.qwen3(), *parts)
    assert [frame[4] for frame in frames] == [[[P, P]], [[M, X]]]


class Odd(nn.Module):
    """An embedding, blocks and a head; the cache is of a kind of its own."""

    def __init__(self):
        super().__init__()
        self.inner = loop_models.Backbone(2)

    def get_input_embeddings(self):
        return self.inner.transformer.wte

    def forward(self, input_ids=None, embeddings=None, past=None):
        x = self.inner.transformer.wte(input_ids) if embeddings is None else embeddings
        for block in self.inner.transformer.blocks:
            x = block(x, **({} if past is None else {"layer_past": past}))[0]
        return x


def test_embeddings_instead_of_ids_are_unknown():
    model = Odd().eval()
    given = torch.zeros(1, 3, 32)
    with observe(model, MASK) as clock, sparsify(model, None, clock=clock) as tracker, torch.no_grad():
        model(torch.tensor([[9, MASK, MASK]]))
        model(embeddings=given)
        model(torch.tensor([[9, 4, MASK]]))
    counted = Counter()
    for state, layer, count in zip(*(tracker.read()[name] for name in ("token_state", "layer", "rows")), strict=True):
        counted[state] += count * (layer == 0)
    assert counted == {"prompt": 2, "masked": 3, "unknown": 3, "committed_now": 1}
    assert any("embeddings instead of token ids" in note for note in clock.notes)
    assert not sum(tracker.read()["rows_prev"])


def test_a_cache_that_does_not_tell_its_length_leaves_positions_unknown():
    class Cache:
        pass

    model = Odd()
    for block in model.inner.transformer.blocks:
        block.forward = lambda x, layer_past=None, block=block: (x + block.feed(x), None)
    calls = [lambda m, ids=ids: m(torch.tensor([ids]), past=Cache()) for ids in ([9, MASK, MASK], [MASK, 5], [5, 6])]
    frames, clock = watched(model, *calls)
    assert [frame[0] for frame in frames] == ["denoise", "denoise", "forward"]
    assert [frame[4] for frame in frames] == [[[U, M, M]], [[M, U]], [[U, U]]]
    assert {frame[5] for frame in frames} == {"off"}
    assert "layer_past of type Cache" in clock.notes[0]


def test_positions_are_taken_from_position_ids_where_nothing_else_tells_them():
    part = lambda *ids, at: canvas(*ids, position_ids=torch.tensor([range(at, at + len(ids))]), use_cache=False)  # noqa: E731
    frames, _ = watched(
        tiny.llama(causal=False), part(9, 8, MASK, MASK, MASK, at=0), part(MASK, 7, at=3), part(9, 8, 6, MASK, 7, at=0)
    )
    assert [frame[4][0] for frame in frames] == [[P, P, M, M, M], [M, N], [P, P, N, M, C]]
    assert {frame[6] for frame in frames} == {1}


def test_a_model_without_blocks_is_followed_by_its_embedding():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(100, 8)

        def get_input_embeddings(self):
            return self.words

        def forward(self, input_ids):
            return self.words(input_ids)

    frames, _ = watched(Small(), canvas(9, MASK, MASK), canvas(9, 5, MASK))
    assert [frame[4] for frame in frames] == [[[P, M, M]], [[P, N, M]]]
