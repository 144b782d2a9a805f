"""The AR backend gives what lm-eval's own HFLM gives on the same model."""

import pytest
import tiny
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from autoregressive.backend import AutoregressiveBackend

PAIRS = [
    ("hello", " world"),
    ("", "xyz"),
    ("The quick brown", " fox jumps"),
    ("trailing ", "b"),
    ("q" * 70, "z" * 40),
    ("a", "b"),
]
PROMPTS = ["hello", "The quick brown fox jumps over", "x", "0123456789" * 9]


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3", "gpt2", "opt"])
def both(request):
    model, tokenizer = tiny.causal_lm(request.param), tiny.tokenizer()
    arguments = {"batch_size": 3, "max_length": 100}
    return AutoregressiveBackend(model, tokenizer, **arguments), HFLM(
        pretrained=model, tokenizer=tokenizer, **arguments
    )


def requests(kind, arguments):
    return [Instance(kind, {}, argument, 0, ("task", number, 1)) for number, argument in enumerate(arguments)]


def test_loglikelihood(both):
    ours, theirs = (lm.loglikelihood(requests("loglikelihood", PAIRS)) for lm in both)
    for (value, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert value == pytest.approx(expected, rel=1e-5)
        assert greedy == expected_greedy


def test_greedy_target_is_greedy(both):
    ours, theirs = both
    text = theirs.generate_until(requests("generate_until", [("hello", {"until": [], "max_gen_toks": 5})]))[0]
    if len(text) < 5:
        pytest.skip("the random model generated a special token")
    pair = requests("loglikelihood", [("hello", text)])
    assert ours.loglikelihood(pair)[0][1] is True
    assert theirs.loglikelihood(pair)[0][1] is True


def test_loglikelihood_rolling(both):
    texts = [("abc def " * 40,), ("hello",), ("one two three " * 9,)]
    ours, theirs = (lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for lm in both)
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("until", [[], ["f"], ["Q", "j", "zz"]])  # no part of a special token
def test_generate_until(both, until):
    arguments = [(prompt, {"until": list(until), "max_gen_toks": 24}) for prompt in PROMPTS]
    ours, theirs = (lm.generate_until(requests("generate_until", arguments)) for lm in both)
    assert ours == theirs


def test_chat_template_and_tokens(both):
    ours, theirs = both
    history = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(history) == theirs.apply_chat_template(history)
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.tok_encode("a b") == theirs.tok_encode("a b")
    assert (ours.prefix_token_id, ours.eot_token_id, ours.max_length) == (
        theirs.prefix_token_id,
        theirs.eot_token_id,
        theirs.max_length,
    )


def test_sampling_does_not_depend_on_the_batch():
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    arguments = [(p, {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}) for p in PROMPTS]
    one, many = (
        AutoregressiveBackend(model, tokenizer, batch_size=size).generate_until(requests("generate_until", arguments))
        for size in (1, 4)
    )
    assert one == many
