"""The block_refinement sampler in our loop commits and edits what the scheduler and the pipeline of diffusers do."""

import pytest
import tiny
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline

from dllm_sparsity.diffusion.denoise import DenoiseSettings, denoise
from dllm_sparsity.diffusion.sampler import Draw
from dllm_sparsity.diffusion.samplers.block_refinement import BlockRefinement
from dllm_sparsity.errors import UserError
from dllm_sparsity.lm.call import ModelCall
from dllm_sparsity.sparsity.clock import Clock

MASK, PAD, EOS, VOCAB = tiny.MASK, tiny.PAD, tiny.EOS, 100
BLOCK = 12


@pytest.fixture(scope="module")
def model():
    return tiny.llama(causal=False)


class Replay:
    """A model that answers its n-th call with the n-th logits, whatever it is asked."""

    def __init__(self, logits):
        self.logits, self.calls, self.device = logits, 0, torch.device("cpu")

    def __call__(self, rows, positions):
        self.calls += 1
        return self.logits[self.calls - 1][:, positions]


def run(call, prompts, settings, eos=None):
    clock = Clock()
    with clock.batch(list(range(len(prompts))), settings.max_forwards):
        return list(denoise(call, clock, prompts, settings, mask_id=MASK, pad_id=PAD, eos_id=eos))


SETTINGS = [
    (steps, threshold, editing)
    for steps in (1, 5, 12, 20)
    for threshold in (0.3, 0.7, 2.0)
    for editing in (None, 0.3, 0.8)
]


@pytest.mark.parametrize(("steps", "threshold", "editing"), SETTINGS)
@pytest.mark.parametrize("mask_may_be_sampled", [False, True])
def test_step_by_step_on_random_logits(steps, threshold, editing, mask_may_be_sampled):
    sampler = BlockRefinement(confidence_threshold=threshold, editing_threshold=editing, max_post_steps=3)
    edits = commits = 0
    for seed in range(25):
        generator = torch.Generator().manual_seed(seed)
        logits = 3 * torch.randn(60, 1, 1 + BLOCK, VOCAB, generator=generator)
        if not mask_may_be_sampled:
            logits[..., MASK] = -100
        call = Replay(logits)
        ours = run(call, [[9]], DenoiseSettings(BLOCK, steps=steps, sampler=sampler))
        scheduler = BlockRefinementScheduler(BLOCK, steps, threshold, editing)
        scheduler.set_timesteps(steps, block_length=BLOCK)
        block, turn = torch.full((1, BLOCK), MASK), 0
        for number, step in enumerate(ours):
            had_masks = bool((block == MASK).any())
            theirs = scheduler.step(logits[number, :, 1:], turn, block, mask_token_id=MASK)
            assert torch.equal(step.committed, theirs.transfer_index)
            assert torch.equal(step.edited, theirs.editing_transfer_index)
            assert torch.equal(step.canvas, theirs.prev_sample)
            block, turn = theirs.prev_sample, turn + had_masks
            edits, commits = edits + int(step.edited.sum()), commits + int(step.committed.sum())
    assert commits >= 25 * BLOCK
    assert (edits > 0) == (editing is not None and steps > 1)


def pipeline(model, block, **scheduler):
    pipe = LLaDA2Pipeline(
        model=model, scheduler=BlockRefinementScheduler(block, **scheduler), tokenizer=tiny.tokenizer()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(model, prompt, block, steps, **options):
    """Return the canvas after each step of the pipeline, and its answer."""
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append(tensors["block_x"][:, len(prompt) :].clone())
        return tensors

    answer = pipeline(model, block)(
        input_ids=torch.tensor([prompt]),
        gen_length=block,
        num_inference_steps=steps,
        output_type="seq",
        callback_on_step_end=note,
        **options,
    ).sequences
    return seen, answer


@pytest.mark.parametrize("editing", [None, 0.2, 0.6])
@pytest.mark.parametrize("threshold", [0.2, 0.7, 2.0])
@pytest.mark.parametrize("steps", [3, 8])
def test_the_pipeline_ends_with_the_same_canvas_after_the_same_steps(model, steps, threshold, editing):
    """With a prompt of one block and one block to fill, the pipeline's window is our whole canvas."""
    sampler = BlockRefinement(confidence_threshold=threshold, editing_threshold=editing, max_post_steps=4)
    settings = DenoiseSettings(8, steps=steps, sampler=sampler)
    for seed in range(8):
        prompt = torch.randint(5, VOCAB, (8,), generator=torch.Generator().manual_seed(seed)).tolist()
        ours = run(ModelCall(model), [prompt], settings)
        seen, answer = theirs(
            model,
            prompt,
            8,
            steps,
            threshold=threshold,
            editing_threshold=editing,
            max_post_steps=4,
            eos_early_stop=False,
        )
        assert torch.equal(ours[-1].canvas, answer)
        extra = len(seen) - len(ours)  # without editing the pipeline may make one step that changes nothing
        assert extra == 0 or (editing is None and extra == 1)
        for step, canvas in zip(ours, seen, strict=False):
            assert torch.equal(step.canvas, canvas)


@pytest.mark.parametrize("editing", [None, 0.3])
def test_a_row_ends_as_if_it_were_alone(model, editing):
    sampler = BlockRefinement(confidence_threshold=0.2, editing_threshold=editing, max_post_steps=5)
    settings = DenoiseSettings(12, block_length=6, sampler=sampler, temperature=0.0)
    prompts = [
        torch.randint(5, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 8, 5, 11)
    ]
    together = run(ModelCall(model), prompts, settings, EOS)
    alone = [run(ModelCall(model), [prompt], settings, EOS) for prompt in prompts]
    for row, steps in enumerate(alone):
        assert torch.equal(together[-1].canvas[row], steps[-1].canvas[0])
        mine = [step for step in together if step.active[row]]
        assert [(step.block, step.step) for step in mine] == [
            (step.block, step.step) for step in steps if step.active[0]
        ]
    assert len({len(steps) for steps in alone}) > 1, "rows must need different numbers of steps"


def test_a_finished_text_is_not_edited():
    logits = torch.full((40, 1, 5, VOCAB), 0.0)
    logits[:, :, :, 50] = 9.0
    logits[0, :, 2, EOS] = 20.0  # the second new token is the end
    logits[1:, :, :, 60] = 20.0  # later every token would be edited to 60
    sampler = BlockRefinement(confidence_threshold=0.5, editing_threshold=0.5)
    stopped = run(Replay(logits), [[9]], DenoiseSettings(4, sampler=sampler), EOS)
    edited = run(Replay(logits), [[9]], DenoiseSettings(4, sampler=sampler))
    assert stopped[-1].canvas.tolist() == [[50, EOS, 50, 50]]
    assert edited[-1].canvas.tolist() == [[60] * 4]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, None, None), (1.3, 5, None), (1.0, None, 0.6), (2.0, 9, 0.5)]
)
def test_sampling_draws_from_the_scheduler_s_distribution(temperature, top_k, top_p):
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(1, 6, 20, generator=generator)
    sampler = BlockRefinement(top_k=top_k, top_p=top_p)
    seen = torch.zeros(6, 20)
    for seed in range(400):
        draw = Draw(temperature, [torch.Generator().manual_seed(seed)])
        mine = sampler.propose(logits, draw)
        seen[torch.arange(6), mine[0]] += 1
        token, probability = BlockRefinementScheduler._sample_from_logits(
            logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator, use_multinomial=True
        )
        assert torch.equal(sampler.confidence(logits, token, draw), probability)
    every = torch.arange(20).expand(6, 20).T.unsqueeze(1)
    expected = torch.cat([sampler.confidence(logits, tokens, draw) for tokens in every]).T
    assert torch.allclose(expected.sum(-1), torch.ones(6), atol=1e-5)
    assert (seen[expected == 0] == 0).all()
    assert (seen / 400 - expected).abs().max() < 0.1


def test_minimal_topk_bounds_the_steps_as_in_the_pipeline(model):
    prompt = list(range(20, 28))
    sampler = BlockRefinement(confidence_threshold=2.0, minimal_topk=3)
    ours = run(ModelCall(model), [prompt], DenoiseSettings(8, sampler=sampler))
    seen, answer = theirs(
        model, prompt, 8, 8, threshold=2.0, editing_threshold=None, minimal_topk=3, eos_early_stop=False
    )
    assert len(ours) == len(seen) == 8 // 3
    assert torch.equal(ours[-1].canvas, answer)


@pytest.mark.parametrize(
    "settings",
    [
        {"confidence_threshold": 0},
        {"editing_threshold": 1.5},
        {"editing_threshold": -0.1},
        {"minimal_topk": 0},
        {"max_post_steps": -1},
        {"top_k": 0},
        {"top_p": 0.0},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(UserError):
        BlockRefinement(**settings)
