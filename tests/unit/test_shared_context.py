"""Sharing an item's context changes what is computed, not what is counted, and likelihoods by rounding alone."""

from collections import Counter

import pytest
import tiny
import torch
from lm_eval.api.instance import Instance
from material import make_study

from autoregressive.backend import AutoregressiveBackend
from autoregressive.shared import Read, alike, continues, cost
from dllm_sparsity.lm.items import Target
from dllm_sparsity.sparsity.rules.layerwise import Layerwise
from dllm_sparsity.sparsity.rules.max_p import MaxP
from dllm_sparsity.sparsity.rules.random import Random
from dllm_sparsity.sparsity.rules.threshold import Threshold
from dllm_sparsity.sparsity.rules.top_k import TopK
from dllm_sparsity.sparsity.rules.top_p import TopP
from dllm_sparsity.sparsity.sparsifier import sparsify
from dllm_sparsity.study.config import ModelConfig, StudyConfig
from dllm_sparsity.study.models import open_backend
from dllm_sparsity.study.plan import cell_parts, expand

SHARED = "a long context that all options of the item have, number "
OPTIONS = [" yes", " no way at all", " x", " perhaps so", " no"]
LETTERS = ["A", "B", "C", "D"]
KEYS = ("phase", "branch", "block", "step", "noise_bin", "layer", "site", "expert", "token_state")


def asked(options, items=5):
    return [
        Instance("loglikelihood", {}, (SHARED + "9" * (1 + 7 * number), option), 0, ("task", number, 1))
        for number in range(items)
        for option in options
    ]


def scored(model, options, share, rule=None, sites="all", **settings):
    """Return scores, counts by step record without padding, counts by item, and tokens that the model read."""
    lm = AutoregressiveBackend(model, tiny.tokenizer(), **{"batch_size": 8, **settings}, share_context=share)
    read = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, args, out: read.append(args[0].numel()))
    try:
        with sparsify(model, rule, sites, clock=lm.clock) as tracker:
            read.clear()
            found = lm.loglikelihood(asked(options))
            reading = tracker.read()
    finally:
        handle.remove()
    sums = Counter()
    for row in range(len(reading["rows"])):
        if reading["token_state"][row] != "pad":
            key = tuple(reading[name][row] for name in KEYS)
            for name in ("rows", "kept", "total"):
                sums[(*key, name)] += reading[name][row]
    logs = {item: (entry.loglikelihoods, entry.target_tokens, entry.nfe) for item, entry in lm.log.items()}
    return found, sums, reading.per_item, sum(read), logs


def assert_the_same(shared, alone):
    for (value, greedy), (expected, expected_greedy) in zip(shared[0], alone[0], strict=True):
        assert value == pytest.approx(expected, rel=1e-5)
        assert greedy == expected_greedy
    assert shared[1] == alone[1]
    assert shared[2] == alone[2]
    assert {item: entry[1:] for item, entry in shared[4].items()} == {i: entry[1:] for i, entry in alone[4].items()}


@pytest.mark.parametrize("options", [OPTIONS, LETTERS], ids=["words", "letters"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "gemma3", "mixtral"])
def test_likelihoods_and_counts_are_those_of_each_option_alone(name, options):
    model = tiny.causal_lm(name)
    sites = "intermediate" if name in ("gpt2", "opt", "mixtral") else "all"
    shared, alone = (scored(model, options, share, TopP(0.8), sites) for share in (True, False))
    assert_the_same(shared, alone)
    if options is LETTERS or name != "gemma3":
        assert shared[3] < 0.6 * alone[3]
    else:
        assert not continues(model)  # layers with a sliding window


@pytest.mark.parametrize(
    "rule", [None, TopK(0.4), TopP(0.9, ties="minimal"), MaxP(0.1), Threshold(0.2), Layerwise(0.2)], ids=str
)
def test_every_rule_that_takes_rows_for_themselves(rule):
    shared, alone = (scored(tiny.llama(), OPTIONS, share, rule) for share in (True, False))
    assert_the_same(shared, alone)
    assert shared[3] < 0.6 * alone[3]


@pytest.mark.parametrize("settings", [{"batch_size": 3}, {"batch_size": 1}, {"batch_size": 64}, {"max_length": 70}])
def test_any_batch_and_contexts_that_are_cut(settings):
    assert_the_same(*(scored(tiny.llama(), OPTIONS, share, TopP(0.8), **settings) for share in (True, False)))


@pytest.mark.parametrize("rule", [TopP(0.8, scope="sequence"), Random(0.8)], ids=str)
def test_a_rule_over_whole_sequences_or_on_the_last_bits_shares_nothing(rule):
    shared, alone = (scored(tiny.llama(), OPTIONS, share, rule, batch_size=64) for share in (True, False))
    assert shared[0] == alone[0]
    assert shared[1:3] == alone[1:3]
    assert shared[3] == alone[3]
    lm = AutoregressiveBackend(tiny.llama(), tiny.tokenizer())
    with sparsify(lm.model, rule, "all", clock=lm.clock):
        assert not lm.clock.may_share
        with sparsify(lm.model, None, "all", clock=lm.clock):
            assert not lm.clock.may_share
    with sparsify(lm.model, TopP(0.8), "all", clock=lm.clock):
        assert lm.clock.may_share


def test_nothing_is_shared_where_nobody_counts_on_the_clock():
    """A tracker with another clock, or none, would count a shared row once."""
    model, counts = tiny.llama(), []
    for share in (True, False):
        lm = AutoregressiveBackend(model, tiny.tokenizer(), batch_size=5, share_context=share)
        with sparsify(model, TopP(0.8), "input") as tracker:
            lm.loglikelihood(asked(OPTIONS, items=1))
        counts.append(tracker.read()["rows"])
    assert counts[0] == counts[1]


def test_several_trackers_count_the_same():
    model = tiny.llama()
    lm = AutoregressiveBackend(model, tiny.tokenizer(), batch_size=8)
    with (
        sparsify(model, TopP(0.8), "input", clock=lm.clock) as first,
        sparsify(model, None, "input", clock=lm.clock) as second,
    ):
        lm.loglikelihood(asked(OPTIONS))
    assert first.read()["total"] == second.read()["total"]


def test_targets_of_two_items_and_of_two_lengths_are_no_equal_inputs():
    def read(item, context, tokens):
        return Read.of(Target(item, context, tokens), 100)

    reads = [
        read(1, [5, 6], [7]),
        read(1, [5, 6], [8]),
        read(2, [5, 6], [7]),
        read(1, [5], [6, 7]),
        read(1, [5], [6, 9]),
    ]
    assert alike(reads) == [[0, 1], [2], [3, 4]]
    assert cost(reads[:2], True) == (2, False)
    cut = Read.of(Target(1, [1, 2, 3, 4], [5, 6]), 3)
    assert (cut.context, cut.tokens, cut.ids) == ((3, 4)[-2:], (5, 6), [3, 4, 5])


def test_requests_without_shared_contexts_are_batched_as_before():
    targets = [Target(number, [5] * (1 + number % 7), [6] * (1 + number % 3)) for number in range(40)]
    order = list(range(40))
    plans = []
    for share in (True, False):
        lm = AutoregressiveBackend(tiny.llama(), tiny.tokenizer(), batch_size=8, share_context=share)
        plans.append(list(lm._batches(order, targets)))
    assert plans[0] == plans[1]


def test_the_dry_run_knows_the_forward_passes():
    model = tiny.llama()
    for options in (OPTIONS, LETTERS):
        lm = AutoregressiveBackend(model, tiny.tokenizer(), batch_size=8)
        seen = []
        handle = model.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        with sparsify(model, None, "all", clock=lm.clock):
            targets = [Target(r.doc_id, *lm._encode(*r.args)) for r in asked(options)]
            for batch in lm._batches(list(range(len(targets))), targets):
                seen.clear()
                own = [targets[number] for number in batch]
                lm._score(own)
                told = lm.forwards(own)
                assert len(seen) == len(told)
                assert sum(map(len, (lengths for lengths, _, _ in told))) < 2 * len(own)
        handle.remove()


def test_weights_need_one_for_each_row():
    lm = AutoregressiveBackend(tiny.llama(), tiny.tokenizer())
    with pytest.raises(ValueError, match="1 weights for 2 items"):
        lm.clock.begin(["a", "b"], weights=[2])


def test_only_switching_it_off_changes_a_fingerprint(material):
    study = StudyConfig.model_validate(make_study(material))
    cells = [next(cell for cell in expand(study) if cell.model == model) for model in study.models]
    for cell in cells:
        parts = cell_parts(cell, 0, {}, {}, {})["model"]
        assert "share_context" not in parts
        off = cell.model.model_copy(update={"share_context": False})
        changed = cell_parts(cell.__class__(off, cell.task, None, None, None, ("input",)), 0, {}, {}, {})["model"]
        assert changed == (parts | {"share_context": False} if off.paradigm == "autoregressive" else parts)
    off = ModelConfig(paradigm="autoregressive", model=str(material / "ar"), share_context=False)
    assert open_backend(off, "cpu", 0).share_context is False


def test_the_first_tokens_of_long_and_short_options_agree_with_one_pass():
    torch.manual_seed(0)
    lm = AutoregressiveBackend(tiny.llama(), tiny.tokenizer(), batch_size=8)
    targets = [Target(0, list(range(5, 60)), tokens) for tokens in ([7], [7, 8, 9], [7, 8, 10], [11, 12])]
    alone = [score.loglikelihood for score in lm._score(targets)]
    with sparsify(lm.model, None, "all", clock=lm.clock):
        assert cost([Read.of(target, 256) for target in targets], True)[1]
        assert [score.loglikelihood for score in lm._score(targets)] == pytest.approx(alone, rel=1e-5)
