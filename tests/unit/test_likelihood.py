"""The likelihood bound: exact by enumeration, unbiased by Monte Carlo, paired over rules."""

import itertools
import math

import numpy as np
import pytest
import tiny
import torch

from dllm_sparsity.diffusion.backend import DiffusionBackend
from dllm_sparsity.diffusion.likelihood import MAX_EXACT, exact, monte_carlo, target_seed
from dllm_sparsity.errors import UserError
from dllm_sparsity.lm.base import Target
from dllm_sparsity.sparsity.rules.top_p import TopP
from dllm_sparsity.sparsity.sparsifier import sparsify


@pytest.fixture(scope="module")
def model():
    return tiny.llama(causal=False)


@torch.no_grad()
def enumerated(model, context, tokens):
    """The bound from its definition: all mask counts, all subsets, one forward pass each."""
    length, total = len(tokens), 0.0
    for count in range(1, length + 1):
        subsets = list(itertools.combinations(range(length), count))
        for subset in subsets:
            noisy = [tiny.MASK if i in subset else token for i, token in enumerate(tokens)]
            log = model(torch.tensor([context + noisy])).logits[0].double().log_softmax(-1)
            loss = sum(float(log[len(context) + i, tokens[i]]) for i in subset)
            total += loss * length / count / len(subsets) / length
    return total


TARGETS = [Target("a", [10, 20, 30], [40, 50, 60, 70]), Target("b", [11], [21]), Target("c", [9, 8, 7, 6, 5], [44, 55])]


def test_exact_bound_is_the_definition(model):
    lm = DiffusionBackend(model, tiny.tokenizer(), mc="exact", batch_size=5)
    lm.check_greedy = False
    for target, score in zip(TARGETS, lm._score(TARGETS), strict=True):
        assert score.loglikelihood == pytest.approx(enumerated(model, target.context, target.tokens), rel=1e-5)
        assert score.error == 0.0


@pytest.mark.parametrize("samples", [1, 3, 8])
def test_monte_carlo_is_unbiased(model, samples):
    target = TARGETS[0]
    expected = enumerated(model, target.context, target.tokens)
    estimates = []
    for seed in range(400 // samples):
        lm = DiffusionBackend(model, tiny.tokenizer(), mc=samples, batch_size=64, seed=seed)
        lm.check_greedy = False
        estimates.append(lm._score([target])[0].loglikelihood)
    error = np.std(estimates, ddof=1) / math.sqrt(len(estimates))
    assert abs(np.mean(estimates) - expected) < 4 * error


@pytest.mark.parametrize("length", [2, 3, 4, 8, 12, 20])
@pytest.mark.parametrize("samples", [1, 4, 8])
def test_every_mask_count_is_equally_likely(length, samples):
    counts = np.zeros(length + 1)
    runs = 3000
    for seed in range(runs):
        plan = monte_carlo(length, samples, [seed])
        for number in plan.draws:
            counts[plan.masks[number].sum()] += 1
    expected = runs * samples / length
    assert counts[0] == 0
    assert np.abs(counts[1:] - expected).max() < 5 * math.sqrt(expected)


def test_weights_of_every_plan_estimate_the_length():
    """With a loss of 1 for each masked token the bound is the number of tokens, whatever was drawn."""
    for plan in [exact(5), *(monte_carlo(9, 4, [seed]) for seed in range(20))]:
        assert plan.bound(plan.masks.sum(axis=1))[0] == pytest.approx(plan.masks.shape[1])


def test_equal_masks_are_run_once():
    plan = monte_carlo(1, 16, [0])
    assert len(plan.masks) == 1
    assert plan.bound([-2.5]) == (-2.5, 0.0)
    assert len(monte_carlo(2, 64, [0]).masks) <= 3


def test_masks_depend_on_tokens_and_seed_alone():
    first = monte_carlo(8, 4, target_seed(0, [1, 2], [3, 4]))
    again = monte_carlo(8, 4, target_seed(0, [1, 2], [3, 4]))
    assert (first.masks == again.masks).all()
    assert target_seed(0, [1, 2], [3, 4]) != target_seed(0, [1], [2, 3, 4])
    assert target_seed(0, [1, 2], [3, 4]) != target_seed(1, [1, 2], [3, 4])


def test_rules_see_the_same_masks(model):
    """Common random numbers: at the dense setting of a rule the estimate is the dense one, bit for bit."""
    lm = DiffusionBackend(model, tiny.tokenizer(), mc=4)
    lm.check_greedy = False
    dense = [score.loglikelihood for score in lm._score(TARGETS)]
    with sparsify(model, TopP(1.0), "all", clock=lm.clock):
        assert [score.loglikelihood for score in lm._score(TARGETS)] == dense
    with sparsify(model, TopP(0.5), "all", clock=lm.clock):
        assert [score.loglikelihood for score in lm._score(TARGETS)] != dense


def test_logits_shift_reads_the_position_before(model):
    lm = DiffusionBackend(model, tiny.tokenizer(), mc="exact", logits_shift=True)
    lm.check_greedy = False
    target = Target("a", [10, 20], [30])
    with torch.no_grad():
        log = model(torch.tensor([[10, 20, tiny.MASK]])).logits[0].log_softmax(-1)
    assert lm._score([target])[0].loglikelihood == pytest.approx(float(log[1, 30]), rel=1e-5)


def test_guidance_masks_the_context(model):
    lm = DiffusionBackend(model, tiny.tokenizer(), mc="exact", cfg_scale=1.0)
    lm.check_greedy = False
    with torch.no_grad():
        cond = model(torch.tensor([[10, 20, tiny.MASK]])).logits[0, 2]
        free = model(torch.tensor([[tiny.MASK] * 3])).logits[0, 2]
    expected = (free + 2 * (cond - free)).log_softmax(-1)[30]
    score = lm._score([Target("a", [10, 20], [30])])[0]
    assert score.loglikelihood == pytest.approx(float(expected), rel=1e-5)
    assert score.nfe == 2


def test_is_greedy_means_that_denoising_commits_the_target(model):
    lm = DiffusionBackend(tiny.llama(causal=False, forbid_mask=True), tiny.tokenizer(), mc=1)
    from dllm_sparsity.diffusion.denoise import DenoiseSettings, denoise

    prompts = [[10, 20, 30], [7, 8]]
    with lm.clock.batch(prompts, 4):
        steps = denoise(lm.call, lm.clock, prompts, DenoiseSettings(4), mask_id=tiny.MASK, pad_id=tiny.PAD)
        answers = list(steps)[-1].canvas.tolist()
    targets = [Target(n, prompt, answer) for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))]
    wrong = Target(9, prompts[0], [*answers[0][:3], (answers[0][3] + 1) % 100])
    assert [score.is_greedy for score in lm._score([*targets, wrong])] == [True, True, False]


def test_bad_settings_are_refused(model):
    with pytest.raises(UserError, match="Monte-Carlo"):
        DiffusionBackend(model, tiny.tokenizer(), mc=0)
    lm = DiffusionBackend(model, tiny.tokenizer(), mc="exact")
    with pytest.raises(UserError, match="too long"):
        lm._score([Target("a", [1], list(range(5, 6 + MAX_EXACT)))])
    with pytest.raises(UserError, match="mask token"):
        DiffusionBackend(model, tiny.tokenizer(), mask_token="<nope>")
