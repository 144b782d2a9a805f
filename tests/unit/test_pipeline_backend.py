"""Pipelines of diffusers as lm-eval LMs: prompts, batches, stop strings, counts and refusals."""

import functools

import pytest
import tiny
import tiny_pipelines as made
import torch
from diffusers import BlockRefinementScheduler, DiscreteDDIMScheduler
from lm_eval.api.instance import Instance

from dllm_sparsity import TopP, UserError, sparsify
from dllm_sparsity.diffusion.attention_mask import AttentionMaskWarning
from dllm_sparsity.diffusion.backend import DiffusionBackend
from dllm_sparsity.diffusion.pipeline_backend import DiffusionGemmaBackend, LLaDA2Backend, pipeline_backend

PROMPTS = ["abcdefgh", "12345678", "hello", "some other", "HELLO WO"]
PLAIN = {"num_inference_steps": 8, "threshold": 0.3, "editing_threshold": None}


@pytest.fixture(scope="module")
def llama():
    return tiny.llama(causal=False, forbid_mask=True)


@pytest.fixture(scope="module")
def gemma():
    return made.diffusion_gemma()


def requests(prompts=PROMPTS, **options):
    given = {"until": [], "max_gen_toks": 16, "do_sample": False} | options
    return [
        Instance("generate_until", {}, (prompt, dict(given)), n, metadata=("task", n, 1))
        for n, prompt in enumerate(prompts)
    ]


def calls_of(pipe, monkeypatch):
    """Write down the ids of each call of a pipeline."""
    seen, check = [], type(pipe).check_inputs

    @functools.wraps(check)
    def watched(self, **given):
        seen.append(given)
        return check(self, **given)

    monkeypatch.setattr(type(pipe), "check_inputs", watched)
    return seen


def direct(pipe, prompt, **options):
    ids = torch.tensor([tiny.tokenizer().encode(prompt)])
    row = pipe(input_ids=ids, gen_length=16, output_type="seq", **options).sequences[0].tolist()
    row = row[: row.index(tiny.EOS)] if tiny.EOS in row else row
    return tiny.tokenizer().decode(row, skip_special_tokens=True)


@pytest.mark.parametrize("editing", [None, 0.3])
def test_llada2_answers_are_the_pipeline_s(llama, editing, monkeypatch):
    pipe = made.llada2_pipeline(llama, editing_threshold=0.9)  # None at the call alone would leave that on
    options = PLAIN | {"editing_threshold": editing}
    lm = LLaDA2Backend(pipe, options=options, batch_size=8)
    seen = calls_of(pipe, monkeypatch)
    with sparsify(llama, None, clock=lm.clock) as tracker:
        answers = lm.generate_until(requests())
    sizes = [len(given["input_ids"]) for given in seen]
    assert sorted(sizes) == ([1, 1, 3] if editing is None else [1] * 5)  # three prompts have 8 tokens
    expected = options | {"editing_threshold": editing or 0.0}
    assert answers == [direct(pipe, prompt, **expected) for prompt in PROMPTS]
    reading = tracker.read()
    for number in range(len(PROMPTS)):
        entry = lm.log["task", number]
        assert 1 <= entry.nfe <= 40
        assert entry.new_tokens >= len(entry.answer_tokens)
        assert ("task", number) in reading.per_item
    assert set(reading["phase"]) == {"denoise"}


def test_llada2_forward_passes_stop_strings_and_sampling(llama):
    lm = pipeline_backend(made.llada2_pipeline(llama), options=PLAIN | {"threshold": 2.0, "eos_token_id": -1})
    whole = lm.generate_until(requests(PROMPTS[:1]))[0]
    entry = lm.log.pop(("task", 0))
    assert (entry.nfe, entry.new_tokens) == (16, 16)  # two blocks of 8 steps, each commits one token
    stop = whole[5]
    assert lm.generate_until(requests(PROMPTS[:1], until=[stop])) == [whole[: whole.index(stop)]]
    assert lm.log["task", 0].new_tokens == whole.index(stop) + 1
    sampled = [lm.generate_until(requests(PROMPTS[:3], do_sample=True, temperature=1.5, top_k=20)) for _ in range(2)]
    assert sampled[0] == sampled[1]
    assert sampled[0] != lm.generate_until(requests(PROMPTS[:3]))
    alone = [lm.generate_until(requests(PROMPTS[:1], do_sample=True, temperature=1.5, top_k=20))]
    assert alone[0] == sampled[0][:1]  # whatever else is asked


def test_llada2_likelihood_is_the_bound_where_the_model_was_trained_on_whole_texts(llama):
    request = [Instance("loglikelihood", {}, ("abc", " def"), 0, metadata=("task", 0, 1))]
    lm = LLaDA2Backend(made.llada2_pipeline(llama), mc=4)
    assert lm.loglikelihood(request) == DiffusionBackend(llama, tiny.tokenizer(), mc=4).loglikelihood(request)
    with pytest.warns(AttentionMaskWarning):
        lm = LLaDA2Backend(made.llada2_pipeline(made.llada2_form()))
    assert "not as in training" in lm.notes[0]
    with pytest.raises(UserError, match="block by block"):
        lm.loglikelihood(request)


@pytest.mark.filterwarnings("error::dllm_sparsity.diffusion.attention_mask.AttentionMaskWarning")
def test_llada2_runs_a_model_trained_block_by_block_as_it_was_trained():
    model = made.llada2_form()
    lm = LLaDA2Backend(made.llada2_pipeline(model), options=PLAIN | {"eos_token_id": -1}, block_causal=True)
    answers = lm.generate_until(requests(PROMPTS[:3]))
    for prompt, answer in zip(PROMPTS, answers, strict=False):
        own = model.denoise_blocks(tiny.tokenizer().encode(prompt), 16, 8, tiny.MASK, 0.3)[0].tolist()
        assert answer == tiny.tokenizer().decode(own, skip_special_tokens=True)
    assert not model._forward_pre_hooks


def test_diffusion_gemma_answers_and_counts(gemma, monkeypatch):
    pipe = made.gemma_pipeline(gemma, DiscreteDDIMScheduler(corrector_steps=1))
    own = pipe.processor
    lm = pipeline_backend(pipe, options={"num_inference_steps": 4, "confidence_threshold": None, "eos_token_id": -1})
    assert isinstance(lm, DiffusionGemmaBackend)
    prompts = []
    watch = gemma.model.encoder.register_forward_pre_hook(
        lambda *given: prompts.append(given[2]["input_ids"]), with_kwargs=True
    )
    answers = lm.generate_until(requests(PROMPTS[:2], max_gen_toks=12))
    watch.remove()
    assert sorted(ids.tolist()[0] for ids in prompts[::2]) == sorted(own.encode(prompt) for prompt in PROMPTS[:2])
    assert answers == lm.generate_until(requests(PROMPTS[:2], max_gen_toks=12))
    assert pipe.processor is own
    entry = lm.log["task", 0]
    assert (entry.nfe, entry.new_tokens) == (
        2 * 10,
        2 * 12,
    )  # two runs: two canvases, 1 + 4 forward passes each; cut to 12
    with sparsify(gemma, TopP(0.8), "intermediate", clock=lm.clock) as tracker:
        lm.generate_until(requests(PROMPTS[:1]))
    assert set(tracker.read()["phase"]) == {"encode", "denoise", "correct"}


def test_refusals(llama, gemma):
    llada2, canvas = made.llada2_pipeline(llama), made.gemma_pipeline(gemma, BlockRefinementScheduler())
    with pytest.raises(UserError, match="did you mean threshold"):
        LLaDA2Backend(llada2, options={"treshold": 0.3})
    with pytest.raises(UserError, match="set from the task"):
        LLaDA2Backend(llada2, options={"gen_length": 3})
    with pytest.raises(UserError, match="pipeline_backend"):
        LLaDA2Backend(canvas)
    with pytest.raises(UserError, match="no DiffusionGemmaPipeline"):
        DiffusionGemmaBackend(llada2)
    lm = pipeline_backend(canvas, options={"num_inference_steps": 2})
    with pytest.raises(UserError, match="top_k"):
        lm.generate_until(requests(PROMPTS[:1], do_sample=True, top_k=3))
    with pytest.raises(UserError, match="no likelihood"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("abc", " def"), 0, metadata=("task", 0, 1))])
