"""moecompress inspect: what a checkpoint is, before anything is done to it."""

from __future__ import annotations

from typing import Annotated

import typer

from moecompress.cli.common import Json, Trust, print_json, size_text


def command(
    model: Annotated[str | None, typer.Argument(help="A local folder or a hub id.")] = None,
    families: Annotated[
        bool, typer.Option("--families", help="List the model families and whether they pass the tests here.")
    ] = False,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Families, layers, experts, top-k, bytes by role, and what each bit-width would weigh.

    Reads headers only, so it is quick on any size.

    Examples:

        moecompress inspect ./Qwen3-30B-A3B

        moecompress inspect allenai/OLMoE-1B-7B-0924 --json

        moecompress inspect --families
    """
    from moecompress.errors import UserError

    if families:
        from moecompress.model.families import table

        rows = table()
        if json_:
            print_json({"families": rows})
        else:
            _print_families(rows)
        return
    if model is None:
        raise UserError("Nothing to inspect", expected="a model folder, a hub id, or --families")
    record = describe(model, trust_remote_code)
    if json_:
        print_json(record)
    else:
        _print(record)


def describe(model: str, trust_remote_code: bool = False) -> dict:
    from moecompress.allocate.candidates import Candidate
    from moecompress.model.checkpoint import resolve
    from moecompress.model.walk import OpenModel
    from moecompress.pack.manifest import FOLDER, MANIFEST, read_manifest
    from moecompress.runtime.loading import is_packed, prepare

    folder = resolve(model)
    opened = OpenModel(folder, None, trust_remote_code, prepare=prepare(folder))
    anatomy = opened.anatomy
    roles = anatomy.bytes_by_role()
    rest = sum(size for role, size in roles.items() if role != "expert")
    widths = {}
    for name in ("t0_5", "t1", "t1_5", "t2", "t2_5", "t3", "t4", "b2g64s", "b3g64s", "b4g64s", "b8g128s", "b16"):
        candidate = Candidate.parse(name)
        experts = sum(
            moe.layout.experts * candidate.price(*moe.layout.shape(p), opened.stored_dtype.itemsize)
            for moe in anatomy.moe.values()
            for p in moe.layout.projections
        )
        widths[name] = {"expert_bytes": experts, "total_bytes": experts + rest,
                        "bits_per_weight": 8 * experts / anatomy.expert_weights}  # fmt: skip
    layouts = [moe.layout for moe in anatomy.moe.values()]
    return {
        "model": str(model),
        "model_type": anatomy.model_type,
        "architecture": anatomy.architecture,
        "dtype": str(opened.stored_dtype).removeprefix("torch."),
        "layers": anatomy.num_layers,
        "moe_layers": len(anatomy.moe),
        "experts": max(layout.experts for layout in layouts),
        "top_k": anatomy.top_k,
        "hidden": layouts[0].hidden,
        "expert_width": max(layout.width for layout in layouts),
        "expert_weights": anatomy.expert_weights,
        "tensors": len(anatomy.tensors),
        "total_bytes": opened.checkpoint.nbytes,
        "bytes_by_role": roles,
        "widths": widths,
        "compressed": is_packed(folder),
        "left_out": read_manifest(folder).get("left_out", {}) if (folder / FOLDER / MANIFEST).exists() else {},
    }


def _print(record: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False)
    out.print(f"[bold]{record['architecture']}[/bold] ({record['model_type']}, {record['dtype']}): {record['layers']} layers, "
              f"{record['moe_layers']} with {record['experts']} experts of width {record['expert_width']}, top-{record['top_k']}, "
              f"hidden {record['hidden']}; {record['tensors']} tensors, {size_text(record['total_bytes'])}")  # fmt: skip
    roles = Table("role", "bytes", "share")
    for role, size in record["bytes_by_role"].items():
        roles.add_row(role, size_text(size), f"{size / record['total_bytes']:.1%}")
    out.print(roles)
    for layer, experts in record["left_out"].items():
        out.print(f"layer {layer}: " + "; ".join(f"expert {expert} {word}" for expert, word in experts.items()))
    if record["compressed"]:
        return
    widths = Table("experts stored as", "bits per weight", "experts", "whole model, rest as it is")
    for name, row in record["widths"].items():
        widths.add_row(
            name, f"{row['bits_per_weight']:.3f}", size_text(row["expert_bytes"]), size_text(row["total_bytes"])
        )
    out.print(widths)


def _print_families(rows: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("family", "experts class", "tiny checkpoint passes", "note")
    for row in rows:
        table.add_row(row["family"], row["experts_class"], "yes" if row["passes"] else "no", row["note"])
    Console().print(table)
