"""On a GPU: rules keep what they keep on the CPU, and both backends count the same."""

import pytest
import tiny
import torch

from autoregressive.backend import AutoregressiveBackend
from dllm_sparsity import registry
from dllm_sparsity.diffusion.backend import DiffusionBackend
from dllm_sparsity.lm.base import PromptBatch, Target
from dllm_sparsity.sparsity import fusing
from dllm_sparsity.sparsity.clock import Clock, Compare, Phase, Slot, TokenState
from dllm_sparsity.sparsity.rule import Where
from dllm_sparsity.sparsity.rules.random import Random
from dllm_sparsity.sparsity.rules.top_p import TopP
from dllm_sparsity.sparsity.sites import GatedForm
from dllm_sparsity.sparsity.sparsifier import sparsify

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("name", registry.names("rules"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 63, 1000, 14336])
def test_rules_keep_the_same_on_both_devices(name, dtype, width):
    rows = torch.nn.functional.silu(torch.randn(33, width)) * torch.randn(33, width)
    rows[3], rows[4, ::2] = 0, 0
    rows = rows.to(dtype)
    rule = registry.get("rules", name)(0.7)
    where = [Where(0, "input", None, torch.zeros(33, dtype=torch.long, device=d), None) for d in ("cpu", "cuda")]
    here, there = rule.keep(rows, where[0]), rule.keep(rows.cuda(), where[1]).cpu()
    different = (here != there).any(-1)
    assert not different.any(), f"{int(different.sum())} rows differ"


@pytest.mark.parametrize("paradigm", ["autoregressive", "diffusion"])
def test_backends_count_the_same_on_both_devices(paradigm):
    readings, scores = [], []
    for device in ("cpu", "cuda"):
        model = tiny.llama(paradigm == "autoregressive", forbid_mask=True).to(device)
        cls = AutoregressiveBackend if paradigm == "autoregressive" else DiffusionBackend
        lm = cls(model, tiny.tokenizer(), batch_size=4)
        lm.check_greedy = False
        targets = [Target(n, list(range(5, 9 + 3 * n)), list(range(20, 26))) for n in range(5)]
        with sparsify(model, TopP(0.8), "all", clock=lm.clock) as tracker:
            scores.append([score.loglikelihood for score in lm._score_all(targets)])
            lm._generate(PromptBatch([[10, 20, 30], [40, 50]], ["a", "b"], ["a", "b"], 6, [], {}))
        readings.append(tracker.read())
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    cpu, cuda = readings
    for name in ("phase", "step", "token_state", "rows", "total"):
        assert cpu[name] == cuda[name]
    assert sum(cpu["kept"]) == pytest.approx(sum(cuda["kept"]), rel=1e-3)


def test_a_forward_pass_does_not_wait_for_the_device():
    model = tiny.llama(causal=False).cuda()
    clock, ids = Clock(), torch.randint(5, 99, (2, 9), device="cuda")
    states = torch.full((2, 9), TokenState.MASKED, device="cuda")
    with sparsify(model, TopP(0.8), "all", clock=clock) as tracker, torch.no_grad():
        for attempt in range(2):  # the first lets libraries set themselves up
            clock.begin(["a", "b"], 2)
            for step in range(2):
                clock.tick(Slot(Phase.DENOISE, step=step), states, Compare.PREVIOUS if step else Compare.START)
                torch.cuda.set_sync_debug_mode("error" if attempt else "default")
                try:
                    model(input_ids=ids, use_cache=False)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            clock.end()
    assert sum(tracker.read()["rows"]) == 2 * 2 * 18 * 2 * 2


def denoise_steps(model, rule, steps, forward=None, sync_mode="default"):
    """Run a request batch of denoising steps; `forward(ids, step)` may replace the model. Returns the reading."""
    clock, ids = Clock(), torch.randint(5, 99, (2, 9), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    states = torch.full((2, 9), int(TokenState.MASKED), device="cuda")
    states[0, :3] = TokenState.PAD
    with sparsify(model, rule, "all", clock=clock) as tracker, torch.no_grad():
        clock.begin(["a", "b"], steps)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(sync_mode)
        try:
            for step in range(steps):
                clock.tick(Slot(Phase.DENOISE, step=step), states, Compare.PREVIOUS if step else Compare.START)
                (forward or (lambda ids, _: model(input_ids=ids, use_cache=False)))(ids, step)
                ids = (ids + 1) % 99 + 1
        finally:
            torch.cuda.set_sync_debug_mode("default")
        clock.end()
    return dict(tracker.read()), tracker.kernels


@pytest.mark.parametrize("rule", [TopP(0.8), Random(0.8), None], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_request_batch_never_waits_for_the_device(rule, dtype):
    model = tiny.llama(causal=False).to("cuda", dtype).eval()
    plain, _ = denoise_steps(model, rule, 4)
    reading, _ = denoise_steps(model, rule, 4, sync_mode="error")
    assert reading == plain
    assert sum(reading["rows"]) == 4 * 18 * 2 * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_make_both_sites_of_a_llama(dtype):
    model = tiny.llama(causal=False).to("cuda", dtype).eval()
    _, kernels = denoise_steps(model, TopP(0.8), 1)
    assert kernels == {"made by the kernel": 4, "hooked": 0}


@pytest.mark.parametrize("rule", [TopP(0.8), None], ids=str)
def test_a_captured_forward_pass_counts_the_same(rule):
    model = tiny.llama(causal=False).to("cuda", torch.bfloat16).eval()
    plain, _ = denoise_steps(model, rule, 6)
    held, graph = torch.zeros(2, 9, dtype=torch.long, device="cuda"), torch.cuda.CUDAGraph()

    def forward(ids, step):
        held.copy_(ids)
        if step == 0:  # also warms up
            model(input_ids=held, attention_mask=full, use_cache=False)
        elif step == 1:
            with torch.cuda.graph(graph):
                model(input_ids=held, attention_mask=full, use_cache=False)
        if step:
            graph.replay()

    full = torch.zeros(2, 1, 9, 9, dtype=torch.bfloat16, device="cuda")
    captured, _ = denoise_steps(model, rule, 6, forward)
    assert captured == plain


def test_one_compiled_graph_counts_the_same():
    model = tiny.llama(causal=False).to("cuda", torch.float32).eval()
    plain, _ = denoise_steps(model, TopP(0.8), 4)
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    backend, made = CompileCounterWithBackend("inductor"), {}

    def forward(ids, step):
        compiled = made.setdefault("model", torch.compile(model, backend=backend, fullgraph=True))
        compiled(input_ids=ids, use_cache=False)

    reading, _ = denoise_steps(model, TopP(0.8), 4, forward)
    assert backend.frame_count == 1
    for name in ("rows", "total", "step"):
        assert reading[name] == plain[name]
    assert sum(reading["kept"]) == pytest.approx(sum(plain["kept"]), rel=1e-2)  # inductor rounds otherwise


class NoWaiting:
    """Listen to a clock and forbid every wait for the device from the start of a request batch to its read-out."""

    batches = 0

    def begin(self, clock):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    def tick(self, clock):
        assert torch.cuda.get_sync_debug_mode() == 2

    def end(self, clock):
        torch.cuda.set_sync_debug_mode("default")
        self.batches += 1


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize("paradigm", ["autoregressive", "diffusion"])
def test_whole_cells_never_wait_for_the_device(paradigm, cfg_scale):
    if paradigm == "autoregressive":
        lm = AutoregressiveBackend(tiny.llama(forbid_mask=True).cuda(), tiny.tokenizer(), batch_size=4)
    else:
        options = {"cfg_scale": cfg_scale, "steps": 3, "temperature": 0.5}
        model = tiny.llama(causal=False, forbid_mask=True).cuda()
        lm = DiffusionBackend(model, tiny.tokenizer(), batch_size=4, **options)
    lm.check_greedy = False
    # transformers itself looks at the position ids of a causal forward pass without a cache
    targets = [Target(n, list(range(5 + n, 12 + n)), list(range(20, 26))) for n in range(5) if lm.bidirectional]
    prompts = PromptBatch([[10, 20, 30], [40, 50, 60]], ["a", "b"], ["a", "b"], 6, ["~~"], {})

    def cell():
        with sparsify(lm.model, TopP(0.8), "all", clock=lm.clock) as tracker:
            scores = [score.loglikelihood for score in lm._score_all(targets)]
            return scores, lm._generate(prompts), dict(tracker.read())

    plain = cell()
    guard = NoWaiting()
    lm.clock.listeners.insert(0, guard)
    try:
        assert cell() == plain
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert guard.batches > 5 if lm.bidirectional else guard.batches == 1


def test_guidance_by_batch_doubling_never_waits_for_the_device():
    model = tiny.llama(causal=False).cuda()
    clock, ids = Clock(), torch.randint(5, 99, (4, 9), device="cuda")
    states = torch.full((4, 9), int(TokenState.MASKED), device="cuda")
    with sparsify(model, TopP(0.8), "all", clock=clock) as tracker, torch.no_grad():
        for attempt in range(2):
            clock.begin(["a", "b", "a", "b"], 4)
            torch.cuda.set_sync_debug_mode("error" if attempt else "default")
            try:
                for step in range(2):
                    slots = [Slot(Phase.DENOISE, branch, step=step) for branch in ("cond", "uncond") for _ in range(2)]
                    clock.tick(slots, states, Compare.PREVIOUS if step else Compare.START)
                    model(input_ids=ids, use_cache=False)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            clock.end()
    assert sum(tracker.read()["rows"]) == 2 * 2 * 36 * 2 * 2


@pytest.mark.parametrize("sampler", ["low_confidence", "confidence_threshold"])
def test_a_late_end_is_not_counted(sampler):
    """On a GPU the loop learns some steps late that all is done; the records are those of the CPU."""
    readings = []
    for device in ("cpu", "cuda"):
        model = tiny.llama(causal=False, forbid_mask=True).to(device)
        kind = registry.get("samplers", sampler)
        settings = {"confidence_threshold": 0.05} if sampler == "confidence_threshold" else {}
        lm = DiffusionBackend(model, tiny.tokenizer(), sampler=kind(**settings), block_length=8)
        with sparsify(model, TopP(0.8), "all", clock=lm.clock) as tracker:
            done = lm._generate(PromptBatch([[10, 20, 30], [40, 50]], ["a", "b"], ["a", "b"], 16, [], {}))
        reading = tracker.read()
        readings.append(([row.nfe for row in done], *(reading[name] for name in ("step", "token_state", "rows"))))
    assert readings[0] == readings[1]


class AlmostSiLU(torch.nn.SiLU):
    def forward(self, input):
        return torch.where(input == -3.140625, 0.5, super().forward(input))


def test_an_activation_that_is_off_at_one_value_is_not_taken_over():
    mlp = tiny.llama(causal=False).to("cuda", torch.bfloat16).eval().model.layers[0].mlp
    assert fusing.gate_producer(GatedForm(mlp, mlp.gate_proj, mlp.up_proj, mlp.act_fn, mlp.down_proj)) == "silu_mul"
    mlp.act_fn = AlmostSiLU()
    assert fusing.gate_producer(GatedForm(mlp, mlp.gate_proj, mlp.up_proj, mlp.act_fn, mlp.down_proj)) is None
