"""Run a study in child processes and kill them; a script, so that the libraries are loaded once for all children.

Reads one JSON object: study, out, begun (a file that grows by a byte for each batch that is begun), and for each kill
how many batches the child may begin and how many seconds it then lives on. The last child runs to its end. With
`workers`, these answer, and a batch that is written down counts as begun. Prints one JSON object.
"""

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import transformers

from dllm_sparsity import comparison
from dllm_sparsity.lm import base
from dllm_sparsity.study.engines import Engine
from dllm_sparsity.study.journal import CellJournal

for name in ("lm_eval.evaluator", "autoregressive.backend", "dllm_sparsity.diffusion.backend", "dllm_sparsity.report"):
    importlib.import_module(name)


def child(task: dict) -> None:
    """Run the study, and note each batch that is computed."""
    torch.set_num_threads(1)
    batches, real = os.open(task["begun"], os.O_WRONLY | os.O_APPEND | os.O_CREAT), base.SparsityLM.compute

    def noted(self, work):
        os.write(batches, b".")
        return real(self, work)

    if task.get("workers"):
        append = CellJournal._append

        def written(self, *arguments):
            append(self, *arguments)
            os.write(batches, b".")

        CellJournal._append = written
    else:
        base.SparsityLM.compute = noted
    comparison.compare(task["study"], task["out"], engine=Engine(workers=task.get("workers")))


def run(task: dict, kill: tuple[int, float] | None) -> int | None:
    """Return the exit code of a child, or None where it was killed."""
    begun = Path(task["begun"])
    before = begun.stat().st_size
    number = os.fork()
    if not number:
        try:
            child(task)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    end = None
    while end is None or time.monotonic() < end:
        if (ended := os.waitpid(number, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(ended[1])
        if kill is not None and end is None and begun.stat().st_size >= before + kill[0]:
            end = time.monotonic() + kill[1]
        time.sleep(0.0005)
    os.kill(number, signal.SIGKILL)
    return None if os.WIFSIGNALED(os.waitpid(number, 0)[1]) else 0


def main() -> None:
    """Kill as often as asked, and let the last child end."""
    transformers.logging.set_verbosity_error()
    task, kills, inside, code = json.loads(sys.stdin.read()), 0, 0, None
    Path(task["begun"]).touch()
    for kill in (*task["kills"], None):
        code = run(task, kill)
        if code is not None:
            break
        kills += 1
        journals = Path(task["out"]).glob("journals/*")
        inside += any(path.stat().st_size > 1000 for path in journals)  # more than its head
    print(json.dumps({"kills": kills, "inside": inside, "begun": Path(task["begun"]).stat().st_size}))
    sys.exit(code)


if __name__ == "__main__":
    main()
