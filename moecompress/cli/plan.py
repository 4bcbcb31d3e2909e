"""moecompress plan: the allocation, before anything is compressed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moecompress.cli.common import (
    Granularity,
    HarmFrom,
    Json,
    Overrides,
    RecipeFile,
    TargetBits,
    TargetSize,
    Text,
    Trust,
    print_json,
)


def command(
    model: Annotated[str | None, typer.Argument(help="A local folder or a hub id.")] = None,
    target_size: TargetSize = None,
    target_bits: TargetBits = None,
    stats: Annotated[
        Path | None, typer.Option("--stats", help="Folder made by `moecompress calibrate` (else calibrates now).")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan as JSON.")] = None,
    allocator: Annotated[str | None, typer.Option("--allocator", help="global, pmq (MC-MoE) or uniform.")] = None,
    granularity: Granularity = None,
    harm: HarmFrom = None,
    text: Text = None,
    recipe: RecipeFile = None,
    overrides: Overrides = None,
    from_factors: Annotated[
        Path | None, typer.Option("--from-factors", help="Published factors (JSON) instead of a model.")
    ] = None,
    layer_bits: Annotated[
        float | None, typer.Option("--layer-bits", help="pmq: total bits of 8 experts of a layer.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="pmq: exponent of the token share.")] = 1.0,
    beta: Annotated[float, typer.Option(help="pmq: exponent of the mean routing weight.")] = 1.5,
    gamma: Annotated[float, typer.Option(help="pmq: exponent of the block error.")] = 1.0,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Choose bits for every expert matrix under a byte budget; shows bytes, predicted harm, and the uniform plan beside it.

    Examples:

        moecompress plan ./model --target-size 80MB

        moecompress plan ./model --target-bits 2.5 --granularity projection -o plan.json

        moecompress plan --from-factors factors.json --allocator pmq --layer-bits 16 --json
    """
    from moecompress.errors import UserError

    if allocator not in (None, "global", "pmq", "uniform"):
        raise UserError(f"Unknown allocator {allocator!r}", expected="global, pmq or uniform")
    if from_factors is not None:
        from moecompress.allocate.pmq import solve_factors

        solved = solve_factors(from_factors, allocator=allocator or "pmq",  # type: ignore[arg-type]
                               layer_bits=layer_bits, target_bits=target_bits,
                               alpha=alpha, beta=beta, gamma=gamma)  # fmt: skip
        if json_:
            print_json(solved)
        else:
            _print_factors(solved)
        return
    if model is None:
        raise UserError("Nothing to plan for", expected="a model, or --from-factors FILE")
    from moecompress import pipeline, plans
    from moecompress.calibrate.statistics import Statistics
    from moecompress.cli.common import recipe_of, refuse_steps

    changes = list(overrides or [])
    if allocator is not None:
        changes.append(f"allocate.allocator={allocator}")
    if layer_bits is not None:
        changes.append(f"allocate.layer_bits={layer_bits}")
    if allocator == "pmq":
        changes += [f"allocate.alpha={alpha}", f"allocate.beta={beta}", f"allocate.gamma={gamma}"]
    made_recipe = recipe_of(recipe, target_size, target_bits, text, granularity, changes, harm)
    refuse_steps(made_recipe, "plan")
    job = pipeline.make_job(model, made_recipe, trust_remote_code)
    if stats is not None:
        statistics = Statistics.load(stats)
        wanted = [scheme.name for scheme in job.schemes]
        if statistics.schemes != wanted:
            raise UserError("The statistics were made for other candidates", expected=wanted, got=statistics.schemes,
                            remedy="calibrate again with this recipe")  # fmt: skip
        if harm is not None and statistics.harm != harm:
            raise UserError("The statistics have other sensitivities", expected=f"those of --harm {harm}", got=statistics.harm,
                            remedy="calibrate again with --harm, or leave it out here")  # fmt: skip
    else:
        import tempfile

        with tempfile.TemporaryDirectory() as work:
            statistics = pipeline.calibrate(job, Path(work) / "calibrate")
    made, _ = plans.plan(job, statistics)
    if output is not None:
        output.write_text(made.to_json(), encoding="utf-8")
    extra = plans.index_bytes(job.opened.anatomy) + plans.shared_bytes_of(job.opened.anatomy, made)
    record = {
        "allocator": made.allocator, "granularity": made.granularity, "bytes": made.bytes,
        "bits_per_weight": 8 * (made.bytes + extra) / job.opened.anatomy.expert_weights,
        "total_bytes": plans.written_bytes(job, made), "predicted_kl": made.harm, "gap": made.gap,
        "controls": {name: {"bytes": c.bytes, "predicted_kl": c.harm} for name, c in made.controls.items()},
        "plan": {choice.unit: choice.candidate for choice in made.choices},
    }  # fmt: skip
    if json_:
        print_json(record)
    else:
        from rich.console import Console

        Console().print(made.table())


def _print_factors(solved: dict) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for layer, bits in enumerate(solved["bits"]):
        console.print(f"layer {layer:3d}: {' '.join(map(str, bits))}")
    console.print(f"objective {solved['objective']:.6g}")
