"""dllm-sparsity eval: lm-eval's own command line on our backends, with the sparsity counted beside its scores."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from dllm_sparsity.errors import Interrupted, UserError, did_you_mean

_MODELS = {"sparse-ar": "autoregressive", "sparse-diffusion": "diffusion"}
_BATCH_SIZE = 16  # lm-eval's own default is 1


_HELP = """
Run lm-eval's command line on a model with a sparsification rule, and count what the rule does.

--model is sparse-ar or sparse-diffusion. --model_args says which model, and what acts on it:

\b
  pretrained=MODEL        hub id, folder, embedded:autoregressive or embedded:diffusion
  rule=NAME strength=X    what to keep; without a rule the model is dense and only counted
  sites=input+gate        input, gate, up, intermediate or all (input and intermediate)
  layers=0+3              all when not given
  revision= trust_remote_code= dtype= max_length= seed= metrics= check_greedy=
  and the rule's own parameters
  for sparse-ar: share_context=
  for sparse-diffusion: mask_token= logits_shift= mc= steps= block_length=
                        temperature= cfg_scale= sampler= confidence_threshold=

Example: dllm-sparsity eval --model sparse-diffusion --tasks easy_endings --limit 20
--model_args pretrained=embedded:diffusion,rule=top_p,strength=0.9,sites=all,mc=16

The sparsity of each site is printed below lm-eval's table. With --output_path, steps_DATE.parquet,
items_DATE.parquet and sparsity_DATE.json lie beside lm-eval's results_DATE.json.

Several processes share the requests: accelerate launch -m dllm_sparsity.cli eval ...

With --offline nothing is looked up on a network; what is not on this machine is an error before weights are read.

Refused: --use_cache, for it skips the forward passes that are to be counted, and --batch_size auto.
"""


@click.command(
    "eval",
    help=_HELP,
    context_settings={"ignore_unknown_options": True},
    short_help="Run lm-eval on a sparse model; all its options.",
    epilog="lm-eval's own options, all of which can be given: lm-eval run --help",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[LM-EVAL OPTIONS]")
def evaluate(arguments: tuple[str, ...]) -> None:
    """Run lm-eval's own command line, attach and count, and write the records; all ranks run this."""
    offline = "--offline" in arguments
    if offline:
        from dllm_sparsity.study.offline import go_offline

        go_offline()  # before a library of the hub is imported
    try:
        with _plain_errors():
            _run([argument for argument in arguments if argument != "--offline"], offline)
    except (UserError, click.UsageError):
        if not _speaks():
            sys.exit(1)
        raise


def _speaks() -> bool:
    """Tell whether this process reports an error that several ran into; a launcher ends the others meanwhile."""
    from dllm_sparsity.lm.distributed import speaks

    try:
        return speaks()
    except KeyboardInterrupt:
        return False


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn whatever lm-eval raises into two lines."""
    try:
        yield
    except (UserError, click.UsageError):
        raise
    except KeyboardInterrupt as error:
        raise Interrupted(
            "interrupted; nothing was written", "lm-eval keeps no partial results: run it again"
        ) from error
    except Exception as error:  # lm-eval, its tasks and its metrics raise whatever they like
        if "did not find any docs" in str(error):
            raise UserError(
                "a process got no item of a task", "give the task more items, or run fewer processes"
            ) from error
        kind = "" if isinstance(error, ValueError) else f" ({type(error).__name__})"
        raise UserError(
            f"lm-eval: {error}{kind}", "its options: lm-eval run --help; DLLM_SPARSITY_DEBUG=1 shows where"
        ) from error


def _run(arguments: list[str], offline: bool) -> None:
    if os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    args = _parse(arguments)
    options = _options(args)
    args.model_args = model_args = _check(options)
    args.batch_size = str(model_args.get("batch_size") or options.get("batch_size") or _BATCH_SIZE)
    args.device = str(model_args.get("device") or options.get("device") or "auto")

    from lm_eval.utils import setup_logging

    from dllm_sparsity.cli import evaluated
    from dllm_sparsity.cli.task_manager import our_tasks
    from dllm_sparsity.lm import registered
    from dllm_sparsity.lm.distributed import Processes

    processes = Processes.start(args.device)
    trusts = {"trust_remote_code": True} if options.get("trust_remote_code") else {}  # lm-eval passes it on
    request = registered.check(
        _MODELS[options["model"]], {"batch_size": args.batch_size, "device": args.device, **model_args, **trusts}
    )
    if offline:
        _prove(request.model, options)
    setup_logging()
    if processes.rank:
        _hush()
    output_path = options.get("output_path")
    before = _results(output_path)
    try:
        with our_tasks(options["tasks"]):
            args.func(args)
        lm = registered.latest()
        if lm is None:
            raise UserError("lm-eval ended without opening the model", "look at its messages above")
        reading, log = lm.read(), lm.read_log()
        if processes.rank == 0:
            new = sorted(_results(output_path) - before, key=lambda path: path.stat().st_mtime)
            if output_path and not new:
                raise UserError(f"lm-eval saved no results under {output_path}", "look at its warning above")
            summary = evaluated.summarize(reading, lm, options["model"], model_args)
            click.echo(evaluated.table(summary))
            if new:
                indices = _indices(options.get("samples"))
                click.echo(f"records: {evaluated.write(reading, log, summary, new[-1], indices)}")
    finally:
        registered.close()
    processes.stop()


def _prove(model: Any, options: dict[str, Any]) -> None:
    """Refuse a model or a task that is not on this machine, before lm-eval loads the weights."""
    import lm_eval.tasks

    from dllm_sparsity.cli.task_manager import our_tasks
    from dllm_sparsity.study.offline import missing_files

    if lacking := missing_files(model):
        raise UserError(
            f"offline: {model.name} is not on this machine: {', '.join(lacking)}",
            "give a local folder, or download it first",
        )
    given = options["tasks"]
    names = given.split(",") if isinstance(given, str) else [name for each in given for name in str(each).split(",")]
    with our_tasks(given):
        manager = lm_eval.tasks.TaskManager(include_path=options.get("include_path"))
        for name in names:
            manager.load(manager.match_tasks([name]) or [name])


def _parse(arguments: list[str]) -> Any:
    """Let lm-eval's own parser read its options; what it refuses is a usage error."""
    from lm_eval._cli import HarnessCLI

    harness = HarnessCLI()

    def refuse(message: str) -> None:
        raise click.UsageError(f"lm-eval: {message}\nIts options: lm-eval run --help")

    parser: Any = harness._subparsers.choices["run"]
    parser.error = refuse
    try:
        return parser.parse_args(arguments)
    except ValueError as error:
        raise click.UsageError(f"lm-eval: {error}") from error


def _options(args: Any) -> dict[str, Any]:
    """Return the options as lm-eval will join them: the command line over its YAML file."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    options: dict[str, Any] = {}
    if getattr(args, "config", None):
        try:
            options = EvaluatorConfig.load_yaml_config(args.config)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"lm-eval: {error}", "give --config an lm-eval YAML, or leave it out") from error
    return options | {name: value for name, value in vars(args).items() if value or value == 0}


def _check(options: dict[str, Any]) -> dict[str, Any]:
    """Refuse what cannot be counted; return the model arguments."""
    from lm_eval.utils import simple_parse_args_string

    if options.get("use_cache"):
        raise UserError(
            "--use_cache skips forward passes, so they could not be counted",
            "leave it out; --cache_requests keeps prompts only and is fine",
        )
    model = options.get("model")
    if model not in _MODELS:
        found = "no --model given" if model is None else f"unknown model {model!r}{did_you_mean(model, list(_MODELS))}"
        raise UserError(found, "give --model sparse-ar or sparse-diffusion; others are for lm-eval itself")
    if not options.get("tasks"):
        raise UserError("no --tasks given", "embedded ones: dllm-sparsity ls tasks; any other lm-eval task works too")
    folder = options.get("include_path")
    if folder and not Path(folder).is_dir():
        raise UserError(f"--include_path {folder} is no folder", "give one that holds lm-eval task files")
    given = options.get("model_args") or {}
    model_args = dict(simple_parse_args_string(given) if isinstance(given, str) else given)
    seed = options.get("seed")
    if seed and "seed" not in model_args:  # lm-eval seeds torch with the third; ours seeds masks and sampling
        third = seed[2] if isinstance(seed, list) and len(seed) > 2 else seed
        if isinstance(third, int):
            model_args["seed"] = third
    return model_args


def _hush() -> None:
    """Leave the terminal to the first process, but for errors."""
    import logging

    from transformers.utils import logging as transformers_logging

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()


def _indices(samples: Any) -> dict[str, list[int]]:
    """Return the documents that --samples chose of each task; lm-eval numbers them anew while it runs."""
    if isinstance(samples, str):
        samples = json.loads(Path(samples).read_text(encoding="utf-8") if Path(samples).is_file() else samples)
    return samples or {}


def _results(output_path: str | None) -> set[Path]:
    """Return lm-eval's result files below its output path."""
    if not output_path:
        return set()
    path = Path(output_path)
    if path.suffix == ".json":
        return set(path.parent.glob(f"{path.stem}_*.json"))
    return set(path.rglob("results_*.json"))
