"""dllm-sparsity compare: a study from a file, from options, or the embedded one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from dllm_sparsity.cli.naming import names_config
from dllm_sparsity.errors import UserError

_MODEL_OPTIONS = ("dtype", "batch_size", "stack", "revision", "trust_remote_code")
_DIFFUSION_OPTIONS = ("mask_token", "logits_shift", "steps", "block_length", "sampler", "confidence_threshold", "mc")


def _mc(context: click.Context, parameter: click.Parameter, value: str | None) -> int | str | None:
    if value is None or value == "exact":
        return value
    if value.isdecimal() and int(value) > 0:
        return int(value)
    raise click.BadParameter("give a number of draws, 1 or more, or exact")


@click.command(short_help="Run a study and write its report.")
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--ar", multiple=True, metavar="MODEL", help="Autoregressive model: hub id or folder. Repeatable.")
@click.option("--diffusion", multiple=True, metavar="MODEL", help="Masked-diffusion model, likewise. Repeatable.")
@click.option("--task", multiple=True, metavar="NAME", help="lm-eval task, by name or YAML file. Repeatable.")
@click.option("--text", multiple=True, metavar="FILE", help="Likelihood on a text of your own. Repeatable.")
@click.option("--site", multiple=True, metavar="SITE", help="input, gate, up, intermediate or all. Repeatable.")
@click.option("--rule", multiple=True, metavar="NAME", help="Sparsification rule; top_p when not given. Repeatable.")
@click.option("--strength", multiple=True, type=float, metavar="X", help="Main parameter of each rule. Repeatable.")
@click.option("--grid", type=click.Choice(["paper"]), help="paper: the 26 values of top_p of arXiv:2509.00454.")
@click.option("--mask-token", metavar="TOKEN", help="Mask token or its id, where the tokenizer names none.")
@click.option("--logits-shift", is_flag=True, default=None, help="Logits of i - 1 predict position i (Dream).")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps over the canvas; one a token when not given.")
@click.option("--block-length", type=click.IntRange(1), help="Tokens denoised together; all when not given.")
@click.option("--sampler", metavar="NAME", help="Who chooses commits; low_confidence when not given.")
@click.option("--confidence-threshold", type=float, metavar="P", help="For the sampler confidence_threshold.")
@click.option("--mc", callback=_mc, metavar="K", help="Monte-Carlo draws of the diffusion likelihood, or exact.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="float32 when not given.")
@click.option("--batch-size", type=click.IntRange(1), help="Sequences in one forward pass.")
@click.option("--stack", type=click.IntRange(1), help="Strengths that share a forward pass; 1 when not given.")
@click.option("--revision", help="Revision of all models named here.")
@click.option(
    "--trust-remote-code", is_flag=True, default=None, help="Let code that comes with the models named here run."
)
@click.option("--out", type=click.Path(path_type=Path), help="Run directory; runs/<name> when not given.")
@click.option("--limit", type=click.IntRange(1), help="Items of each task.")
@click.option(
    "--replicates", type=click.IntRange(0), metavar="N", help="Dense runs with other batches, for a noise floor."
)
@click.option("--device", help="cpu, cuda, cuda:0; a GPU where there is one when not given.")
@click.option("--seed", type=click.IntRange(0), help="Seed of everything random.")
@click.option("--engine", default="local", metavar="WHO", help="local, ray, ray://HOST:PORT or slurm.")
@click.option("--workers", type=click.IntRange(1), help="Workers of the engine; one for each GPU when not given.")
@click.option("--gpus-per-worker", type=click.IntRange(1), default=1, help="More than 1 for models with a device_map.")
@click.option("--engine-option", multiple=True, metavar="NAME=VALUE", help="For SLURM, as submitit names it.")
@click.option("--offline", is_flag=True, help="Look nothing up on a network; refuse what is not on this machine.")
@click.option("--fail-if", metavar="EXPR", help="Leave with exit code 4 where this holds of the summary's numbers.")
@click.option("--track", metavar="NAME", help="Log each cell to trackio or wandb as well.")
@click.option("--dry-run", is_flag=True, help="Say what it would take; run and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object instead of a table.")
@click.pass_context
@names_config
def compare(
    context: click.Context,
    config: Path | None,
    out: Path | None,
    as_json: bool,
    offline: bool,
    fail_if: str | None,
    dry_run: bool,
    engine: str,
    workers: int | None,
    gpus_per_worker: int,
    engine_option: tuple[str, ...],
    track: str | None,
    **options: Any,
) -> None:
    """Compare the activation sparsity of autoregressive and diffusion language models.

    Without arguments: the embedded study, on two small models that ship with this package. With CONFIG: a study in
    YAML. With options: a study of the models, tasks and rules that they name.

    The same command continues a run that was interrupted, and writes the report again when nothing is left to run.
    """
    given = {name: value for name, value in options.items() if value not in (None, (), "")}
    study = _study(config, given)
    gate = None
    if fail_if is not None:
        from dllm_sparsity.cli.gate import Gate

        gate = Gate(fail_if)  # a condition that cannot be read is refused before the study runs
    from dllm_sparsity.study.engines import Engine

    who = Engine.parse(engine, workers, gpus_per_worker, engine_option)
    if offline:
        from dllm_sparsity.study.offline import go_offline

        go_offline()  # before a library of the hub is imported
    if dry_run:
        from dllm_sparsity.cli.dry_run import dry_run as show
        from dllm_sparsity.study.config import build_config

        context.exit(0 if show(build_config(study), config, as_json, who, gate, track) else 1)
    if offline:
        from dllm_sparsity.cli.silence import silence
        from dllm_sparsity.study.config import build_config
        from dllm_sparsity.study.offline import check_offline

        with silence():
            check_offline(build_config(study), config is not None)

    if gate is not None:
        from dllm_sparsity.cli.gate_names import refuse_ahead
        from dllm_sparsity.study.config import build_config

        refuse_ahead(gate, build_config(study))
    from dllm_sparsity.cli.progress import make_progress
    from dllm_sparsity.comparison import compare as run

    result = run(study, out, make_progress(), who, track)
    if as_json:
        click.echo(json.dumps(result.summary, allow_nan=False))
    else:
        from rich.console import Console

        from dllm_sparsity.report import render

        Console().print(render(result.summary))
        click.echo(f"\nreport: {result.report}")
    if gate is not None:
        from dllm_sparsity.cli.gate import leave

        leave(context, gate, result.summary)


def _study(config: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the study that the command line asks for."""
    from dllm_sparsity.comparison import EMBEDDED_STUDY
    from dllm_sparsity.study.config import read_config

    base = read_config(config if config is not None else EMBEDDED_STUDY)
    study = base.model_dump(mode="json", exclude_unset=True)
    clash = {"ar", "diffusion", "task", "text", "rule", "site", "strength"} & set(given)
    if config is not None and clash:
        raise UserError(
            f"{config} names models, tasks and rules already, and so does --{min(clash)}",
            "give the file or the options",
        )
    for name in ("device", "seed", "replicates"):
        if name in given:
            study[name] = given[name]
    study["models"] = _models(study["models"], given)
    study["tasks"] = _tasks(study["tasks"], given)
    study["rules"] = _rules(study["rules"], given)
    if "grid" in given:
        study["rules"] = _on_paper_grid(study["rules"], given)
        study.pop("search", None)
    if config is None and clash:
        names = [model.get("label") or model["model"].rstrip("/").rsplit("/", 1)[-1] for model in study["models"]]
        study["name"] = re.sub(r"[^A-Za-z0-9._-]+", "-", "-vs-".join(names)).strip("-._")[:80] or "study"
    return study


def _on_paper_grid(rules: list[dict[str, Any]], given: dict[str, Any]) -> list[dict[str, Any]]:
    from dllm_sparsity.analysis.critical import PAPER_GRID

    if "strength" in given:
        raise UserError("--grid and --strength both say which strengths to run", "give one of both")
    other = next((rule["name"] for rule in rules if rule["name"] != "top_p"), None)
    if other is not None:
        raise UserError(
            f"--grid paper is a grid of top_p, and the study has {other}", "leave that rule out, or the grid"
        )
    return [{**rule, "strengths": list(PAPER_GRID[1:])} for rule in rules]  # the first is dense, which always runs


def _models(models: list[dict[str, Any]], given: dict[str, Any]) -> list[dict[str, Any]]:
    named = [{"paradigm": "autoregressive", "model": model} for model in given.get("ar", ())]
    named += [{"paradigm": "diffusion", "model": model} for model in given.get("diffusion", ())]
    idle = [name for name in _DIFFUSION_OPTIONS if name in given]
    if idle and not any(model["paradigm"] == "diffusion" for model in named or models):
        option = idle[0].replace("_", "-")
        raise UserError(
            f"--{option} is for diffusion models, and none is given", "add --diffusion MODEL, or leave it out"
        )
    return [
        {
            **model,
            **{name: given[name] for name in _MODEL_OPTIONS if name in given},
            **{name: given[name] for name in _DIFFUSION_OPTIONS if name in given and model["paradigm"] == "diffusion"},
        }
        for model in named or models
    ]


def _tasks(tasks: list[dict[str, Any]], given: dict[str, Any]) -> list[dict[str, Any]]:
    named = [{"name": name} for name in given.get("task", ())] + [{"text": path} for path in given.get("text", ())]
    changed = {"limit": given["limit"]} if "limit" in given else {}
    if "mc" in given:
        changed["mc"] = given["mc"]
    return [{**task, **changed} for task in named or tasks]


def _rules(rules: list[dict[str, Any]], given: dict[str, Any]) -> list[dict[str, Any]]:
    names = given.get("rule") or ("top_p",)
    if not {"rule", "site", "strength"} & set(given):
        return rules
    if not {"strength", "grid"} & set(given) and names != ("top_p",):  # of a grid for other rules, it is said why not
        raise UserError(f"no strength given for rule {names[0]}", "add --strength X, once for each value")
    strengths = given.get("strength") or tuple(rules[0]["strengths"])
    sites = given.get("site") or ("input", "intermediate")
    return [{"name": name, "strengths": strengths, "sites": sites} for name in names]
