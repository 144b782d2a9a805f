"""Pipelines of diffusers run unchanged under the clock, and every forward pass is where the clock says."""

import sys
import warnings

import pytest
import tiny
import tiny_pipelines as made
import torch
from diffusers import BlockRefinementScheduler, DiscreteDDIMScheduler, EntropyBoundScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from dllm_sparsity import TopP, UserError, sparsify
from dllm_sparsity.diffusion.attention_mask import AttentionMaskWarning, attention_regime, block_causal_mask
from dllm_sparsity.diffusion.pipeline_loops import CanvasLoop
from dllm_sparsity.diffusion.pipelines import PipelineClock, PipelineOutputWarning, pipeline_clock
from dllm_sparsity.sparsity.clock import TokenState

LETTERS = "?pmnceP"  # unknown, prompt, masked, committed now, committed, behind the end, pad
STEPS = {"gen_length": 16, "num_inference_steps": 4, "confidence_threshold": None, "eos_token_id": -1}


class Frames:
    """Write down every frame of a clock, and count the forward passes of a module beside it."""

    def __init__(self, clock, *modules):
        self.seen, self.forwards = [], 0
        clock.listeners.append(self)
        for module in modules:
            module.register_forward_pre_hook(self._forward)

    def _forward(self, *_):
        self.forwards += 1

    def begin(self, clock):
        self.seen.append("begin")

    def end(self, clock):
        self.seen.append("end")

    def tick(self, clock):
        slot, states = clock.frame.slot, clock.frame.states.view(len(clock.items), -1).tolist()
        rows = ["".join(LETTERS[state] for state in row) for row in states]
        self.seen.append((str(slot.phase), slot.block, slot.step, str(clock.frame.compare), *rows))

    @property
    def ticks(self):
        return [frame for frame in self.seen if isinstance(frame, tuple)]


@pytest.fixture
def llama():
    return tiny.llama(causal=False, forbid_mask=True)


@pytest.fixture(scope="module")
def gemma():
    return made.diffusion_gemma()


def call(pipe, **options):
    return pipe(
        **{"prompt": "hello wor", "use_chat_template": False, "gen_length": 12, "num_inference_steps": 8} | options
    )


@pytest.mark.parametrize("options", [{}, {"threshold": 0.3}, {"threshold": 0.2, "editing_threshold": 0.2}])
def test_llada2_states_are_those_of_the_ids_that_its_callback_shows(llama, options):
    pipe = made.llada2_pipeline(llama)
    after = []

    def note(pipe, step, timestep, tensors):
        after.append(tensors["block_x"][0].clone())
        return tensors

    plain = call(pipe, eos_token_id=-1, **options).sequences
    with pipeline_clock(pipe, eos_token_id=-1) as clock:
        frames = Frames(clock, llama)
        assert torch.equal(
            call(pipe, eos_token_id=-1, callback_on_step_end=clock.callback(note), **options).sequences, plain
        )
    assert frames.forwards == len(frames.ticks) == len(after) == len(clock.steps) == clock.nfe.item()
    assert frames.seen[0] == "begin"
    assert frames.seen[-1] == "end"
    before, committed = None, set()
    for number, (frame, ids, step) in enumerate(zip(frames.ticks, after, clock.steps, strict=True)):
        phase, block, place, compare, states = frame
        assert (phase, place, step.step, step.forwards) == ("denoise", number, number, number + 1)
        assert block == step.block == len(ids) // 8 - 2  # the prompt of 9 ends in the second block of 8
        grown = before is None or len(before) != len(ids)
        assert compare == ("start" if grown else "previous")
        seen = ids if before is None else torch.cat([before, torch.full((len(ids) - len(before),), tiny.MASK)])
        if before is None:
            seen = torch.cat([ids[:9], torch.full((len(ids) - 9,), tiny.MASK)])
        for column, state in enumerate(states):
            expected = "p" if column < 9 else "P" if column >= 21 else "m" if seen[column] == tiny.MASK else "c"
            assert state in (expected, "n" if expected == "c" else expected)
            assert (state == "n") == (expected == "c" and column in committed)
        committed = {n for n in range(len(ids)) if ids[n] != seen[n]}
        masked = seen == tiny.MASK
        assert step.committed.item() == int((masked & (ids != seen)).sum())
        assert step.edited.item() == int((~masked & (ids != seen)).sum())
        before = ids
    if "editing_threshold" in options:
        assert sum(step.edited.item() for step in clock.steps) > 0


def test_llada2_padding_finished_rows_and_a_second_call(llama):
    with torch.no_grad():
        llama.lm_head.weight[tiny.EOS] = 3 * llama.lm_head.weight[60]  # ends early in some rows
    pipe = made.llada2_pipeline(llama)
    with pipeline_clock(pipe) as clock, sparsify(llama, TopP(0.8), "all", clock=clock) as tracker:
        frames = Frames(clock)
        call(pipe, prompt=["hello", "a b c d e"])
        nfe = clock.nfe.clone()
        call(pipe, prompt="hello")
    first = frames.ticks[0]
    assert [row[:9] for row in first[4:]] == ["PPPPppppp", "ppppppppp"]
    assert frames.seen.count("begin") == frames.seen.count("end") == 2
    assert frames.ticks[-1][4:] != first[4:]
    waits = [sum(set(frame[4 + row]) != {"P"} for frame in frames.ticks if len(frame) == 6) for row in range(2)]
    assert waits == nfe.tolist()
    assert set(tracker.read().per_item) == {(1, 0), (1, 1), (2, 0)}


def test_attached_alone_the_model_comes_back_as_it_was(llama):
    pipe = made.llada2_pipeline(llama)
    with pipeline_clock(pipe):
        call(pipe)
    assert not llama._forward_pre_hooks
    assert "check_inputs" not in vars(pipe)
    assert "step" not in vars(pipe.scheduler)


class Wants(PipelineCallback):
    tensor_inputs = ("sampled_probs",)

    def __init__(self):
        super().__init__()
        self.seen = []

    def callback_fn(self, pipe, step, timestep, tensors):
        self.seen.append(sorted(tensors))
        return tensors


def test_callbacks_compose(llama):
    pipe, mine = made.llada2_pipeline(llama), Wants()
    with pipeline_clock(pipe) as clock:
        call(pipe, callback_on_step_end=clock.callback(mine))
        assert len(mine.seen) == len(clock.steps)
        assert mine.seen[0] == ["block_x", "sampled_probs"]
        before = len(clock.steps)
        call(pipe, callback_on_step_end=clock.callback(lambda *_: None))  # alone it would crash the pipeline
        assert len(clock.steps) > before
        seen = []
        tell = clock.callback(lambda _, step, turn, tensors: seen.append(sorted(tensors)), ["transfer_index"])
        call(pipe, callback_on_step_end=MultiPipelineCallbacks([tell, mine]))
        assert seen[0] == ["block_x", "sampled_probs", "transfer_index"]
    with pytest.raises(UserError, match="outside its pipeline_clock"):
        call(pipe, callback_on_step_end=tell)


def test_what_cannot_be_right_is_refused(llama, gemma, monkeypatch):
    pipe = made.llada2_pipeline(llama)
    with pytest.raises(UserError, match="mask token 50"), pipeline_clock(pipe):
        call(pipe, mask_token_id=50)
    with pytest.raises(UserError, match="not the pipeline's"), pipeline_clock(pipe):
        llama(torch.tensor([[5, 6]]))
    with pipeline_clock(pipe) as clock:
        for ids, words in (([[5, 6]], "not the pipeline's"), ([[5] * 16], "the clock at 2")):
            tell = clock.callback(lambda *_, ids=ids: llama(torch.tensor(ids)) and None)
            with pytest.raises(UserError, match=words):
                call(pipe, callback_on_step_end=tell)

        def apart(*_):
            with clock.paused():
                llama(torch.tensor([[5, 6]]))

        call(pipe, callback_on_step_end=clock.callback(apart))
    with pytest.raises(UserError, match="no pipeline"), pipeline_clock(object()):
        pass
    pipe.mask_token_id = None
    with pytest.raises(UserError, match="names no mask token"), pipeline_clock(pipe):
        pass
    with pipeline_clock(pipe, mask_token_id=tiny.MASK):
        call(pipe, mask_token_id=tiny.MASK)
    pipe = made.gemma_pipeline(gemma, DiscreteDDIMScheduler(corrector_steps=1))
    monkeypatch.setattr(CanvasLoop, "called", forget_correctors(CanvasLoop.called))
    with pytest.raises(UserError, match="corrector sweeps"), pipeline_clock(pipe):
        pipe("hi", **STEPS)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"diffusers") as caught, pipeline_clock(pipe):
        pass
    assert caught.value.hint == "pip install '.[diffusers]'"


def forget_correctors(called):
    """Stand for a pipeline of another version, whose sweeps come where nobody expects them."""

    def lose(loop, arguments, result):
        called(loop, arguments, result)
        loop._corrected_steps = 0

    return lose


@pytest.mark.parametrize(
    ("scheduler", "callbacks", "sweeps"),
    [
        (BlockRefinementScheduler(), 8, 0),
        (EntropyBoundScheduler(), 8, 0),
        (DiscreteDDIMScheduler(), 8, 0),
        (DiscreteDDIMScheduler(corrector_steps=1), 6, 1),
        (DiscreteDDIMScheduler(corrector_steps=2), 4, 2),
    ],
)
@pytest.mark.filterwarnings("ignore::dllm_sparsity.diffusion.pipelines.PipelineOutputWarning")
def test_diffusion_gemma_phases_are_counted_one_by_one(gemma, scheduler, callbacks, sweeps):
    pipe = made.gemma_pipeline(gemma, scheduler)
    plain = pipe("hi", generator=torch.Generator().manual_seed(0), output_type="seq", **STEPS).sequences
    with pipeline_clock(pipe, eos_token_id=-1) as clock:
        frames = Frames(clock, gemma.model.encoder, gemma)
        tell = clock.callback()
        again = pipe(
            "hi", generator=torch.Generator().manual_seed(0), output_type="seq", callback_on_step_end=tell, **STEPS
        )
    assert torch.equal(again.sequences, plain)
    phases = [frame[0] for frame in frames.ticks]
    assert frames.forwards == len(phases) == clock.nfe.item() == 10
    assert (phases.count("encode"), phases.count("denoise"), phases.count("correct")) == (2, callbacks, 8 - callbacks)
    assert len(clock.steps) == callbacks
    assert [frame[2] for frame in frames.ticks if frame[0] == "denoise"] == list(range(callbacks))
    assert [step.step for step in clock.steps] == list(range(callbacks))
    canvas = ["encode", "denoise", *["correct"] * sweeps]
    assert phases[: len(canvas)] == canvas
    assert [frame[1] for frame in frames.ticks] == [0] * 5 + [1] * 5
    widths = {frame[0]: len(frame[4]) for frame in frames.ticks if frame[1] == 1}
    assert set(widths.values()) == {made.CANVAS}
    assert set(frames.ticks[0][4]) == {"p"}
    assert set(frames.ticks[1][4]) == {"m"}
    assert clock.notes == ([] if not isinstance(scheduler, EntropyBoundScheduler) else clock.notes[:1])


def test_diffusion_gemma_committed_tokens_are_those_that_stay(gemma):
    pipe = made.gemma_pipeline(gemma, BlockRefinementScheduler())
    seen = []

    def note(pipe, step, turn, tensors):
        seen.append(tensors["canvas"][0].clone())

    with pipeline_clock(pipe, eos_token_id=-1) as clock:
        frames = Frames(clock)
        pipe("hi", callback_on_step_end=clock.callback(note), generator=torch.Generator().manual_seed(1), **STEPS)
    decoded = [frame[4] for frame in frames.ticks if frame[0] == "denoise"]
    for number in range(1, 4):
        kept = [n for n, state in enumerate(decoded[number]) if state in "nc"]
        assert len(kept) == 2 * number  # 8 tokens in 4 steps
        assert torch.equal(seen[number - 1][kept], seen[-5][kept])  # the first canvas as it ended
        assert decoded[number].count("n") == 2
    assert [step.committed.item() for step in clock.steps] == [2] * 8


@pytest.mark.parametrize("cache", [None, "static"])
def test_diffusion_gemma_rows_whose_text_is_finished_only_wait(gemma, cache):
    pipe = made.gemma_pipeline(gemma, BlockRefinementScheduler())
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        first = pipe(["hi", "yo"], generator=generator, output_type="seq", **STEPS).sequences
    with pipeline_clock(pipe, eos_token_id=int(first[0, 3])) as clock:
        frames = Frames(clock)
        options = STEPS | {"eos_early_stop": False, "cache_implementation": cache}
        pipe(["hi", "yo"], generator=torch.Generator().manual_seed(3), **options)
    ended = [frame for frame in frames.ticks if frame[1] == 1]
    waits = [all(set(frame[4 + row]) == {"P"} for frame in ended) for row in range(2)]
    assert clock.nfe.tolist() == [5 if wait else 10 for wait in waits]
    assert all(("P" in frame[4 + row]) == waits[row] for frame in ended for row in range(2))


def test_nothing_of_a_call_that_broke_off_is_counted(llama):
    pipe = made.llada2_pipeline(llama)

    def stop(*_):
        raise KeyboardInterrupt

    with sparsify(llama, None, clock=(clock := PipelineClock())) as tracker:
        with pytest.raises(KeyboardInterrupt), pipeline_clock(pipe, clock=clock):
            call(pipe, callback_on_step_end=stop)
        assert sum(tracker.read()["rows"]) == 0
        with pipeline_clock(pipe, clock=clock):
            call(pipe)
        assert sum(tracker.read()["rows"]) > 0


def test_sparsity_of_a_diffusion_gemma_pipeline_by_phase(gemma):
    pipe = made.gemma_pipeline(gemma, DiscreteDDIMScheduler(corrector_steps=1))
    with (
        pipeline_clock(pipe, eos_token_id=-1) as clock,
        sparsify(gemma, TopP(0.8), "intermediate", clock=clock) as tracker,
    ):
        pipe("hi", **STEPS)
    reading = tracker.read()
    assert set(reading["phase"]) == {"encode", "denoise", "correct"}


def test_the_entropy_bound_scheduler_s_output_is_warned_of(gemma):
    pipe = made.gemma_pipeline(gemma, EntropyBoundScheduler())
    with pytest.warns(PipelineOutputWarning, match="random"), pipeline_clock(pipe) as clock:
        pass
    assert "random" in clock.notes[0]


# ------------------------------------------------------------------ attention masks


def test_regimes_are_found(llama):
    model = made.llada2_form()
    assert attention_regime(model, 8) == attention_regime(model, 2) == "full"
    assert attention_regime(model, 8, tail=True) == "causal"
    assert attention_regime(llama, 8) == attention_regime(llama, 8, tail=True) == "full"
    assert attention_regime(tiny.llama(), 8) == "causal"
    with block_causal_mask(model, 8):
        assert attention_regime(model, 8) == attention_regime(model, 8, tail=True) == "block_causal"
    assert attention_regime(model, 8) == "full"


def test_a_model_trained_block_by_block_is_warned_of_until_its_mask_is_mended(llama):
    pipe = made.llada2_pipeline(made.llada2_form())
    with pytest.warns(AttentionMaskWarning, match=r"sees all tokens, and it sees only earlier tokens.*, 8\)"):
        with pipeline_clock(pipe) as clock:
            pass
    assert "block_causal_mask(pipe.model, 8)" in clock.notes[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with block_causal_mask(pipe.model, 8), pipeline_clock(pipe) as clock:
            assert clock.notes == []
        with pipeline_clock(made.llada2_pipeline(llama)):
            pass


@pytest.mark.parametrize("prompt", [8, 11, 3])
@pytest.mark.parametrize("length", [16, 13, 9])
def test_a_mended_mask_gives_the_model_s_own_answer(prompt, length):
    """Aligned and unaligned lengths; the pipeline alone sees later tokens, or none of its own block."""
    model = made.llada2_form()
    pipe = made.llada2_pipeline(model)
    ids = torch.randint(5, 100, (1, prompt), generator=torch.Generator().manual_seed(prompt))
    options = {
        "gen_length": length,
        "threshold": 0.4,
        "editing_threshold": 0.0,
        "eos_early_stop": False,
        "output_type": "seq",
    }
    own = model.denoise_blocks(ids[0].tolist(), length, 8, tiny.MASK, 0.4)
    with block_causal_mask(model, 8):
        mended = pipe(input_ids=ids, num_inference_steps=8, **options).sequences
    assert torch.equal(mended, own)
    plain = pipe(input_ids=ids, num_inference_steps=8, **options).sequences
    assert not torch.equal(plain, own)


def test_a_mended_mask_hides_padding_and_keeps_the_diagonal():
    model = made.llada2_form()
    ids = torch.randint(5, 100, (1, 12), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.zeros(1, 8, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 8), torch.ones(1, 12)], dim=1).long()
    with torch.no_grad(), block_causal_mask(model, 4):
        alone = model(ids, attention_mask=torch.ones_like(ids)).logits
        beside = model(padded, attention_mask=mask, position_ids=torch.arange(-8, 12).clamp(min=0).unsqueeze(0)).logits
        assert torch.isfinite(beside).all()
        assert torch.allclose(beside[:, 8:], alone, atol=1e-4)
        with pytest.raises(UserError, match="continues a cache"):
            model(ids[:, :1], attention_mask=torch.ones_like(ids))
    with pytest.raises(UserError, match="not positive"), block_causal_mask(model, 0):
        pass
    assert TokenState.PAD == len(LETTERS) - 1
