"""moecompress bench: how fast packed experts are on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from moecompress.cli.common import Json, print_json, size_text

SHAPE = "mixtral, qwen3-30b-a3b, olmoe, deepseek-v3, or sizes: 4096x14336:2 (hidden x width : top-k)."


def command(
    shape: Annotated[str, typer.Option(help=SHAPE)] = "qwen3-30b-a3b",
    codes: Annotated[
        str, typer.Option(help="How experts are stored, e.g. b4g64s (integers), b2g64s_o1 (with outliers), t2 or t1_5 (trellis), v2 (vectors), ternary, sign.")
    ] = "t1,t2,t3,ternary,b2g64s,b2g64s_o1,b3g64s,b4g64s,b8g64s",
    batch: Annotated[str, typer.Option(help="Tokens in a step; 1 is what generating text needs.")] = "1,4,16",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; as many as torch uses if not given.")] = None,
    memory: Annotated[float, typer.Option(min=0.1, help="GB that all weights together may take.")] = 4.0,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each kind; medians are reported.")] = 30,
    device: Annotated[str, typer.Option(help="cpu or cuda. On a GPU bfloat16 experts are grouped products.")] = "cpu",
    json_: Json = False,
) -> None:
    """Time the experts of one MoE layer: packed, against bfloat16 and float32.

    A step is gate, up and down projection of the experts that each token chose. Weights come from memory, not from the
    cache, as they do when a model runs. Other work on the machine makes every number worse.

    Examples:

        moecompress bench

        moecompress bench --shape mixtral --codes b4g64s,t2 --batch 1 --threads 2

        moecompress bench --shape 2048x1408:6 --json

        moecompress bench --device cuda --batch 1,16,256 --memory 16
    """
    import torch

    from moecompress.errors import UserError
    from moecompress.evaluate import bench, bench_gpu
    from moecompress.pack.scheme import Scheme

    if device not in ("cpu", "cuda"):
        raise UserError("--device does not take this", expected="cpu or cuda", got=device)
    measure = (bench_gpu if device == "cuda" else bench).measure

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        schemes = [Scheme.parse(name.strip()) for name in codes.split(",")]
        record = {"shape": shape} | measure(_shape(shape), schemes, _numbers("--batch", batch, range(1, 4097)), int(memory * 1e9),
                                            rounds)  # fmt: skip
    finally:
        torch.set_num_threads(before)
    if json_:
        print_json(record)
    else:
        _print(record)


def _numbers(option: str, text: str, allowed) -> list[int]:
    from moecompress.errors import UserError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) in allowed for part in parts):
        known = ", ".join(map(str, allowed)) if len(allowed) < 10 else f"{allowed[0]} to {allowed[-1]}"
        raise UserError(f"{option} does not take this", expected=f"numbers among {known}, with commas", got=text)
    return [int(part) for part in parts]


def _shape(text: str):
    import re

    from moecompress.errors import UserError
    from moecompress.evaluate.bench import SHAPES, Shape

    if text in SHAPES:
        return SHAPES[text]
    sizes = re.fullmatch(r"(\d+)x(\d+):(\d+)", text)
    if sizes is None or not all(int(size) for size in sizes.groups()):
        raise UserError("--shape does not know this", expected=SHAPE, got=text)
    hidden, width, top_k = (int(size) for size in sizes.groups())
    return Shape(hidden, width, max(64, top_k), top_k)


def _print(record: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False)
    bandwidth = record["bandwidth_gigabytes_per_second"]
    out.print(
        f"[bold]{record['shape']}[/bold]: hidden {record['hidden']}, width {record['width']}, "
        f"top-{record['top_k']}; kernels: {record['instruction_set']}, "
        f"{record['threads']} threads; memory reads {bandwidth:.1f} GB/s; {record['experts_in_memory']} experts, "
        f"{size_text(record['weights_bytes'])} of weights in turn, "
        f"cache {size_text(record['last_level_cache_bytes'])}"
    )
    table = Table("batch", "weights", "µs per token", "× bfloat16", "× float32", "GB/s of weights", "of memory speed")
    for row in record["results"]:
        ratios = [row.get(f"times_as_fast_as_{name}") for name in ("bfloat16", "float32")]
        table.add_row(str(row["batch"]), row["weights"], f"{row['microseconds_per_token']:.0f}",
                      *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
                      f"{row['gigabytes_per_second']:.1f}", f"{row['bandwidth_share']:.0%}")  # fmt: skip
    out.print(table)
