"""moecompress quantize: a checkpoint and a byte budget in, a smaller checkpoint with its proof out."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moecompress.cli.common import (
    Granularity,
    HarmFrom,
    Json,
    Model,
    Overrides,
    RecipeFile,
    Resume,
    TargetBits,
    TargetSize,
    Text,
    Trust,
    print_json,
    size_text,
)  # fmt: skip
from moecompress.cli.prune import print_steps


class Repair(StrEnum):
    """What --repair may train."""

    router = "router"


def command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The compressed folder; must not exist or be empty.")],
    target_size: TargetSize = None,
    target_bits: TargetBits = None,
    recipe: RecipeFile = None,
    text: Text = None,
    granularity: Granularity = None,
    harm: HarmFrom = None,
    overrides: Overrides = None,
    allow_fallback: Annotated[
        bool, typer.Option("--allow-fallback", help="Round an expert to nearest when its Hessian fails, and say so.")
    ] = False,
    repair: Annotated[
        Repair | None,
        typer.Option("--repair", help="router: train the routers' weights on the calibration text to follow the original again, and keep "
                     "them if that helps on held-out text. Needs memory for the whole packed model, disk for a hidden state of every token."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop after the plan.")] = False,
    resume: Resume = True,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Compress a Mixture-of-Experts checkpoint to a byte budget.

    Calibrates, allocates bits to every expert matrix, quantizes layer by layer with one layer in memory, compares the plan
    with a uniform one of the same bytes on held-out text and keeps the better, then loads the result again and measures it.
    A recipe may have experts dropped or merged before (transform), and have some skipped at run time (route): size and bits
    are of the final result, and all is measured against the original.
    The output folder appears only when it is complete and verified. Killed? Run the same command again.

    Examples:

        moecompress quantize ./model -o out --target-size 14GB

        moecompress quantize ./model -o out --target-bits 2.5 --text corpus.jsonl

        moecompress quantize ./model -o out --recipe recipes/small-2bit.yaml --set quantize.hessian=g --dry-run

        moecompress quantize ./model -o out --recipe recipes/reap.yaml --target-size 8GB

        moecompress quantize ./model -o out --target-bits 2 --repair router --set repair.steps=200
    """
    from moecompress import pipeline
    from moecompress.cli.common import recipe_of

    changes = [*(overrides or []), *(["quantize.allow_fallback=true"] if allow_fallback else []),
               *(["repair.router=true"] if repair else [])]  # fmt: skip
    pipeline.refuse_target(output)
    job = pipeline.make_job(
        model, recipe_of(recipe, target_size, target_bits, text, granularity, changes, harm), trust_remote_code
    )
    result = pipeline.quantize(job, output, fresh=not resume, dry_run=dry_run)
    record = summary(result)
    if json_:
        print_json(record)
    else:
        _print(result, record)


def summary(result) -> dict:
    manifest = result.manifest
    record = {
        "output": str(result.folder) if result.folder else None,
        "chosen": result.chosen,
        "predicted_kl": result.plan.harm,
        "plan_bytes": result.plan.bytes,
        "measured": result.measured,
        "unreached_experts": [f"L{layer:02d}.E{expert:03d}" for layer, expert in result.statistics.unreached()],
    }
    found = manifest.get("prediction")
    record["prediction"] = None if found is None else {key: value for key, value in found.items() if key != "units"} | {"units": len(found["units"])}
    for key in ("bits_per_weight", "total_bytes", "input_bytes", "fallbacks", "steps", "repair", "routing", "dictionary"):
        record[key] = manifest.get(key)
    return record


def _print(result, record: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    print_steps(console, record["steps"] or [])
    console.print(result.plan.table())
    if result.folder is None:
        console.print("dry run: nothing was written")
        return
    table = Table(
        "on held-out calibration text",
        "KL (nats)",
        "95 %",
        "99th percentile",
        "top-1 agreement",
        "perplexity",
        "original's",
    )
    for label, row in result.measured.items():
        low, high = row["kl_interval_95"]
        if label.startswith("plan_minus_"):
            table.add_row(f"plan − {label.removeprefix('plan_minus_')}", f"{row['kl_mean']:+.5f}", f"{low:+.5f} … {high:+.5f}", "", "", "", "")
        else:
            table.add_row(label + (" (kept)" if label == result.chosen else ""), f"{row['kl_mean']:.5f}", f"{low:.5f} … {high:.5f}",
                          f"{row['kl_p99']:.4f}", f"{row['top1_agreement']:.2%}", f"{row['perplexity']:.3f}",
                          f"{row['reference_perplexity']:.3f}")  # fmt: skip
    console.print(table)
    console.print(f"{result.folder}: {size_text(record['total_bytes'])} of {size_text(record['input_bytes'])}, "
                  f"{record['bits_per_weight']:.3f} bits per expert weight{' of the original' if record['steps'] else ''}, everything counted")  # fmt: skip
    if record["dictionary"]:
        words = record["dictionary"]
        console.print(f"dictionary code: {words['stored_bits']:.3f} bits a weight beside its levels, {words['entropy_bits']:.3f} at the entropy of its trits")
    if record["repair"]:
        repair = record["repair"]
        before, after = (repair[key]["kl_mean"] for key in ("before", "after"))
        best = min([row["kl_mean"] for row in repair["history"]], default=before)
        console.print(f"routers repaired in {repair['steps']} steps: KL {before:.5f} → {after:.5f} nats" if repair["kept"] else
                      f"routers not repaired: {repair['steps']} steps never brought KL below {before:.5f} nats (best {best:.5f}); they are as before")
    if record["routing"]:
        skips, after = record["routing"], record["routing"]["after"]
        if skips.get("vectors_bytes"):
            console.print(f"vectors of compressed experts: {size_text(skips['vectors_bytes'])}; KL {skips['curve'][0]['kl_mean']:.5f} → "
                          f"{skips['curve'][1]['kl_mean']:.5f} nats to the quantized model" + ("" if skips["kept"] else "; left out"))  # fmt: skip
        if skips.get("kept", True):
            console.print(f"policy {skips['policy']} skips {skips['skipped']:.2%} of the expert calls: KL {after['kl_mean']:.5f} nats to "
                          f"the original, perplexity {after['perplexity']:.3f}")  # fmt: skip
    if record["prediction"] and record["prediction"]["off"]:
        ratios = ", ".join(f"{scheme} {record['prediction']['ratio'][scheme]:.2f}" for scheme in record["prediction"]["off"])
        console.print(f"[yellow]predicted errors are off[/yellow] (median of measured ÷ predicted over {record['prediction']['units']} "
                      f"matrices): {ratios}; `moecompress report` shows them")  # fmt: skip
    if record["fallbacks"]:
        console.print(
            f"[yellow]rounded to nearest because their Hessian failed:[/yellow] {', '.join(record['fallbacks'])}"
        )
    if record["unreached_experts"]:
        console.print(
            f"no calibration token reached: {', '.join(record['unreached_experts'])} (quantized on the layer's pooled statistics)"
        )
