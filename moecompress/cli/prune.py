"""moecompress prune: fewer experts, dropped or merged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from moecompress.cli.common import Json, Model, Overrides, RecipeFile, Resume, Text, Trust, print_cost, print_json
from moecompress.errors import UserError


def command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The new folder; must not exist or be empty.")],
    method: Annotated[
        str,
        typer.Option("--method", help="Drop by reap, ean, frequency, naee or random; merge by m-smoe, hc-smoe or ream."),
    ] = "reap",
    keep: Annotated[
        float, typer.Option("--keep", min=0, help="Experts that every layer keeps: a share below 1, or a number.")
    ] = 0.5,
    protect: Annotated[
        list[str] | None, typer.Option("--protect", help="An expert that must stay, e.g. L03.E017 (repeatable).")
    ] = None,
    text: Text = None,
    recipe: RecipeFile = None,
    overrides: Overrides = None,
    resume: Resume = True,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Drop or merge experts; the result is an ordinary checkpoint of the same family with fewer experts in every layer.

    Each layer is decided on what the changed layers before it deliver, then the whole is loaded again and compared with the
    original on held-out text. Calibrate on text like the model's use: what it does not show looks useless. The result can be
    quantized like any model. NAEE searches all subsets where they are few, else backward; m-smoe, hc-smoe and ream keep only
    the router rows of the experts that others merge into.

    Examples:

        moecompress prune ./model -o half --method reap --keep 0.5 --text corpus.jsonl

        moecompress prune ./model -o six --method naee --keep 6 --protect L03.E007

        moecompress prune ./model -o merged --method ream --keep 0.75 --json
    """
    from moecompress import pipeline
    from moecompress.cli.common import recipe_of
    from moecompress.transform.stage import Request

    pipeline.refuse_target(output)
    protected = tuple(_expert(name) for name in protect or [])
    made = recipe_of(recipe, text=text, overrides=overrides)
    job = pipeline.make_job(model, made, trust_remote_code)
    request = Request.of(job.opened, method, keep, protected, made.compute.seed)
    record = pipeline.prune(job, request, output, fresh=not resume)
    shown = {key: value for key, value in record.items() if key != "tensors"} | {"output": str(output)}
    if json_:
        print_json(shown)
    else:
        _print(shown)


def _expert(name: str) -> tuple[int, int]:
    found = re.fullmatch(r"L(\d+)\.E(\d+)", name)
    if found is None:
        raise UserError(f"Not the name of an expert: {name!r}", expected="layer and expert, both from 0, e.g. L03.E017")
    return int(found[1]), int(found[2])


def _print(record: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("layer", "dropped", "merged into", title=f"{record['method']}: {record['keep']} experts a layer")
    for layer, made in record["experts"].items():
        kept, target = made["kept"], made["target"]
        dropped = [str(e) for e, new in enumerate(target) if new < 0]
        groups = {k: [str(e) for e, t in enumerate(target) if t == new and e != k] for new, k in enumerate(kept)}
        merged = "; ".join(f"{' '.join(members)} → {k}" for k, members in groups.items() if members)
        table.add_row(layer, " ".join(dropped) or "–", merged or "–")
    console.print(table)
    print_cost(record)
