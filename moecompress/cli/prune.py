"""moecompress prune: fewer experts, dropped or merged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moecompress.cli.common import (
    Json,
    MaxKl,
    Model,
    Overrides,
    RecipeFile,
    Resume,
    Text,
    Trust,
    print_json,
    size_text,
    without_tensors,
)
from moecompress.errors import UserError


def command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The new folder; must not exist or be empty.")],
    method: Annotated[
        str | None,
        typer.Option("--method", help="Drop by reap (default), ean, frequency, naee or random; merge by m-smoe, hc-smoe or ream."),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option("--keep", min=0, help="Experts that every layer keeps: a share below 1 (default 0.5), or a number."),
    ] = None,
    protect: Annotated[
        list[str] | None, typer.Option("--protect", help="An expert that must stay, e.g. L03.E017 (repeatable).")
    ] = None,
    max_kl: MaxKl = None,
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
    the router rows of the experts that others merge into. A recipe's transform steps stand in for --method and its options;
    `moecompress quantize` runs them too, before it quantizes.

    Examples:

        moecompress prune ./model -o half --method reap --keep 0.5 --text corpus.jsonl

        moecompress prune ./model -o six --method naee --keep 6 --protect L03.E007

        moecompress prune ./model -o merged --recipe recipes/ream.yaml --json
    """
    from moecompress import pipeline
    from moecompress.cli.common import recipe_of
    from moecompress.progress import notice
    from moecompress.prune import prune
    from moecompress.recipe import step_from

    pipeline.refuse_target(output)
    made = recipe_of(recipe, text=text, overrides=overrides)
    options: dict[str, Any] = {"method": method, "keep": keep, "protect": protect or None, "max_kl": max_kl}
    options = {name: value for name, value in options.items() if value is not None}
    if not made.transform:
        made = made.model_copy(update={"transform": (step_from({"method": "reap", "keep": 0.5} | options),)})
    elif options:
        raise UserError("Steps from two sides", expected="a recipe with transform steps, or options",
                        got="both: " + ", ".join(f"--{name.replace('_', '-')}" for name in options),
                        remedy="leave the options out, or add --set transform=[]")  # fmt: skip
    if made.route.policy != "none":
        notice("the recipe's routing policy is for quantized models; here run `moecompress tune-routing` on the result")
    show(prune(pipeline.make_job(model, made, trust_remote_code), output, fresh=not resume), output, json_)


def show(record: dict, output: Path, json_: bool) -> None:
    """What was done, but the fate of every tensor."""
    shown = without_tensors(record, output)
    if json_:
        print_json(shown)
    else:
        _print(shown)


def _print(record: dict) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    print_steps(console, record["steps"])
    row = record["heldout"]
    console.print(f"top-1 agreement {row['top1_agreement']:.2%}, perplexity {row['perplexity']:.3f} (original "
                  f"{row['reference_perplexity']:.3f})")  # fmt: skip
    console.print(f"{record['output']}: {size_text(record['total_bytes'])} of {size_text(record['input_bytes'])}")


def print_steps(console: Any, steps: list[dict]) -> None:
    """What became of the experts of every layer, and what each step cost."""
    from rich.table import Table

    for step in steps:
        if "training" in step:
            _print_training(console, step)
            continue
        table = Table("layer", "dropped", "merged into", "error of the experts' output", title=_title(step))
        for layer, made in step["experts"].items():
            target = made.get("target", [])  # steps that keep all experts have none
            kept = made["kept"] if target else []
            dropped = [str(e) for e, new in enumerate(target) if new < 0]
            groups = {k: [str(e) for e, t in enumerate(target) if t == new and e != k] for new, k in enumerate(kept)}
            merged = "; ".join(f"{' '.join(members)} → {k}" for k, members in groups.items() if members)
            table.add_row(layer, " ".join(dropped) or "–", merged or "–", f"{made['output_error']:.1%}")
        console.print(table)
        _print_kl(console, step["heldout"])


def _print_training(console: Any, step: dict) -> None:
    made = step["training"]
    console.print(f"{_title(step)}: {made['steps']} steps, {made['seconds']:.0f} s; "
                  + (f"best at step {made['best_step']}" if made["kept"] else "undone: nothing was better on held-out text"))  # fmt: skip
    console.print(f"before: KL {made['before']['kl_mean']:.5f} nats")
    _print_kl(console, step["heldout"])


def _print_kl(console: Any, row: dict) -> None:
    low, high = row["kl_interval_95"]
    console.print(f"on held-out text: KL {row['kl_mean']:.5f} nats to the original (95 %: {low:.5f} … {high:.5f})")


def _title(step: dict) -> str:
    said = step["step"]
    if "training" in step:
        return f"distill, {said['train']}"
    first = next(iter(step["experts"].values()))
    if "target" in first:
        return f"{said['method']}: {len(first['kept'])} experts a layer, of {len(first['target'])}"
    others = {name: f"{value:g}" if isinstance(value, float) else value for name, value in said.items() if name != "method"}
    return ", ".join([said["method"], *(f"{name} {value}" for name, value in others.items())])
