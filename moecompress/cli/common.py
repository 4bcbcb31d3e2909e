"""Options that several commands share, and how results are printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moecompress.errors import UserError

if TYPE_CHECKING:
    from moecompress.recipe import Recipe

Model = Annotated[str, typer.Argument(help="A local folder with config.json and safetensors, or a hub id.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; everything else goes to stderr.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="A YAML recipe (see recipes/).")]
TargetSize = Annotated[str | None, typer.Option("--target-size", help="Size of all weight files, e.g. 80MB or 14GiB.")]
TargetBits = Annotated[
    float | None, typer.Option("--target-bits", help="Stored bits per routed-expert weight, overhead included.")
]
Text = Annotated[
    str | None,
    typer.Option(
        "--text", help="Calibration text: a file or folder (txt, jsonl, parquet), a hub data set, or 'builtin'."
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Change a recipe setting, e.g. --set quantize.hessian=g (repeatable).")
]
Granularity = Annotated[
    str | None,
    typer.Option("--granularity", help="expert, projection or layer: what may differ, for the runtime you target."),
]
HarmFrom = Annotated[
    str | None,
    typer.Option("--harm", help="Where sensitivities come from: forward (default, one layer in memory at a time), or gradient: squared "
                 "gradients through the whole model, which must fit into memory."),
]  # fmt: skip
Resume = Annotated[
    bool,
    typer.Option(
        "--resume/--fresh", help="Go on behind the last finished layer of a killed run (default), or start over."
    ),
]
LoadBits = Annotated[
    int | None, typer.Option("--load-bits", help="Load nested matrices at fewer bits than the file has (recipes/matryoshka.yaml).")
]
MaxKl = Annotated[
    float | None, typer.Option("--max-kl", min=0, help="Stop if the result is further from the original: nats, default 2.")
]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that the model folder brings. Only if you trust it."),
]


def recipe_of(path: Path | None, size: str | None = None, bits: float | None = None, text: str | None = None,
              granularity: str | None = None, overrides: list[str] | None = None, harm: str | None = None) -> Recipe:  # fmt: skip
    """The recipe file (or the defaults) with what the command line says on top."""
    from moecompress.recipe import load_recipe, recipe_from

    if size is not None and bits is not None:
        raise UserError("Two targets", expected="--target-size or --target-bits", got="both", remedy="leave one out")
    changes = list(overrides or [])
    if size is not None:
        changes += ["target.bits=null", f"target.size={size}"]
    if bits is not None:
        changes += ["target.size=null", f"target.bits={bits}"]
    if text is not None:
        changes.append(f"calibration.text={json.dumps(text)}")
    if granularity is not None:
        changes.append(f"allocate.granularity={granularity}")
    if harm is not None:
        changes.append(f"allocate.harm={harm}")
    return load_recipe(path, changes) if path is not None else recipe_from(changes)


def refuse_steps(recipe: Recipe, command: str) -> None:
    """For commands that look at one model, and do not make another first."""
    if recipe.transform:
        raise UserError(f"moecompress {command} does not run the recipe's transform steps", expected="a recipe without them",
                        got=", ".join(step.method for step in recipe.transform),
                        remedy="run `moecompress prune` with the recipe, then this on its result with --set transform=[]; or let "
                        "`moecompress quantize --dry-run` do both")  # fmt: skip


def without_tensors(record: dict, output: Path) -> dict:
    """What a command shows of a record: all but the fate of every tensor."""
    return {key: value for key, value in record.items() if key != "tensors"} | {"output": str(output)}


def print_json(record: Any) -> None:
    json.dump(record, sys.stdout, default=str)
    sys.stdout.write("\n")


def size_text(count: float) -> str:
    """Decimal units, as --target-size reads them."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
