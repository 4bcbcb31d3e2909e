"""moecompress slim: thinner experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moecompress.cli.common import Json, Model, Overrides, RecipeFile, Resume, Text, Trust, print_cost, print_json


def command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The new folder; must not exist or be empty.")],
    width: Annotated[
        float, typer.Option("--width", min=0, help="Neurons that every expert keeps: a share below 1, or a number.")
    ] = 0.75,
    score: Annotated[
        str, typer.Option("--score", help="What neurons are kept by: greedy, activation, slimmoe (gradients) or random.")
    ] = "greedy",
    repair: Annotated[
        bool, typer.Option("--repair/--no-repair", help="Refit each down matrix on its calibration activations.")
    ] = True,
    text: Text = None,
    recipe: RecipeFile = None,
    overrides: Overrides = None,
    resume: Resume = True,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Make every expert thinner; the result is an ordinary checkpoint of the same family with narrower experts.

    Each expert keeps its best neurons, as many as every other, and its down matrix is refitted by least squares to make up
    for the others. Each layer is decided on what the changed layers before it deliver, then the whole is loaded again and
    compared with the original on held-out text. Shared experts and dense layers stay. greedy leaves out, again and again, the
    neurons that the others replace best; activation keeps those that add most energy to the output, for use without repair;
    slimmoe keeps those with the largest |weight · gradient|, and needs the whole model and the gradients of its experts in
    memory. The result can be quantized or pruned like any model.

    Examples:

        moecompress slim ./model -o thin --width 0.75 --text corpus.jsonl

        moecompress slim ./model -o thin --width 512 --score slimmoe

        moecompress slim ./model -o thin --width 0.5 --score activation --no-repair --json
    """
    from moecompress import pipeline
    from moecompress.cli.common import recipe_of
    from moecompress.transform.slim import Slimming

    pipeline.refuse_target(output)
    made = recipe_of(recipe, text=text, overrides=overrides)
    job = pipeline.make_job(model, made, trust_remote_code)
    request = Slimming.of(job.opened, score, width, repair, made.quantize.damping, made.compute.seed)
    record = pipeline.slim(job, request, output, fresh=not resume)
    shown = {key: value for key, value in record.items() if key != "tensors"} | {"output": str(output)}
    if json_:
        print_json(shown)
    else:
        _print(shown)


def _print(record: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("layer", "mean error", "largest error", "without tokens",
                  title=f"slim: {record['count']} of {record['width']} neurons, score {record['score']}"
                  + ("" if record["repair"] else ", not repaired"))  # fmt: skip
    for layer, made in record["experts"].items():
        error, worst = made["error"], max(range(len(made["error"])), key=made["error"].__getitem__)
        table.add_row(layer, f"{sum(error) / len(error):.3f}", f"{error[worst]:.3f} (expert {worst})", str(made["tokens"].count(0)))
    console.print(table)
    console.print("error: of the experts' outputs on calibration tokens, squared, relative to their squared size")
    print_cost(record)
