"""Token ids are made once a task: equal to fresh ones, bounded, and forgotten with the task or the tokenizer."""

import pytest
import tiny
from lm_eval.api.instance import Instance

from autoregressive.backend import AutoregressiveBackend
from dllm_sparsity.diffusion.backend import DiffusionBackend
from dllm_sparsity.lm.kept_tokens import KeptTokens

PAIRS = [("hello", " world"), ("hello", " you"), ("", "xyz"), ("trailing ", "b"), ("context", "")]


def requests(kind, arguments, task="task"):
    return [Instance(kind, {}, argument, 0, (task, number, 1)) for number, argument in enumerate(arguments)]


class Counting:
    """A tokenizer that counts its calls."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def encode(self, *args, **kwargs):
        self.calls += 1
        return self.tokenizer.encode(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


@pytest.fixture(params=[AutoregressiveBackend, DiffusionBackend])
def lm(request):
    model = tiny.llama(request.param is AutoregressiveBackend, forbid_mask=request.param is DiffusionBackend)
    backend = request.param(model, tiny.tokenizer(), batch_size=4)
    backend.check_greedy = False
    backend.tokenizer = Counting(backend.tokenizer)
    return backend


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("loglikelihood", PAIRS),
        ("loglikelihood_rolling", [("one two three",), ("",), ("four",)]),
        ("generate_until", [("hello", {"until": [], "max_gen_toks": 3}), ("x", {"until": [], "max_gen_toks": 3})]),
    ],
)
def test_a_second_cell_of_a_task_tokenises_nothing_and_gets_the_same(lm, kind, arguments):
    first = getattr(lm, kind)(requests(kind, arguments))
    calls = lm.tokenizer.calls
    assert calls
    lm.log.clear()
    assert getattr(lm, kind)(requests(kind, arguments)) == first
    assert lm.tokenizer.calls == calls
    getattr(lm, kind)(requests(kind, arguments, "another task"))
    assert lm.tokenizer.calls == 2 * calls


def test_ids_are_those_of_a_fresh_tokenizer_and_nobody_changes_them(lm):
    kept = KeptTokens()
    kept.open(lm.tokenizer, ["task"])
    for _ in range(2):
        for context, continuation in PAIRS:
            ids = kept.pair(context, continuation, lm._encode)
            assert ids == lm._encode(context, continuation)
            ids[0].append(1)
        ids = kept.text("a text", lm.tok_encode)
        assert ids == lm.tok_encode("a text")
        ids.append(1)


def test_another_tokenizer_has_ids_of_its_own():
    kept = KeptTokens()
    for tokenizer, ids in ((object(), [1]), (object(), [2])):
        kept.open(tokenizer, ["task"])
        assert kept.text("a", lambda text, ids=ids: list(ids)) == ids


def test_what_is_beyond_the_size_is_made_each_time():
    kept, made = KeptTokens(most_bytes=3 * 8 + 3), []
    kept.open(None, ["task"])

    def encode(text):
        made.append(text)
        return [ord(letter) for letter in text]

    for _ in range(2):
        assert [kept.text(text, encode) for text in ("abc", "de")] == [[97, 98, 99], [100, 101]]
    assert made == ["abc", "de", "de"]


def test_the_options_of_an_item_share_its_context():
    long, kept = "c" * 100, KeptTokens(most_bytes=900 + 4 * 10)
    kept.open(None, ["task"])
    made = []

    def encode(context, continuation):
        made.append(continuation)
        return [1] * len(context), [2] * len(continuation)

    for _ in range(2):
        for option in "abcd":
            assert kept.pair(long, option, encode) == ([1] * 100, [2])
    assert made == list("abcd")
