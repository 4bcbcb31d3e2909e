"""moecompress export: the compressed model in a form that other tools load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moecompress.cli.common import Json, LoadBits, print_json, size_text


def command(
    model: Annotated[Path, typer.Argument(help="A folder made by `moecompress quantize`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The exported folder; must not exist or be empty.")],
    format_: Annotated[
        str, typer.Option("--format", help="dense: ordinary safetensors that plain transformers loads; archive: ternary "
                     "experts at their entropy, for storage; packed: an archive turned back, byte for byte.")
    ] = "dense",
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.")] = "bfloat16",
    load_bits: LoadBits = None,
    json_: Json = False,
) -> None:
    """Write a compressed model in another format.

    Examples:

        moecompress export out -o out-dense --format dense

        moecompress export out -o out-fp16 --dtype float16

        moecompress export out -o out-archive --format archive

        moecompress export out-archive -o out-again --format packed
    """
    from moecompress.export import export

    record = export(model, output, format_, dtype, load_bits)
    if json_:
        print_json(record)
    else:
        typer.echo(
            f"{output}: {size_text(record['total_bytes'])} in {record['shards']} shards, checked against {model}"
        )
