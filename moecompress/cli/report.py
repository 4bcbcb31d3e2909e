"""moecompress report: one HTML file that shows what compression did."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moecompress.cli.common import Json, print_json, size_text

Evaluation = Annotated[
    list[Path] | None,
    typer.Option("--evaluation", help="File made by `moecompress evaluate -o`, of this model or another (repeatable)."),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="The HTML file. Default: beside the folder, with its name.")
]


def command(
    model: Annotated[Path, typer.Argument(help="A folder made by `moecompress quantize`.")],
    evaluation: Evaluation = None,
    output: Output = None,
    json_: Json = False,
) -> None:
    """Show what compression did, in one HTML file: sizes, divergence, expert use, bits, errors, fates of tensors.

    The file needs no network and nothing beside it.

    Examples:

        moecompress report out

        moecompress report out --evaluation wikitext.json --evaluation other.json -o report.html
    """
    from moecompress.report import write_report

    path = write_report(model, evaluation or [], output)
    if json_:
        print_json({"output": str(path), "bytes": path.stat().st_size})
    else:
        typer.echo(f"{path}: {size_text(path.stat().st_size)}")
