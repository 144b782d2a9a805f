"""dllm-sparsity: the commands, and how errors and interrupts leave."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

import click

from dllm_sparsity.cli.bench import bench
from dllm_sparsity.cli.check import check
from dllm_sparsity.cli.compare import compare
from dllm_sparsity.cli.evaluate import evaluate
from dllm_sparsity.cli.fetch import fetch
from dllm_sparsity.cli.ls import ls
from dllm_sparsity.cli.report import report
from dllm_sparsity.errors import Interrupted, UserError

_DEBUG = "DLLM_SPARSITY_DEBUG"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "DLLM_SPARSITY"})
@click.version_option(package_name="dllm-sparsity", message="%(prog)s %(version)s")
def cli() -> None:
    """Measure activation sparsity of autoregressive and masked-diffusion language models, on equal terms."""


cli.add_command(compare)
cli.add_command(evaluate)
cli.add_command(report)
cli.add_command(check)
cli.add_command(fetch)
cli.add_command(ls)
cli.add_command(bench)


def main() -> None:
    """Run the command line; users get two lines and an exit code, never a traceback."""
    signal.signal(signal.SIGTERM, _as_interrupt)
    # threads that spin while they wait make a run several times slower when another program needs a core; read at
    # torch's import
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = cli.main(standalone_mode=False)
    except UserError as error:
        code = _leave(error.message, error.hint, error.exit_code)
    except click.UsageError as error:
        error.show()
        code = 2
    except click.ClickException as error:
        error.show()
        code = 1
    except (KeyboardInterrupt, click.Abort):
        _end_at_the_next()
        code = _leave(
            "interrupted; finished cells are sealed",
            "the same command continues where this one stopped",
            Interrupted.exit_code,
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:  # the last resort: whatever it was, users get two lines
        code = _leave(f"unexpected {type(error).__name__}: {error}", f"{_DEBUG}=1 shows where; finished cells are kept")
    sys.exit(code if isinstance(code, int) else 0)


def _leave(message: str, hint: str, code: int = 1) -> int:
    if os.environ.get(_DEBUG) == "1" and sys.exc_info()[0] is not None:
        import traceback

        traceback.print_exc()
    click.echo(f"error: {_one_line(message)}\nhint:  {_one_line(hint)}", err=True)
    return code


def _one_line(text: str) -> str:
    """Fold white space and drop control characters: messages can hold foreign text."""
    return "".join(sign for sign in " ".join(text.split()) if sign.isprintable())


def _end_at_the_next() -> None:
    """Let another interrupt end the process at once: all there is to keep is on disk, and threads are waited for."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    if "multiprocessing" in sys.modules:
        for worker in sys.modules["multiprocessing"].active_children():
            worker.kill()
    os._exit(Interrupted.exit_code)


def _as_interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
