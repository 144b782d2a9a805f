"""Plans and fingerprints: every cell is planned once; a fingerprint changes with each field that can change an answer."""

import json
import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from material import OTHER_DIFFUSION

from dllm_sparsity.study.config import ModelConfig, RuleConfig, StudyConfig, TaskSpec
from dllm_sparsity.study.engines.planner import Job, together
from dllm_sparsity.study.plan import Cell, cell_parts, expand, fingerprint, probe_cell, stack_sizes, with_block

SITES = ("input", "gate", "up", "intermediate", "all")
WEIGHTS, TASK, VERSIONS = {"model.safetensors": "1"}, {"name": "t", "documents": "d"}, {"torch": "2"}

names = st.text("abcdefgh", min_size=1, max_size=4)
models = st.builds(ModelConfig, paradigm=st.sampled_from(["autoregressive", "diffusion"]), model=names)
tasks = st.builds(TaskSpec, name=names, limit=st.none() | st.integers(1, 9))
rules = st.builds(
    RuleConfig,
    name=st.sampled_from(["top_p", "top_k"]),
    strengths=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4).map(tuple),
    sites=st.lists(st.sampled_from(SITES), min_size=1, max_size=3, unique=True).map(tuple),
)
studies = st.builds(
    StudyConfig,
    models=st.lists(models, min_size=1, max_size=3, unique_by=lambda m: (m.paradigm, m.name)).map(tuple),
    tasks=st.lists(tasks, min_size=1, max_size=3, unique_by=lambda t: t.name).map(tuple),
    rules=st.lists(rules, min_size=1, max_size=2, unique_by=lambda r: r.name).map(tuple),
    replicates=st.integers(0, 2),
    seed=st.integers(0, 5),
)


def parts(cell, seed=0, weights=WEIGHTS, task=TASK, versions=VERSIONS):
    return cell_parts(cell, seed, weights, task, versions)


def mark(cell, **changed):
    return fingerprint(parts(cell, **changed))


@settings(deadline=None)
@given(studies)
def test_a_rule_that_is_given_twice_is_planned_once(study):
    twice = study.model_copy(update={"rules": (*study.rules, *study.rules)})
    assert list(map(mark, expand(twice))) == list(map(mark, expand(study)))


@settings(deadline=None)
@given(studies)
def test_every_cell_is_planned_once(study):
    cells = expand(study)
    each = sum(len(rule.sites) * len(set(rule.strengths)) for rule in study.rules)
    assert len(cells) == len(study.models) * len(study.tasks) * (1 + study.replicates + each)
    marks = {(cell.model, cell.task, mark(cell)) for cell in cells}
    assert len(marks) == len(cells)
    for cell in cells:
        assert (cell.rule is None) == (cell.strength is None) == (cell.site is None)
        assert cell.sites == tuple(site for site in SITES if site in cell.sites)
        assert not cell.replicate or cell.rule is None
    for model in study.models:
        for task in study.tasks:
            own = [cell for cell in cells if (cell.model, cell.task) == (model, task)]
            assert [cell.replicate for cell in own if cell.rule is None] == list(range(study.replicates + 1))
            assert set(own[0].sites) == {site for cell in own[1:] for site in cell.sites} | set(own[0].sites)


@settings(deadline=None)
@given(studies)
def test_a_plan_survives_its_own_file(study):
    again = StudyConfig.model_validate(yaml.safe_load(yaml.safe_dump(study.model_dump(mode="json"))))
    assert expand(again) == expand(study)
    assert [mark(cell) for cell in expand(again)] == [mark(cell) for cell in expand(study)]


def mixed(value, draw):
    """The same data with the keys of every mapping in another order."""
    if isinstance(value, dict):
        keys = list(value)
        draw.shuffle(keys)
        return {key: mixed(value[key], draw) for key in keys}
    return [mixed(each, draw) for each in value] if isinstance(value, list) else value


@settings(deadline=None)
@given(studies, st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_matter(study, draw):
    for cell in expand(study):
        assert fingerprint(mixed(parts(cell), draw)) == mark(cell)


DIFFUSION = ModelConfig(paradigm="diffusion", model="org/name")
CAUSAL = ModelConfig(paradigm="autoregressive", model="org/name")
RULE = RuleConfig(name="top_p", strengths=(0.9,), sites=("input",))
SPEC = TaskSpec(name="t")

OTHER = {
    "paradigm": "autoregressive",
    "revision": "main",
    "trust_remote_code": True,
    "dtype": "bfloat16",
    "device_map": "auto",
    "batch_size": 3,
    "max_length": 77,
    **OTHER_DIFFUSION,
    "sampler_options": {"alg_temp": 0.1},
    "pipeline": "llada2",
    "pipeline_options": {"num_inference_steps": 3},
    "label": "another name",
    "share_context": False,
    "stack": 4,
}
FOR_CAUSAL = {"share_context"}
FOR_BOTH = {
    "paradigm",
    "revision",
    "trust_remote_code",
    "dtype",
    "device_map",
    "batch_size",
    "max_length",
    "label",
    "stack",
}


def changed(base, name, value):
    fields = base.model_dump() | {name: value}
    return type(base).model_construct(**{key: fields[key] for key in type(base).model_fields})


def test_every_field_of_a_model_is_tried():
    assert set(OTHER) == set(ModelConfig.model_fields) - {"model"}  # its files stand for it, wherever they are


@pytest.mark.parametrize("name", list(OTHER))
def test_a_model_s_field_changes_the_fingerprint_where_it_can_change_an_answer(name):
    for base in (DIFFUSION, CAUSAL):
        other = changed(base, name, "diffusion" if (name, base) == ("paradigm", CAUSAL) else OTHER[name])
        before, after = (mark(Cell(model, SPEC, RULE, 0.9, "input", ("input",))) for model in (base, other))
        counts = name not in FOR_CAUSAL if base is DIFFUSION else name in FOR_BOTH | FOR_CAUSAL
        assert (before != after) == counts


@pytest.mark.parametrize(
    ("name", "value", "counts"),
    [
        ("limit", 3, True),
        ("num_fewshot", 2, True),
        ("chat_template", True, True),
        ("mc", 3, True),
        ("name", "other", False),  # the task's identity stands for it
        ("text", "file.txt", False),
        ("run_code", True, False),
    ],
)
def test_a_task_s_field_changes_the_fingerprint_where_it_can_change_an_answer(name, value, counts):
    other = changed(SPEC, name, value)
    before, after = (mark(Cell(DIFFUSION, spec, RULE, 0.9, "input", ("input",))) for spec in (SPEC, other))
    assert (before != after) == counts


def test_every_field_of_a_task_is_tried():
    assert set(TaskSpec.model_fields) == {"limit", "num_fewshot", "chat_template", "mc", "name", "text", "run_code"}


def test_all_else_changes_the_fingerprint():
    base = Cell(DIFFUSION, SPEC, RULE, 0.9, "input", ("input",))
    other_rule = [
        Cell(DIFFUSION, SPEC, RULE.model_copy(update=update), 0.9, "input", ("input",))
        for update in ({"name": "top_k"}, {"layers": (0, 1)}, {"parameters": {"ties": "minimal"}})
    ]
    cells = [
        base,
        Cell(DIFFUSION, SPEC, None, None, None, ("input",)),
        Cell(DIFFUSION, SPEC, None, None, None, ("input",), replicate=1),
        Cell(DIFFUSION, SPEC, None, None, None, ("input",), replicate=2),
        Cell(DIFFUSION, SPEC, RULE, 0.8, "input", ("input",)),
        Cell(DIFFUSION, SPEC, RULE, 0.9, "all", ("input", "intermediate")),
        Cell(DIFFUSION, SPEC, RULE, 0.9, "input", ("input", "up")),
        with_block(base, 0, 64),
        with_block(base, 64, 80),
        *other_rule,
    ]
    marks = [mark(cell) for cell in cells]
    marks += [mark(base, seed=1), mark(base, weights={"model.safetensors": "2"}), mark(base, versions={"torch": "3"})]
    marks += [mark(base, task={**TASK, name: "x"}) for name in TASK]
    assert len(set(marks)) == len(marks)


def test_a_fingerprint_is_the_same_in_another_process():
    cell = Cell(DIFFUSION, SPEC, RULE, 0.9, "input", ("input",))
    program = (
        "import json, sys; from dllm_sparsity.study.plan import fingerprint; print(fingerprint(json.load(sys.stdin)))"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(parts(cell)), text=True, capture_output=True, check=True
    )
    assert told.stdout.strip() == mark(cell)


@settings(deadline=None)
@given(studies, st.integers(1, 5))
def test_stacks_hold_cells_that_differ_in_strength_alone(study, size):
    study = study.model_copy(
        update={"models": tuple(model.model_copy(update={"stack": size}) for model in study.models)}
    )
    each = [(cell, parts(cell, task={"name": cell.task.name})) for cell in expand(study)]
    jobs = [Job(cell, None, fingerprint(own), own) for cell, own in each]
    stacks = together(jobs)
    assert sorted(job.fingerprint for stack in stacks for job in stack) == sorted(job.fingerprint for job in jobs)
    for stack in stacks:
        assert 1 <= len(stack) <= size
        assert len({(job.cell.model, job.cell.task, job.cell.site) for job in stack}) == 1
        assert len({job.cell.strength for job in stack}) == len(stack)
        assert stack[0].cell.rule is not None or len(stack) == 1
    assert sorted(map(len, stacks)) == sorted(stack_sizes([job.cell for job in jobs]))
    if size == 1:
        assert [stack[0] for stack in stacks] == jobs
    full = sum(-(-len(rule.strengths) // size) * len(rule.sites) for rule in distinct(study.rules))
    assert len(stacks) == len(study.models) * len(study.tasks) * (1 + study.replicates + full)


def distinct(rules):
    return [rule.model_copy(update={"strengths": tuple(dict.fromkeys(rule.strengths))}) for rule in rules]


def test_a_stack_is_another_batch_plan_of_a_grid_alone():
    rule = RuleConfig(name="top_p", strengths=(0.9,))
    one, more = (ModelConfig(paradigm="autoregressive", model="m", stack=stack) for stack in (1, 4))
    task = TaskSpec(name="t")
    sparse = [Cell(model, task, rule, 0.9, "all", ("input",)) for model in (one, more)]
    assert mark(sparse[0]) != mark(sparse[1])
    assert "stack" not in parts(sparse[0])
    for change in (lambda cell: with_block(cell, 0, 8), probe_cell):
        assert mark(change(sparse[0])) == mark(change(sparse[1]))
    dense = [Cell(model, task, None, None, None, ("input",)) for model in (one, more)]
    assert mark(dense[0]) == mark(dense[1])


def test_strengths_of_one_rule_given_in_two_places_share_forward_passes():
    rules = tuple(RuleConfig(name="top_p", strengths=own, sites=("all",)) for own in ((0.9, 0.8), (0.7,)))
    model = ModelConfig(paradigm="autoregressive", model="m", stack=4)
    cells = expand(StudyConfig(models=(model,), tasks=(TaskSpec(name="t"),), rules=rules))
    stacks = together([Job(cell, None, mark(cell), parts(cell)) for cell in cells])
    assert [len(stack) for stack in stacks] == stack_sizes(cells) == [1, 3]
