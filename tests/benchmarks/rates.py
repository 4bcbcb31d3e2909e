"""Every code at every rate: size, divergence on unseen text, encoding time. One table, one command.

    python tests/benchmarks/rates.py --model DIR --calibration A.txt --evaluation B.txt [--only t2 b2g64a plan:2] [--set quantize.refine=0]

Only the routed experts are quantized; bits are those stored for them, everything counted. Uniform rows give every expert matrix
the same code; "plan" rows mix the trellis's rates under an average (`--target-bits`), "joint" rows may also leave experts out, "slim"
rows make experts thinner, "every" rows both.
KL and perplexity as `moecompress evaluate` measures them, in float32 (tests hold that to plain transformers). Encoding seconds are those of the whole walk:
calibration passes, rounding, packing, writing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch

METHODS = ["t0_5", "t0_75", "d0_7", "d0_8", "d1", "t1", "t1_5", "t2", "t2_5", "t3", "t4", "sign", "ternary", "v2", "b2g64a", "b2g64a_o1",
           "b3g64a", "b4g64a", "plan:1", "joint:1", "plan:1.5", "joint:1.5", "plan:2", "joint:2", "plan:2.5"]  # fmt: skip
TRELLIS = ["t0_5", "t0_75", "t1", "t1_25", "t1_5", "t2", "t2_5", "t3", "t4"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--only", nargs="+", default=METHODS)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--evaluate", type=int, default=64, help="evaluation sequences")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--set", dest="changes", action="append", default=[], help="of the recipe, for all codes: quantize.refine=0")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    from moecompress.calibrate.data import token_batches
    from moecompress.model.skeleton import load_tokenizer

    tokenizer = load_tokenizer(given.model)
    tokens = token_batches(tokenizer, given.calibration, given.sequences + 4, given.length)
    unseen = token_batches(tokenizer, given.evaluation, given.evaluate, given.length).ids
    from moecompress.evaluate.divergence import trace
    from moecompress.model.walk import OpenModel

    reference = trace(OpenModel(given.model, torch.float32), list(unseen.split(1)), "original on unseen text")
    rows = []
    if not given.json:
        print("| code | bits | bytes | KL | perplexity | top-1 | encoding, s |\n|---|---:|---:|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for method in given.only:
            rows.append(run(given.model, method, tokens, unseen, reference, Path(folder), given.changes))
            if not given.json:
                print(markdown(rows[-1]), flush=True)
    if given.json:
        print(json.dumps(rows))


def run(model: Path, method: str, tokens, unseen: torch.Tensor, reference, work: Path, changes: list[str]) -> dict:
    from moecompress import pipeline, plans
    from moecompress.recipe import recipe_from

    kind, _, bits = method.partition(":")
    # A uniform plan has one candidate; its target only has to be wide enough.
    names = TRELLIS if bits else [kind]
    drop, slim = (str(kind in kinds).lower() for kinds in (("joint", "every"), ("slim", "every")))
    recipe = recipe_from([f"target.bits={bits or 16}", f"allocate.allocator={'global' if bits else 'uniform'}", f"allocate.drop={drop}",
                          f"allocate.slim={slim}", f"allocate.candidates=[{', '.join(map(candidate, names))}]", "allocate.compare=none",
                          "calibration.heldout=4", "quantize.attention_bits=16", "quantize.shared_bits=16", "quantize.dense_bits=16", *changes])  # fmt: skip
    job = pipeline.make_job(str(model), recipe, tokens=tokens)
    statistics = pipeline.calibrate(job, work / f"calibrate-{kind}")
    chosen, _ = plans.plan(job, statistics)
    start = time.perf_counter()
    record = pipeline.build(job, statistics, chosen, work / "built", "plan")
    seconds = time.perf_counter() - start
    out = work / "built" / "out"
    measured = pipeline.load_and_measure(out, list(unseen.split(1)), reference, torch.float32).summary()
    result = {"method": method, "bits": record["bits_per_weight"], "bytes": record["total_bytes"], "seconds": seconds,
              "predicted": chosen.harm, "dropped": chosen.dropped, "slimmed": chosen.slimmed, **measured}
    shutil.rmtree(work / "built")
    return result


def candidate(name: str) -> str:
    from moecompress.pack.scheme import Scheme

    scheme = Scheme.parse(name)
    if scheme.code == "int":
        return f"{{bits: {scheme.bits}, group: {scheme.group}, symmetric: {str(scheme.symmetric).lower()}, outliers: {scheme.outliers}}}"
    return f"{{code: {scheme.code}, bits: {scheme.bits}}}"


def markdown(row: dict) -> str:
    return (f"| {row['method']} | {row['bits']:.3f} | {row['bytes']:,} | {row['kl_mean']:.5f} | {row['perplexity']:.2f} | {row['top1_agreement']:.2%} "
            f"| {row['seconds']:.1f} |")  # fmt: skip


if __name__ == "__main__":
    main()
