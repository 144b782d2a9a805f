"""The denoising loop commits what a plain implementation of the published LLaDA algorithm commits."""

import pytest
import tiny
import torch

from dllm_sparsity.diffusion.denoise import DenoiseSettings, denoise
from dllm_sparsity.diffusion.samplers.confidence_threshold import ConfidenceThreshold
from dllm_sparsity.diffusion.samplers.entropy import Entropy
from dllm_sparsity.diffusion.samplers.random import Random
from dllm_sparsity.errors import UserError
from dllm_sparsity.lm.call import ModelCall
from dllm_sparsity.sparsity.clock import Clock

MASK, PAD, EOS = tiny.MASK, tiny.PAD, tiny.EOS


@pytest.fixture(scope="module")
def model():
    return tiny.llama(causal=False, forbid_mask=True)


@torch.no_grad()
def published(model, prompt, length, block_length, steps, cfg_scale=0.0, shift=False):
    """Nie et al. 2025, Algorithm 5 with semi-autoregressive blocks, for one row, position by position."""
    canvas = list(prompt) + [MASK] * length
    blocks = length // block_length
    for block in range(blocks):
        span = range(len(prompt) + block * block_length, len(prompt) + (block + 1) * block_length)
        per_block = steps // blocks
        share, extra = divmod(sum(canvas[i] == MASK for i in span), per_block)
        for turn in range(per_block):
            logits = model(torch.tensor([canvas])).logits[0]
            if cfg_scale:
                blank = [MASK] * len(prompt) + canvas[len(prompt) :]
                free = model(torch.tensor([blank])).logits[0]
                logits = free + (cfg_scale + 1) * (logits - free)
            if shift:
                logits = torch.cat([logits[:1], logits[:-1]])
            candidates = []
            for i in span:
                if canvas[i] == MASK:
                    probability, token = logits[i].double().softmax(-1).max(-1)
                    candidates.append((-float(probability), i, int(token)))
            for _, i, token in sorted(candidates)[: share + (turn < extra)]:
                canvas[i] = token
    return canvas[len(prompt) :]


def ours(model, prompts, settings, clock=None):
    clock = clock or Clock()
    steps = []
    with clock.batch(list(range(len(prompts))), settings.max_forwards):
        steps = list(denoise(ModelCall(model), clock, prompts, settings, mask_id=MASK, pad_id=PAD, eos_id=EOS))
    return steps


PROMPTS = [[10, 20, 30, 40], [50, 60, 70, 80, 90, 11, 12], [33]]


@pytest.mark.parametrize(
    ("length", "block", "steps", "cfg", "shift"),
    [
        (12, 12, 12, 0.0, False),
        (12, 12, 5, 0.0, False),
        (12, 4, 6, 0.0, False),
        (8, 8, 8, 1.5, False),
        (12, 6, 6, 0.5, False),
        (12, 4, 12, 0.0, True),
        (6, 3, 12, 0.0, False),
    ],
)
def test_commits_what_the_published_algorithm_commits(model, length, block, steps, cfg, shift):
    settings = DenoiseSettings(length, block, steps, cfg_scale=cfg, logits_shift=shift)
    final = ours(model, PROMPTS, settings)[-1].canvas.tolist()
    assert final == [published(model, prompt, length, block, steps, cfg, shift) for prompt in PROMPTS]


def test_one_yield_a_forward_pass(model):
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = ours(model, PROMPTS, DenoiseSettings(8, 4, 4))
    assert len(plain) == len(calls) == 4
    calls.clear()
    guided = ours(model, PROMPTS, DenoiseSettings(8, 4, 4, cfg_scale=1.0))
    handle.remove()
    assert len(guided) == len(calls) == 8
    assert [step.branch for step in guided[:2]] == ["cond", "uncond"]
    assert not guided[0].committed.any()


@pytest.mark.parametrize("sampler", [Random(), Entropy(), ConfidenceThreshold(confidence_threshold=0.3)])
def test_every_sampler_fills_the_canvas_and_never_recommits(model, sampler):
    steps = ours(model, PROMPTS, DenoiseSettings(8, 4, sampler=sampler))
    assert (steps[-1].canvas != MASK).all()
    assert torch.stack([step.committed for step in steps]).sum(0).eq(1).all()


def test_threshold_of_one_commits_one_a_step_and_a_low_one_everything(model):
    assert len(ours(model, PROMPTS, DenoiseSettings(8, sampler=ConfidenceThreshold(confidence_threshold=1.0)))) == 8
    assert len(ours(model, PROMPTS, DenoiseSettings(8, sampler=ConfidenceThreshold(confidence_threshold=1e-6)))) == 1


def test_entropy_commits_the_narrowest_distribution_first(model):
    step = ours(model, PROMPTS[:1], DenoiseSettings(8, sampler=Entropy()))[0]
    logits = model(torch.tensor([PROMPTS[0] + [MASK] * 8])).logits[0, -8:].double()
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert int(step.committed[0].nonzero()) == int(entropy.argmin())


def test_temperature_depends_on_the_seed_and_not_on_the_batch(model):
    def run(prompts, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        clock, settings = Clock(), DenoiseSettings(8, temperature=1.0)
        with clock.batch(prompts, 8):
            steps = denoise(ModelCall(model), clock, prompts, settings, mask_id=MASK, pad_id=PAD, generators=generators)
            return list(steps)[-1].canvas.tolist()

    together = run(PROMPTS, [1, 2, 3])
    assert together == [run([prompt], [seed])[0] for prompt, seed in zip(PROMPTS, [1, 2, 3], strict=True)]
    assert together != run(PROMPTS, [4, 5, 6])


@pytest.mark.parametrize("arguments", [(10, 4), (8, 4, 3), (0,), (8, 0), (8, 8, 0)])
def test_lengths_that_do_not_divide_are_refused(arguments):
    with pytest.raises(UserError):
        DenoiseSettings(*arguments)
