"""Fewer and thinner experts, every method at every share: divergence on unseen text before anything is quantized. One table.

    python tests/benchmarks/fewer_experts.py --model DIR --calibration A.txt --evaluation B.txt [--only reap:0.75 slim-greedy:0.75]

A row is what one step of a recipe's ``transform`` leaves, measured as `moecompress evaluate` measures it, in float32. What is behind the
colon is kept: experts of every layer, or neurons of every expert. "plain" merges average weights without lining neurons up.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from texts import parser, read  # beside this file

DROPS = ["reap", "ean", "naee", "frequency", "random"]
MERGES = ["hc-smoe", "ream", "m-smoe", "m-smoe-plain", "ream-plain"]
SLIMS = ["slim-greedy", "slim-activation", "slim-slimmoe", "slim-random"]
METHODS = [f"{method}:{keep}" for keep in (0.75, 0.5) for method in DROPS + MERGES + SLIMS]


def main() -> None:
    given = parser(__doc__, METHODS, 32).parse_args()
    tokens, unseen, reference = read(given)
    rows = []
    if not given.json:
        print("| method | kept | KL | perplexity | top-1 | seconds |\n|---|---:|---:|---:|---:|---:|", flush=True)
    for method in given.only:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run(given.model, method, tokens, unseen, reference, Path(folder)))
        if not given.json:
            print(markdown(rows[-1]), flush=True)
    if given.json:
        print(json.dumps(rows))


def run(model: Path, name: str, tokens, unseen: list[torch.Tensor], reference, work: Path) -> dict:
    from moecompress import pipeline
    from moecompress.prune import prune
    from moecompress.recipe import recipe_from

    method, _, keep = name.partition(":")
    recipe = recipe_from([f"transform=[{step_of(method, keep)}]", "calibration.heldout=4"])
    job = pipeline.make_job(str(model), recipe, tokens=tokens)
    start = time.perf_counter()
    with unaligned() if method.endswith("-plain") else nullcontext():
        manifest = prune(job, work / "out")
    seconds = time.perf_counter() - start
    measured = pipeline.load_and_measure(work / "out", unseen, reference, torch.float32).summary()
    shutil.rmtree(work / "out")
    return {"method": method, "keep": float(keep), "bytes": manifest["total_bytes"], "seconds": seconds, **measured}


def step_of(method: str, keep: str) -> str:
    if method.startswith("slim-"):
        return f"{{method: slim, width: {keep}, score: {method.removeprefix('slim-')}, max_kl: null}}"
    return f"{{method: {method.removesuffix('-plain')}, keep: {keep}, max_kl: null}}"


def unaligned() -> AbstractContextManager:
    """Inside, merged experts keep their neurons in the order they have."""
    from moecompress.transform import align

    return patch.object(align, "assign", lambda gain: torch.arange(len(gain)))


def markdown(row: dict) -> str:
    return (f"| {row['method']} | {row['keep']:.0%} | {row['kl_mean']:.5f} | {row['perplexity']:.2f} | {row['top1_agreement']:.2%} "
            f"| {row['seconds']:.1f} |")  # fmt: skip


if __name__ == "__main__":
    main()
