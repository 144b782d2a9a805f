"""Samplers commit what the block-refinement scheduler of diffusers commits, where both are defined."""

import pytest
import torch
from diffusers import BlockRefinementScheduler

from dllm_sparsity.diffusion.sampler import Draw
from dllm_sparsity.diffusion.samplers.confidence_threshold import ConfidenceThreshold
from dllm_sparsity.diffusion.samplers.low_confidence import LowConfidence

BATCH, BLOCK, VOCAB, MASK = 3, 16, 50, 0


def run(sampler, steps, threshold, seed):
    """Denoise one block with both on the same random logits, and compare after each step."""
    generator = torch.Generator().manual_seed(seed)
    scheduler = BlockRefinementScheduler(block_length=BLOCK, editing_threshold=None)
    scheduler.set_timesteps(steps)
    schedule = scheduler.get_num_transfer_tokens(BLOCK, steps)
    ours = theirs = torch.full((BATCH, BLOCK), MASK)
    for step in range(steps):
        logits = 6 * torch.randn(BATCH, BLOCK, VOCAB, generator=generator)
        logits[..., MASK] = -100  # committing the mask token is not defined
        masked = ours == MASK
        count = torch.minimum(schedule[step].expand(BATCH), masked.sum(-1))
        tokens, commit = sampler.commit(logits, masked, count, Draw(0.0, [torch.Generator()] * BATCH))
        ours = torch.where(commit, tokens, ours)
        theirs = scheduler.step(
            logits, step, theirs, mask_token_id=MASK, threshold=threshold, editing_threshold=None
        ).prev_sample
        assert torch.equal(ours, theirs)
    assert (ours != MASK).all()


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("seed", range(3))
def test_confidence_threshold_with_a_quota_of_one_a_step(threshold, seed):
    run(ConfidenceThreshold(confidence_threshold=threshold), BLOCK, threshold, seed)


@pytest.mark.parametrize("steps", [16, 8, 5, 1])
@pytest.mark.parametrize("seed", range(3))
def test_low_confidence_is_the_schedule_with_a_threshold_that_nothing_reaches(steps, seed):
    run(LowConfidence(), steps, 1.0, seed)
