"""In float32 padding, prompt lengths and the batch split change no count, on both backends."""

from collections import Counter

import pytest
import tiny
import torch
from lm_eval.api.instance import Instance

from autoregressive.backend import AutoregressiveBackend
from dllm_sparsity.diffusion.backend import DiffusionBackend
from dllm_sparsity.diffusion.samplers.confidence_threshold import ConfidenceThreshold
from dllm_sparsity.errors import UserError
from dllm_sparsity.sparsity.rules.top_p import TopP
from dllm_sparsity.sparsity.sparsifier import sparsify

PAIRS = [("hello", " world"), ("The quick brown", " fox"), ("q" * 30, "z" * 9), ("ab", "cd ef"), ("x", "y")]
PROMPTS = ["hello", "The quick brown fox", "x", "0123456789"]


def requests(kind, arguments):
    return [Instance(kind, {}, argument, 0, ("task", number, 1)) for number, argument in enumerate(arguments)]


def backend(paradigm, size):
    if paradigm == "autoregressive":
        return AutoregressiveBackend(tiny.llama(), tiny.tokenizer(), batch_size=size)
    model = tiny.llama(causal=False, forbid_mask=True)
    return DiffusionBackend(model, tiny.tokenizer(), batch_size=size, mc=3, block_length=4, steps=8)


def counts(paradigm, size, kind, **denoising):
    lm = backend(paradigm, size)
    if denoising:
        lm.denoising |= denoising
    lm.check_greedy = False
    with sparsify(lm.model, TopP(0.8), ["input", "gate", "up", "intermediate"], clock=lm.clock) as tracker:
        if kind == "likelihood":
            lm.loglikelihood(requests("loglikelihood", PAIRS))
            lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("some text to score",), ("more",)]))
        else:
            arguments = [(prompt, {"until": [], "max_gen_toks": 8}) for prompt in PROMPTS]
            lm.generate_until(requests("generate_until", arguments))
    reading = tracker.read()
    summed = Counter()
    for row in range(len(reading["rows"])):
        if reading["token_state"][row] != "pad":
            names = ("phase", "branch", "block", "step", "noise_bin", "layer", "site", "token_state")
            key = tuple(reading[name][row] for name in names)
            for name in ("rows", "kept", "total", "inter_prev", "union_first"):
                summed[(*key, name)] += reading[name][row]
    return summed, reading


@pytest.mark.parametrize("paradigm", ["autoregressive", "diffusion"])
@pytest.mark.parametrize("kind", ["likelihood", "generation"])
def test_batch_split_changes_no_count(paradigm, kind):
    one, alone = counts(paradigm, 1, kind)
    many, together = counts(paradigm, 9, kind)
    assert one == many
    assert alone.per_item == together.per_item
    assert "pad" in together["token_state"]
    assert "pad" not in alone["token_state"]


def rows_of(reading, **only):
    chosen = (
        row for row in range(len(reading["rows"])) if all(reading[name][row] == value for name, value in only.items())
    )
    return sum(reading["rows"][row] for row in chosen if reading["layer"][row] == 0 and reading["site"][row] == "input")


def test_prefill_and_decode_are_counted_apart():
    _, reading = counts("autoregressive", 4, "generation")
    assert rows_of(reading, phase="prefill", token_state="prompt") == sum(map(len, PROMPTS))
    decoded = rows_of(reading, phase="decode", token_state="committed_now") + rows_of(
        reading, phase="decode", token_state="after_eos"
    )
    assert decoded == 7 * len(PROMPTS)  # the first token comes out of the prefill, the last is never read


def test_likelihood_states():
    _, reading = counts("autoregressive", 4, "likelihood")
    context = sum(len(context) for context, _ in PAIRS) + 2  # and a BOS for each rolling text
    scored = sum(len(target) - 1 for _, target in PAIRS) + 17 + 3
    assert rows_of(reading, phase="likelihood", token_state="prompt") == context
    assert rows_of(reading, phase="likelihood", token_state="committed") == scored


def test_denoise_states_follow_the_schedule():
    _, reading = counts("diffusion", 4, "generation")
    assert rows_of(reading, phase="denoise", token_state="prompt") == 8 * sum(map(len, PROMPTS))
    masked = [rows_of(reading, step=step, token_state="masked") for step in range(8)]
    assert masked == [4 * (8 - step) for step in range(8)]
    fresh = [rows_of(reading, step=step, token_state="committed_now") for step in range(8)]
    behind = [rows_of(reading, step=step, token_state="after_eos") for step in range(8)]
    assert fresh[0] == 0
    assert all(now + ended >= 1 for now, ended in zip(fresh[1:], behind[1:], strict=True))
    assert {reading["block"][row] for row in range(len(reading["rows"]))} == {0, 1}


def test_greedy_checks_are_not_counted():
    lm = backend("diffusion", 4)
    with sparsify(lm.model, TopP(0.8), clock=lm.clock) as tracker:
        lm.loglikelihood(requests("loglikelihood", PAIRS))
    assert set(tracker.read()["phase"]) == {"likelihood"}


def test_guidance_is_its_own_branch():
    lm = backend("diffusion", 4)
    lm.denoising["cfg_scale"] = 1.0
    with sparsify(lm.model, TopP(0.8), clock=lm.clock) as tracker:
        lm.generate_until(requests("generate_until", [("hello", {"until": [], "max_gen_toks": 8})]))
    reading = tracker.read()
    assert set(reading["branch"]) == {"cond", "uncond"}
    ((kept, total),) = (value["intermediate"] for value in reading.per_item.values())
    assert total == 8 * (5 + 8) * 64 * 2 or lm.log[("task", 0)].new_tokens < 8
    assert lm.log[("task", 0)].nfe == 16
    assert kept < total


@pytest.mark.parametrize("block_length", [None, 4])
def test_rows_that_wait_for_others_are_not_counted(block_length):
    """With commits that depend on the model, rows of a batch end at different steps."""
    sampler = ConfidenceThreshold(confidence_threshold=0.3)
    one, alone = counts("diffusion", 1, "generation", sampler=sampler, block_length=block_length)
    many, together = counts("diffusion", 4, "generation", sampler=sampler, block_length=block_length)
    assert one == many
    assert alone.per_item == together.per_item
    assert len(set(alone.per_item[item]["input"][1] for item in alone.per_item)) > 1


def test_a_finished_text_ends_its_counts_and_its_forward_passes():
    logs = []
    for size in (1, 4):
        lm = backend("diffusion", size)
        lm.denoising |= {"block_length": None, "steps": None}
        with torch.no_grad():  # a model that likes to end
            lm.model.lm_head.weight[tiny.EOS] *= 2.5
        with sparsify(lm.model, TopP(0.8), clock=lm.clock) as tracker:
            lm.generate_until(requests("generate_until", [(p, {"until": [], "max_gen_toks": 8}) for p in PROMPTS]))
        logs.append(({item: (log.nfe, log.new_tokens) for item, log in lm.log.items()}, tracker.read().per_item))
    assert logs[0] == logs[1]
    assert min(nfe for nfe, _ in logs[0][0].values()) < 8


@pytest.mark.parametrize("paradigm", ["autoregressive", "diffusion"])
def test_odd_requests(paradigm):
    lm = backend(paradigm, 2)
    pairs = [("hello", ""), ("", ""), ("a", "b"), ("x", "")]
    scores = lm.loglikelihood(requests("loglikelihood", pairs))
    assert [scores[n] for n in (0, 1, 3)] == [(0.0, True)] * 3
    assert scores[2][0] < 0
    assert lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("",), ("ab",)]))[0] == 0.0
    assert len(lm.generate_until(requests("generate_until", [("", {"until": [], "max_gen_toks": 4})]))) == 1
    with pytest.raises(UserError, match="target longer than the model"):
        lm.loglikelihood(requests("loglikelihood", [("a", "b" * 300)]))


@pytest.mark.parametrize("paradigm", ["autoregressive", "diffusion"])
def test_repeats_of_an_item_draw_anew(paradigm):
    options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5}
    repeated = [Instance("generate_until", {}, ("hello", options), 0, ("task", 0, 3)) for _ in range(3)]
    assert len(set(backend(paradigm, 2).generate_until(repeated))) == 3
    assert backend(paradigm, 2).generate_until(repeated) == backend(paradigm, 3).generate_until(repeated)


def test_a_tokenizer_that_closes_texts():
    """Tokenizers of masked LMs put a separator behind a text; it is neither scored nor part of a prompt."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", tiny.BOS), ("<eos>", tiny.EOS)]
    )
    lm = DiffusionBackend(tiny.llama(causal=False), tokenizer, mc=2)
    assert lm.tok_encode("ab") == [tiny.BOS, *tokenizer.encode("ab", add_special_tokens=False)]
    assert lm._encode("hello", " ab")[1] == tokenizer.encode(" ab", add_special_tokens=False)
