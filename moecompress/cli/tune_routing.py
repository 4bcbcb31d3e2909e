"""moecompress tune-routing: let a model skip chosen experts that matter little."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moecompress.cli.common import Json, Model, Trust, print_json, size_text


def command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; must not exist or be empty.")],
    policy: Annotated[str, typer.Option("--policy", help="odp, naee, top-p, modes, adamoe, otp, dynamic-bits or compressed-experts (below).")] = "odp",
    skip: Annotated[
        float | None, typer.Option("--skip", help="Share of expert calls to skip, 0.15 (the default) for 15 %.")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option("--max-kl", min=0, help="Instead: skip as many as cost at most this KL, in nats a token."),
    ] = None,
    text: Annotated[
        str, typer.Option("--text", help="Text to tune and measure on: file, folder, hub data set or 'builtin'.")
    ] = "builtin",
    sequences: Annotated[int, typer.Option(min=2, help="How many sequences of the text to use, held-out ones too.")] = 32,
    length: Annotated[int, typer.Option(min=8, help="Context length in tokens.")] = 512,
    heldout: Annotated[int, typer.Option(min=1, help="How many of the sequences only measure.")] = 8,
    renormalise: Annotated[
        bool | None,
        typer.Option("--renormalise/--no-renormalise", help="Let the experts left take over the weight of the skipped ones. "
                     "Default: as the policy's paper, which is yes except for modes, dynamic-bits and compressed-experts."),
    ] = None,
    protect: Annotated[
        float | None,
        typer.Option(min=0, max=0.99, help="Share of tokens, those that get most attention, that lose no expert. "
                     "Default: as the policy's paper, which is 0.02 for odp and none for the others."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="otp and compressed-experts: training steps; 200 if not given.")] = None,
    main: Annotated[int | None, typer.Option(min=1, help="compressed-experts: experts of a token that compute; half of them if not given.")] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", help="Measure KL to this model, before and after. Default: to MODEL waking all experts."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Also load the whole model and time one-token decoding at every point.")
    ] = True,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Skip the chosen experts whose weight is small: fewer products for a token, with the weights as they are.

    The thresholds are tuned on text for a share of skipped calls, and KL is measured on other sequences of it: for the share
    that --skip says and half of it, or for growing shares until --max-kl is passed. The curve of share, KL and speed is shown.
    The output has the same shards (hard links, where the file system allows) and the policy in config.json. A compressed
    folder applies it when it is loaded; for an ordinary one call
    moecompress.route.apply(model, model.config.moecompress_routing).

    odp drops each expert whose weight is small beside the token's largest; naee all but the first where the second is
    small; top-p what the smallest set reaching a share of the weight does not need; modes by importance of the layer;
    adamoe where the router's logit is under that of null experts; otp by masks that are trained here, against the same
    model waking all experts, which needs it whole and unpacked in memory. dynamic-bits skips none: where the weight is
    small, an expert of nested integers (recipes/matryoshka.yaml) computes on its two highest bits and reads no others.
    compressed-experts computes --main experts of every token and no others; vectors that are trained here, as the masks of
    otp are, stand for the others by changing the inputs of the main ones. Refused if they do not lower the KL of that skipping.

    Examples:

        moecompress tune-routing out -o out-skipping --policy odp --skip 0.15 --text corpus.txt

        moecompress tune-routing out -o out-skipping --policy top-p --max-kl 0.01 --no-speed

        moecompress tune-routing ./model -o routed --policy modes --skip 0.3 --no-renormalise --json

        moecompress tune-routing out -o out-main4 --policy compressed-experts --main 4 --text corpus.txt
    """
    from moecompress.route.folder import route

    if skip is None and max_kl is None and policy != "compressed-experts":
        skip = 0.15
    record = route(model, output, policy, skip, text, sequences, length, heldout, renormalise, reference, dtype, trust_remote_code,
                   max_kl=max_kl, speed=speed, protect=protect, steps=steps, main=main)  # fmt: skip
    if json_:
        print_json(record)
        return
    from rich.console import Console
    from rich.table import Table

    against = "the model waking all experts" if reference is None else reference
    title = f"against {against}, on held-out text"
    what = "calls computed on two bits" if policy == "dynamic-bits" else "calls skipped"
    curve = Table(f"expert {what}", "KL, nats", "95 %", "top-1 agreement", *(["tokens/s"] if speed else []), title=title)
    for row in record["curve"]:
        chosen = row["skipped"] > 0 and row["kl_mean"] == record["after"]["kl_mean"]
        low, high = row.get("kl_interval_95", (row["kl_mean"],) * 2)
        curve.add_row(f"{row['skipped']:.2%}" + (" (kept)" if chosen else ""), f"{row['kl_mean']:.5f}", f"{low:.5f} … {high:.5f}",
                      f"{row.get('top1_agreement', 1):.2%}", *([f"{row['tokens_per_second']:.1f}"] if speed else []))  # fmt: skip
    console = Console(highlight=False)
    console.print(curve)
    if (by := record.get("protected_by")) is not None:
        console.print("protected tokens: " + ", ".join(
            f"by attention received × norm in {n} layers" if how == "attention" else f"by norm alone in {n} layers, whose attention cannot be seen"
            for how, n in by.items()))  # fmt: skip
    if "vectors_bytes" in record:
        console.print(f"vectors, trained in {record['training']['steps']} steps: {size_text(record['vectors_bytes'])}; the row above the kept "
                      "one is the same skipping without them")  # fmt: skip
    did = "computes on two bits" if policy == "dynamic-bits" else "skips"
    console.print(f"{output}: policy {policy} {did} {record['skipped']:.2%} of the expert calls "
                  f"({record['calibration_skipped']:.2%} on the text it was tuned on); perplexity "
                  f"{record['after']['perplexity']:.3f}, of {record['after']['reference_perplexity']:.3f}")  # fmt: skip
