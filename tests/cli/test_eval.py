"""dllm-sparsity eval: lm-eval's command line on both backends, what it leaves behind, and what it refuses."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import lm_eval
import pyarrow.parquet as pq
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from autoregressive.backend import AutoregressiveBackend
from dllm_sparsity.diffusion.backend import DiffusionBackend
from dllm_sparsity.errors import UserError
from dllm_sparsity.lm import registered
from dllm_sparsity.lm.loading import ModelSource
from dllm_sparsity.sparsity.rules.top_p import TopP
from dllm_sparsity.sparsity.sparsifier import sparsify

SPARSE = "rule=top_p,strength=0.8,sites=all,batch_size=4"
NAMES = {"sparse-ar": "ar", "sparse-diffusion": "dm"}


@pytest.fixture(autouse=True)
def _let_go():
    logger = logging.getLogger("lm_eval")
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    registered.close()
    logger.handlers[:], logger.propagate = before[:2]  # else it logs to the standard error of a test that is over
    logger.setLevel(before[2])


def model_args(material, model, more=SPARSE):
    own = ",mc=2,block_length=3" if model == "sparse-diffusion" else ""
    return f"pretrained={material / NAMES[model]},{more}{own}"


def left_behind(folder):
    """Return what a run wrote: lm-eval's results, our summary, steps and items."""
    (results,), (record,) = Path(folder).rglob("results_*.json"), Path(folder).rglob("sparsity_*.json")
    summary = json.loads(record.read_text())
    tables = [pq.read_table(record.with_name(summary["files"][name])) for name in ("steps", "items")]
    return json.loads(results.read_text()), summary, *tables


def total(table, name, **only):
    rows = (row for row in table.to_pylist() if all(row[key] == value for key, value in only.items()))
    return sum(row[name] for row in rows if row.get("token_state") not in ("pad", "after_eos"))


@pytest.mark.parametrize("model", NAMES)
def test_lm_evals_options_work_and_the_records_agree(run, material, model):
    code, out, err = run(
        "eval", "--model", model, "--model_args", model_args(material, model), "--device", "cpu", "--seed", "5",
        "--tasks", f"{material / 'choice.yaml'},{material / 'write.yaml'}", "--limit", "4", "--num_fewshot", "1",
        "--write_out", "--log_samples", "--output_path", "out", "--apply_chat_template", "--gen_kwargs", "do_sample=true",
    )  # fmt: skip
    assert code == 0, err
    results, summary, steps, items = left_behind("out")
    assert set(results["results"]) == {"tiny_choice", "tiny_write"}
    assert results["config"]["model_args"]["seed"] == 5
    (samples,) = Path("out").rglob("samples_tiny_choice_*.jsonl")
    assert samples.read_text().count("user: question") >= 4 * 2 * 2  # an item and its example, for both choices
    assert (summary["rule"], summary["strength"], summary["simulated"]) == ("top_p", 0.8, True)
    assert summary["sites"] == ["input", "intermediate"]
    for site in summary["sites"]:
        counts = summary["totals"][site]
        assert counts["total"] == total(steps, "total", site=site) == total(items, f"total_{site}") > 0
        assert counts["kept"] == total(steps, "kept", site=site) == total(items, f"kept_{site}")
        assert 0.2 < counts["sparsity"] < 0.9
        assert counts["sparsity"] == pytest.approx(results["config"]["sparsity"][site]["sparsity"])
        assert f"{summary['tasks']['tiny_choice'][site]['sparsity']:.4f}" in out
    assert {(row["task"], row["doc_id"]) for row in items.to_pylist()} == {
        (task, number) for task in ("tiny_choice", "tiny_write") for number in range(4)
    }
    assert registered.latest() is None


def test_without_a_rule_the_model_is_dense_and_counted(run, material):
    task = str(material / "choice.yaml")
    scores = []
    for folder, more in (("dense", "batch_size=4"), ("sparse", SPARSE.replace("0.8", "0.3"))):
        code, out, err = run(
            "eval", "--model", "sparse-ar", "--model_args", model_args(material, "sparse-ar", more),
            "--tasks", task, "--output_path", folder,
        )  # fmt: skip
        assert code == 0, err
        _, summary, _, items = left_behind(folder)
        scores.append([row["loglikelihoods"] for row in items.to_pylist()])
        assert summary["rule"] == (None if folder == "dense" else "top_p")
    lm = AutoregressiveBackend.from_source(ModelSource(str(material / "ar")), batch_size=4)
    given = lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager(), bootstrap_iters=0)
    expected = [[answer[0][0] for answer in sample["resps"]] for sample in given["samples"]["tiny_choice"]]
    close = [pytest.approx(row, rel=1e-5) for row in expected]  # without a tracker no context is shared
    assert scores[0] == close
    assert scores[1] != close
    assert "Sparsity, top_p 0.3" in out


def test_embedded_names_and_the_issued_example(run):
    code, out, err = run(
        "eval", "--model", "sparse-diffusion", "--tasks", "easy_endings", "--limit", "2", "--device", "cpu",
        "--model_args", "pretrained=embedded:diffusion,rule=top_p,strength=0.9,sites=all,mc=2",
    )  # fmt: skip
    assert code == 0, err
    assert "easy_endings  2      input" in out


def test_a_yaml_of_lm_eval_and_a_file_of_results(run, material, tmp_path):
    config = {
        "model": "sparse-ar",
        "model_args": {"pretrained": str(material / "ar"), "rule": "top_k", "strength": 0.5, "sites": ["gate", "up"]},
        "tasks": [str(material / "choice.yaml")],
        "output_path": "named/res.json",
        "seed": 7,
    }
    (tmp_path / "e.yaml").write_text(json.dumps(config))
    code, _, err = run("eval", "--config", "e.yaml")
    assert code == 0, err
    (record,) = Path("named").glob("sparsity_*.json")
    summary = json.loads(record.read_text())
    assert summary["sites"] == ["gate", "up"]
    assert summary["model_args"]["seed"] == 7
    assert summary["totals"]["gate"]["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert (record.parent / summary["files"]["steps"]).is_file()


def test_chosen_documents_keep_their_numbers(run, material):
    code, _, err = run(
        "eval", "--model", "sparse-ar", "--model_args", model_args(material, "sparse-ar"), "--output_path", "out",
        "--tasks", material / "choice.yaml", "--samples", '{"tiny_choice": [1, 4]}', "--log_samples",
    )  # fmt: skip
    assert code == 0, err
    *_, items = left_behind("out")
    (samples,) = Path("out").rglob("samples_*.jsonl")
    logged = {sample["doc_id"]: sample["resps"] for sample in map(json.loads, samples.read_text().splitlines())}
    assert items["doc_id"].to_pylist() == sorted(logged) == [1, 4]
    for row in items.to_pylist():
        assert row["loglikelihoods"] == pytest.approx([float(answer[0][0]) for answer in logged[row["doc_id"]]])


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom dllm_sparsity.cli.main import cli\n"
        "result = CliRunner().invoke(cli, ['eval', '--help']); assert 'lm-eval run --help' in result.output\n"
        "print([name for name in ('torch', 'lm_eval', 'transformers', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


GOOD = ["--tasks", "easy_endings", "--model", "sparse-ar", "--model_args"]
AR = "pretrained={ar}"
BAD = [
    ([*GOOD, AR, "--use_cache", "x"], "--use_cache skips forward passes", "--cache_requests"),
    ([*GOOD, AR, "--batch_size", "auto"], "batch_size auto", "give a number"),
    ([*GOOD, AR + ",mc=3"], "mc is for sparse-diffusion", "leave it out"),
    ([*GOOD, AR + ",rule=topp,strength=0.9"], "unknown rule 'topp'; did you mean top_p?", "ls rules"),
    ([*GOOD, AR + ",rule=top_p"], "no strength given for rule top_p", "strength=X"),
    ([*GOOD, AR + ",strength=0.9"], "strength 0.9 without a rule", "rule=top_p"),
    ([*GOOD, AR + ",rule=top_p,strength=x"], "strength=x", "--help"),
    ([*GOOD, AR + ",rule=top_p,strength=2"], "out of range", "[0, 1]"),
    ([*GOOD, AR + ",rule=top_p,strength=1,scop=token"], "unknown model argument 'scop'; did you mean scope?", "--help"),
    ([*GOOD, AR + ",rule=top_p,strength=1,scope=tokn"], "scope=tokn", "--help"),
    ([*GOOD, AR + ",site=all"], "did you mean sites?", "--help"),
    ([*GOOD, AR + ",sites=gat"], "did you mean gate?", "sites are"),
    ([*GOOD, AR + ",metrics=overlapp"], "did you mean overlap?", "ls metrics"),
    ([*GOOD, AR + ",dtype=float23"], "dtype=float23", "--help"),
    ([*GOOD, AR + ",max_length=many"], "max_length=many", "--help"),
    ([*GOOD, "rule=top_p,strength=0.9"], "no model given", "pretrained=MODEL"),
    ([*GOOD, "pretrained=/no/such/folder"], "no such folder", "check the path"),
    ([*GOOD, "pretrained=embedded:nothing"], "no embedded model", "embedded:diffusion"),
    (["--model", "sparse_ar", "--tasks", "easy_endings"], "did you mean sparse-ar?", "sparse-diffusion"),
    (["--tasks", "easy_endings"], "no --model given", "sparse-ar or sparse-diffusion"),
    (["--model", "sparse-ar", "--model_args", AR], "no --tasks given", "ls tasks"),
    ([*GOOD, AR, "--include_path", "nowhere"], "is no folder", "task files"),
    ([*GOOD, AR, "--config", "nowhere.yaml"], "nowhere.yaml", "lm-eval YAML"),
]


@pytest.mark.parametrize(("arguments", "message", "hint"), BAD, ids=[" ".join(case[0][-3:]) for case in BAD])
def test_two_lines(run, material, arguments, message, hint):
    code, out, err = run("eval", *(argument.format(ar=material / "ar") for argument in arguments))
    lines = err.strip().splitlines()
    assert (code, out, len(lines)) == (1, "", 2), err
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert lines[1].startswith("hint:  ")
    assert hint in lines[1]


LATE = [
    (["--tasks", "no.yaml", "--model", "sparse-ar", "--model_args", AR], "no such task file: no.yaml", "lm-eval YAML"),
    ([*GOOD, AR, "--log_samples"], "--output_path", "lm-eval run --help"),
    ([*GOOD, AR + ",layers=99"], "no such layers", "layers 0 to 1"),
    (["--tasks", "easy_endings", "--model", "sparse-diffusion", "--model_args", AR], "causal model", "sparse-ar"),
    (["--tasks", "{folder}/write.yaml", "--model", "sparse-ar", "--model_args", AR, "--gen_kwargs", "num_beams=3"],
     "generation arguments not supported: num_beams", "do_sample"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message", "hint"), LATE, ids=[case[1] for case in LATE])
def test_two_lines_behind_lm_evals_own(run, material, arguments, message, hint):
    code, _, err = run("eval", *(argument.format(ar=material / "ar", folder=material) for argument in arguments))
    lines = err.strip().splitlines()[-2:]
    assert code == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert hint in lines[1]
    assert "Traceback" not in err
    assert registered.latest() is None


def test_an_unknown_option_is_a_usage_error(run):
    code, _, err = run("eval", "--nope")
    assert code == 2
    assert "unrecognized arguments: --nope" in err
    assert "lm-eval run --help" in err


def test_lm_eval_is_left_as_it_was(run, material):
    before = lm_eval.tasks.TaskManager
    run(
        "eval",
        *(argument.format(ar=material / "ar") for argument in GOOD),
        f"pretrained={material / 'ar'}",
        "--limit",
        "1",
    )
    assert lm_eval.tasks.TaskManager is before


def manager():
    return TaskManager(include_defaults=False)


@pytest.mark.parametrize("model", NAMES)
def test_by_name_equals_an_instance(material, model):
    """The three ways to lm-eval: by name, as an instance with its own tracker, and as one in a `with` block."""
    tasks = [str(material / "choice.yaml")]
    arguments = {"tasks": tasks, "task_manager": manager(), "bootstrap_iters": 0}
    named = lm_eval.simple_evaluate(model=model, model_args=model_args(material, model) + ",device=cpu", **arguments)
    reading = registered.latest().read()
    kind = AutoregressiveBackend if model == "sparse-ar" else DiffusionBackend
    own = {"mc": 2, "block_length": 3} if model == "sparse-diffusion" else {}
    lm = kind.from_source(ModelSource(str(material / NAMES[model])), batch_size=4, **own)
    with sparsify(lm.model, TopP(0.8), "all", clock=lm.clock) as tracker:
        given = lm_eval.simple_evaluate(lm, **arguments)
    assert named["results"] == given["results"]
    assert tracker.read().columns == reading.columns
    assert tracker.read().per_item == reading.per_item
    assert named["config"]["sparsity"]["input"]["sparsity"] == pytest.approx(reading.sparsity(site="input"))
    assert "sparsity" not in given["config"]
    lm.attach(TopP(0.8))
    with pytest.raises(UserError, match="attached already"):
        lm.attach(TopP(0.8))
    lm_eval.simple_evaluate(lm, **arguments)
    assert lm.read().columns == reading.columns
    lm.detach()
    with pytest.raises(UserError, match="nothing is attached"):
        lm.read()
    assert not lm.clock.listeners


def test_a_named_chat_template_is_the_one_that_is_used(material):
    lm = AutoregressiveBackend.from_source(ModelSource(str(material / "ar")))
    lm.tokenizer.chat_template = {
        "default": "plain {{ messages[0]['content'] }}",
        "loud": "LOUD {{ messages[0]['content'] }}",
    }
    talk = [{"role": "user", "content": "hi"}]
    assert lm.apply_chat_template(talk) == "plain hi"
    lm.chat_template("loud")
    assert lm.apply_chat_template(talk) == "LOUD hi"
    lm.chat_template(True)
    assert lm.apply_chat_template(talk) == "plain hi"


def test_several_values_and_types():
    checked = registered.SparsityArguments(pretrained="x", sites="input+gate", layers="0+3", strength="0.5", seed="2")
    assert (checked.sites, checked.layers, checked.strength, checked.seed) == (("input", "gate"), (0, 3), 0.5, 2)
    assert registered.SparsityArguments(pretrained="x", layers=3).layers == (3,)


def test_one_process_answers_every_request_it_is_given(material):
    """A caller's own repeats are no padding; lm-eval pads only where there are several processes."""
    lm = AutoregressiveBackend.from_source(ModelSource(str(material / "ar")))
    request = Instance("loglikelihood", {}, ("a", "b"), 0, ("task", 0, 1))
    lm.loglikelihood([request, request])
    assert len(lm.log[("task", 0)].loglikelihoods) == 2
