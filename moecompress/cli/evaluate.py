"""moecompress evaluate: what compression cost, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moecompress.cli.common import Json, LoadBits, Model, Trust, print_json, size_text


def command(
    model: Model,
    reference: Annotated[str, typer.Option("--reference", help="The original model: a folder or a hub id.")],
    text: Annotated[
        str, typer.Option("--text", help="Text that calibration has not seen: file, folder, hub data set or 'builtin'.")
    ],
    sequences: Annotated[int, typer.Option(min=2, help="How many sequences of the text to use.")] = 64,
    length: Annotated[int, typer.Option(min=8, help="Context length in tokens.")] = 512,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Also load the model and time one-token decoding.")
    ] = True,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON record here.")] = None,
    load_bits: LoadBits = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Divergence from the original, perplexity, agreement of tokens and routing, size, speed and memory.

    Both models are walked one layer at a time, so this works for models larger than memory (with --no-speed).

    Examples:

        moecompress evaluate out --reference ./model --text wikitext2-test.txt

        moecompress evaluate out --reference ./model --text heldout.jsonl --length 2048 --sequences 32 --json
    """
    from moecompress.evaluate.report import evaluate

    record = evaluate(model, reference, text, sequences, length, dtype, speed, trust_remote_code, load_bits)
    if output is not None:
        import json

        output.write_text(json.dumps(record, indent=1), encoding="utf-8")
    if json_:
        print_json(record)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "measure",
        "value",
        title=f"{model} against {reference}: {record['sequences']} × {record['context_length']} tokens of {text}",
    )
    low, high = record["kl_interval_95"]
    rows = [
        ("KL(original ‖ compressed), mean", f"{record['kl_mean']:.5f} nats (95 %: {low:.5f} … {high:.5f})"),
        ("KL, 99th percentile", f"{record['kl_p99']:.4f}"),
        ("top-1 agreement", f"{record['top1_agreement']:.2%}"),
        (
            "router agreement (Jaccard)",
            f"{record['router_agreement']:.2%}" if record["router_agreement"] is not None else "–",
        ),
        ("perplexity", f"{record['perplexity']:.3f} (original {record['reference_perplexity']:.3f})"),
        ("bits per expert weight", f"{record['bits_per_weight']:.3f}"),
        ("size", f"{size_text(record['total_bytes'])} (original {size_text(record['reference_bytes'])})"),
    ]
    if speed:
        rows += [
            ("one-token decoding", f"{record['tokens_per_second']:.1f} tokens/s"),
            ("peak memory", size_text(record["peak_memory_bytes"])),
        ]
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)
