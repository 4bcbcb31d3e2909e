"""moecompress calibrate: routing and calibration statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moecompress.cli.common import HarmFrom, Json, Model, Overrides, RecipeFile, Text, Trust, print_json


def command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the statistics.")],
    text: Text = None,
    recipe: RecipeFile = None,
    harm: HarmFrom = None,
    overrides: Overrides = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Run calibration text through the original model; report how experts are used and how sensitive layers are.

    `moecompress plan --stats` reads the result, so several plans cost one calibration.

    Examples:

        moecompress calibrate ./model -o stats --text corpus.txt

        moecompress calibrate ./model -o stats --set calibration.sequences=256 --set calibration.length=2048
    """
    from moecompress import pipeline
    from moecompress.cli.common import recipe_of, refuse_steps

    pipeline.refuse_target(output)
    made = recipe_of(recipe, text=text, overrides=overrides, harm=harm)
    refuse_steps(made, "calibrate")
    job = pipeline.make_job(model, made, trust_remote_code)
    work = pipeline.work_folder(output)
    pipeline.open_work(work, job.fingerprint(), fresh=False)
    statistics = pipeline.calibrate(job, work / "calibrate")
    statistics.save(work / "out")
    if output.exists():
        output.rmdir()
    (work / "out").rename(output)
    import shutil

    shutil.rmtree(work)
    layout = next(iter(job.opened.anatomy.moe.values())).layout
    rows = statistics.coverage(max(layout.hidden, layout.width))
    unreached = [f"L{layer:02d}.E{expert:03d}" for layer, expert in statistics.unreached()]
    if json_:
        print_json({"output": str(output), "tokens": int(job.calibration.mask.sum()), "coverage": rows, "unreached": unreached,
                    "sensitivity": {str(i): s.sensitivity for i, s in statistics.layers.items()}})  # fmt: skip
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "tokens of an expert: least", "median", "most", "unreached", "thin", "sensitivity",
                  title=f"{int(job.calibration.mask.sum()):,} calibration tokens")  # fmt: skip
    for row in rows:
        table.add_row(*(f"{row[key]:,}" for key in ("layer", "least", "median", "most", "unreached", "thin")),
                      f"{statistics.layers[row['layer']].sensitivity:.3g}")  # fmt: skip
    console = Console()
    console.print(table)
    if unreached:
        console.print(f"no token reached {len(unreached)} experts: {', '.join(unreached)}")
