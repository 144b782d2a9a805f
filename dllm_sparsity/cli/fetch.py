"""dllm-sparsity fetch: download what a study needs, so that it runs without a network afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dllm_sparsity.cli.naming import names_config


@click.command(short_help="Download the models and data of a study.")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Say what would be downloaded, and download nothing.")
@click.option("--offline", is_flag=True, help="Look nothing up: say whether all is on this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print what is needed as one JSON object.")
@names_config
def fetch(config: Path, dry_run: bool, offline: bool, as_json: bool) -> None:
    """Download the models, tokenizers and task data of a study in YAML, into the caches of the hub's libraries.

    Said first, then done. The same command again keeps every file that is whole. Weights come as safetensors only,
    never as pickles; code that comes with a model only where the study trusts it.

    Afterwards the study runs with --offline.
    """
    from dllm_sparsity.study.config import read_config

    study = read_config(config)
    if offline:
        from dllm_sparsity.cli.silence import silence
        from dllm_sparsity.study.offline import check_offline, go_offline

        go_offline()
        with silence():
            check_offline(study)
        click.echo(json.dumps({"missing": []}) if as_json else f"all that {config} needs is on this machine")
        return
    from dataclasses import asdict

    from dllm_sparsity.cli.silence import silence
    from dllm_sparsity.study import fetch as fetching

    with silence():
        found = fetching.needs(study)
    if as_json:
        click.echo(json.dumps({"needs": [asdict(need) for need in found]}))
    for need in found if not as_json else ():
        click.echo(f"{need.kind} {need.name}: {_missing(need)}")
    if dry_run:
        return
    for need in found:
        if need.source:
            click.echo(f"downloading {need.source} ...", err=True)
        if need.kind == "model":
            fetching.fetch(study, need)  # the hub's library shows its own bar
        else:
            with silence():
                fetching.fetch(study, need)
    if not as_json:
        click.echo(f"all of it is here; without a network: dllm-sparsity compare {config} --offline")


def _missing(need: object) -> str:
    from dllm_sparsity.study.fetch import Need

    if not isinstance(need, Need) or not need.source:
        return "on this machine"
    if need.missing is None:
        return f"data {need.source}, size told by the download"
    return f"{need.files} files to download, {_size(need.missing)} of {_size(need.total or 0)}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e3:,.0f} kB"
