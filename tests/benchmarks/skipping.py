"""Do skipped experts save time? Tokens per second of one-token decoding on a random checkpoint, dense and packed, by share skipped.

    python tests/benchmarks/skipping.py                       # 1.7 GB
    python tests/benchmarks/skipping.py --hidden 2048 --width 768 --experts 64 --top-k 8    # fine-grained

Everything by the commands that users have: `moecompress quantize` (integers of 4 bits, rounded to nearest: the quality of random weights says
nothing) and `moecompress tune-routing --policy odp`, which measures all experts and fewer in turns, on the same text. "gain" is how much more tokens
per second there are; "of the possible" over what removing that share of all the time of a token would give, 1/(1 − skipped) − 1. The experts' share of
the weights read for a token bounds it, and packed experts are a smaller share of the time than of the weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from memory import Size, make  # beside this file
from typer.testing import CliRunner

SHARES = (0.15, 0.3, 0.45)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=2048, help="of an expert")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where checkpoints are made and kept (default: a temporary folder)")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    size = Size(given.layers, given.hidden, given.width, given.experts, given.top_k, 4096, 8, 128, 4)
    with tempfile.TemporaryDirectory() as temporary:
        work = given.folder or Path(temporary)
        dense, packed = work / "dense", work / "packed"
        if not dense.exists():
            make(dense, size)
        if not packed.exists():
            run("quantize", dense, "-o", packed, "--target-bits", "4.25", "--set", "quantize.method=rtn", "--set", "allocate.allocator=uniform",
                "--set", "allocate.candidates=[{bits: 4, group: 64}]", "--set", "allocate.compare=none", "--set", "calibration.sequences=10",
                "--set", "calibration.heldout=2", "--set", "calibration.length=128", "--set", "compute.dtype=bfloat16")  # fmt: skip
        rows = [row for folder in (dense, packed) for row in curve(folder, size, work)]
    if given.json:
        print(json.dumps(rows))


def curve(folder: Path, size: Size, work: Path) -> list[dict]:
    """Rows of one checkpoint, all measured in one process for each share."""
    print(f"\n{folder.name}: {share_of_experts(size):.0%} of the weights that a token reads are experts'\n\n"
          "| skipped | tokens/s, all | tokens/s | gain | of the possible |\n|---:|---:|---:|---:|---:|", flush=True)  # fmt: skip
    rows = []
    for share in SHARES:
        with tempfile.TemporaryDirectory(dir=work) as out:
            found = run("tune-routing", folder, "-o", Path(out) / "routed", "--policy", "odp", "--skip", str(share), "--protect", "0",
                        "--sequences", "16", "--length", "128", "--speed")  # fmt: skip
        whole, one = found["curve"][0], found["curve"][-1]
        gain = one["tokens_per_second"] / whole["tokens_per_second"] - 1
        possible = 1 / (1 - one["skipped"]) - 1
        rows.append({"folder": folder.name, "skipped": one["skipped"], "gain": gain, "of_possible": gain / possible,
                     "tokens_per_second": one["tokens_per_second"], "tokens_per_second_all": whole["tokens_per_second"]})  # fmt: skip
        print(f"| {one['skipped']:.1%} | {whole['tokens_per_second']:.2f} | {one['tokens_per_second']:.2f} | {gain:+.1%} "
              f"| {gain / possible:.2f} |", flush=True)  # fmt: skip
    return rows


def share_of_experts(size: Size) -> float:
    experts = 3 * size.top_k * size.width * size.hidden
    return experts * size.layers / ((experts + 4 * size.hidden**2) * size.layers + size.vocabulary * size.hidden)


def run(*words: object) -> dict:
    """A command's JSON."""
    from moecompress.cli import app

    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    if done.exit_code:
        raise SystemExit(done.output)
    return json.loads(done.stdout)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
