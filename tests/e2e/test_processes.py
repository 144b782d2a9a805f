"""Two processes count what one counts, to the last unit: lm-eval's padding is neither run nor counted nor logged.

One sequence in each forward pass and one thread: a row's rounding must not depend on its neighbours here. The two
processes share five items, so lm-eval pads the second one's share.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dllm_sparsity.lm.distributed import KEYS

ROOT = Path(__file__).parents[2]
ITEMS = 5
THREADS = """
import sys
from pathlib import Path
from dllm_sparsity.cli.main import main
try:
    main()
finally:
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    print(f"threads: {[name for name in threads if 'gloo' in name]}", file=sys.stderr)
"""
pytestmark = pytest.mark.slow


def launcher(processes, program=("-m", "dllm_sparsity.cli")):
    if processes == 1:
        return [sys.executable, *program]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    how = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--main_process_port", port]
    more = ["--mixed_precision", "no", "--dynamo_backend", "no", *program]
    return [sys.executable, "-m", "accelerate.commands.launch", *how, *more]


def run(processes, folder, *arguments, **more):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launcher(processes, **more), "eval", "--device", "cpu", *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture(scope="module")
def tasks(material, tmp_path_factory):
    """Choices, generation with two samples an item, and whole texts."""
    folder = tmp_path_factory.mktemp("tasks")
    write = (material / "write.yaml").read_text().replace("do_sample: false", "do_sample: true, temperature: 1.0")
    (folder / "write.yaml").write_text(write + "repeats: 2\n")
    (folder / "text.yaml").write_text(
        f"task: tiny_text\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {material}/items.jsonl}}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{q}} {{a[0]}}'\n"
        "metric_list: [{metric: byte_perplexity}]\nmetadata: {version: 1}\n"
    )
    return f"{material / 'choice.yaml'},{folder / 'write.yaml'},{folder / 'text.yaml'}"


def left_behind(folder):
    (results,), (record,) = folder.rglob("results_*.json"), folder.rglob("sparsity_*.json")
    summary = json.loads(record.read_text())
    steps, items = (pq.read_table(record.with_name(summary["files"][name])).to_pylist() for name in ("steps", "items"))
    by_key = {tuple(row[name] for name in KEYS): row for row in steps}
    assert len(by_key) == len(steps)
    for row in items:
        assert row.pop("seconds") > 0
    return json.loads(results.read_text())["results"], summary, by_key, items


@pytest.mark.parametrize("model", ["sparse-ar", "sparse-diffusion"])
def test_two_processes_equal_one(material, tasks, tmp_path, model):
    source = material / ("ar" if model == "sparse-ar" else "dm")
    own = ",mc=3,block_length=3,check_greedy=true" if model == "sparse-diffusion" else ""
    found = []
    for processes in (1, 2):
        done = run(
            processes, tmp_path, "--model", model, "--tasks", tasks, "--limit", ITEMS, "--batch_size", "1",
            "--model_args", f"pretrained={source},rule=top_p,strength=0.8,sites=input+gate+up+intermediate{own}",
            "--output_path", f"out{processes}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Sparsity, top_p 0.8") == 1
        found.append(left_behind(tmp_path / f"out{processes}"))
    (scores, one, steps, items), (shared_scores, two, shared_steps, shared_items) = found
    assert (one["processes"], two["processes"]) == (1, 2)
    assert steps == shared_steps
    assert {"likelihood", "prefill" if model == "sparse-ar" else "denoise"} <= {key[0] for key in steps}
    assert items == shared_items
    assert len(items) == 3 * ITEMS
    assert {len(row["loglikelihoods"]) for row in items if row["task"] == "tiny_choice"} == {2}
    assert one["totals"] == two["totals"]
    assert one["tasks"] == two["tasks"]
    assert scores.keys() == shared_scores.keys()
    for task, values in scores.items():  # their means add up in another order
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        assert numbers == pytest.approx({name: shared_scores[task][name] for name in numbers}, rel=1e-12)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are named in /proc")
def test_no_thread_of_the_group_outlives_it(material, tmp_path):
    """A thread that frees a tensor while the interpreter ends aborts the process; most often it is fast enough."""
    program = tmp_path / "program.py"
    program.write_text(THREADS)
    done = run(
        2, tmp_path, "--model", "sparse-ar", "--tasks", material / "choice.yaml", "--limit", 2,
        "--model_args", f"pretrained={material / 'ar'}", program=[program],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("threads: []") == 2, done.stderr


@pytest.mark.parametrize(
    ("more", "limit", "message"),
    [
        (",layers=99", 2, "no such layers: [99]"),  # the same in both, behind the start
        ("", 1, "a process got no item of a task"),  # in the second alone
    ],
)
def test_one_process_reports_in_two_lines(material, tmp_path, more, limit, message):
    task = material / "choice.yaml"
    done = run(
        2, tmp_path, "--model", "sparse-ar", "--tasks", task, "--limit", limit,
        "--model_args", f"pretrained={material / 'ar'}{more}",
    )  # fmt: skip
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    (place,) = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert message in lines[place]
    assert lines[place + 1].startswith("hint:  ")
    assert "dllm_sparsity/cli" not in done.stderr  # the launcher shows frames of its own, but none is ours
