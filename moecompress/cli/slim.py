"""moecompress slim: thinner experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moecompress.cli.common import Json, MaxKl, Model, Overrides, RecipeFile, Resume, Text, Trust


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
    max_kl: MaxKl = None,
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
    from moecompress.cli.prune import show
    from moecompress.errors import UserError
    from moecompress.prune import prune
    from moecompress.recipe import step_from

    pipeline.refuse_target(output)
    made = recipe_of(recipe, text=text, overrides=overrides)
    if made.transform:
        raise UserError("The recipe has transform steps of its own", remedy="run `moecompress prune` with it, or add --set transform=[]")
    options = {"method": "slim", "width": width, "score": score, "repair": repair} | ({} if max_kl is None else {"max_kl": max_kl})
    made = made.model_copy(update={"transform": (step_from(options),)})
    show(prune(pipeline.make_job(model, made, trust_remote_code), output, fresh=not resume), output, json_)
