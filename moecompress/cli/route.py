"""moecompress route: let a model skip chosen experts that matter little."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moecompress.cli.common import Json, Model, Trust, print_json


def command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; must not exist or be empty.")],
    policy: Annotated[str, typer.Option("--policy", help="odp, naee, top-p or modes (below).")] = "odp",
    skip: Annotated[float, typer.Option("--skip", help="Share of expert calls to skip, 0.15 for 15 %.")] = 0.15,
    text: Annotated[
        str, typer.Option("--text", help="Text to tune and measure on: file, folder, hub data set or 'builtin'.")
    ] = "builtin",
    sequences: Annotated[int, typer.Option(min=2, help="How many sequences of the text to use, held-out ones too.")] = 32,
    length: Annotated[int, typer.Option(min=8, help="Context length in tokens.")] = 512,
    heldout: Annotated[int, typer.Option(min=1, help="How many of the sequences only measure.")] = 8,
    renormalise: Annotated[
        bool | None,
        typer.Option("--renormalise/--no-renormalise", help="Let the experts left take over the weight of the skipped ones. "
                     "Default: as the policy's paper, which is yes except for modes."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", help="Measure KL to this model, before and after. Default: to MODEL waking all experts."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Skip the chosen experts whose weight is small: fewer products for a token, with the weights as they are.

    The thresholds are tuned on text for the wanted share of skipped calls, and KL is measured on other sequences of it.
    The output has the same shards (hard links, where the file system allows) and the policy in config.json. A compressed
    folder applies it when it is loaded; for an ordinary one call
    moecompress.route.apply(model, model.config.moecompress_routing).

    odp drops each expert whose weight is small beside the token's largest; naee all but the first where the second is
    small; top-p what the smallest set reaching a share of the weight does not need; modes by importance of the layer.

    Examples:

        moecompress route out -o out-skipping --policy odp --skip 0.15 --text corpus.txt

        moecompress route ./model -o routed --policy modes --skip 0.3 --no-renormalise --json
    """
    from moecompress.route.folder import route

    record = route(model, output, policy, skip, text, sequences, length, heldout, renormalise, reference, dtype, trust_remote_code)
    if json_:
        print_json(record)
        return
    from rich.console import Console
    from rich.table import Table

    against = "the model waking all experts" if reference is None else reference
    table = Table("", "KL, nats", "95 %", "top-1 agreement", "perplexity", title=f"against {against}, on held-out text")
    for label in ("before", "after"):
        if label in record:
            row = record[label]
            low, high = row["kl_interval_95"]
            table.add_row(label, f"{row['kl_mean']:.5f}", f"{low:.5f} … {high:.5f}", f"{row['top1_agreement']:.2%}",
                          f"{row['perplexity']:.3f} (of {row['reference_perplexity']:.3f})")  # fmt: skip
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{output}: policy {policy} skips {record['skipped']:.2%} of the expert calls "
                  f"({record['calibration_skipped']:.2%} on the text it was tuned on)")  # fmt: skip
