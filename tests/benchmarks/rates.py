"""Every code at every rate: size, divergence on unseen text, encoding time, decode speed. One table, one command.

    python tests/benchmarks/rates.py --model DIR --calibration A.txt --evaluation B.txt [--only t2 b2g64a plan:2] [--set quantize.refine=0]

Only the routed experts are quantized; bits are those stored for them, everything counted. Uniform rows give every expert matrix
the same code, rows "a+b" gate and up the code a and down b; "plan" rows mix the trellis's rates under an average (`--target-bits`),
"joint" rows may also leave experts out, or merge them, "slim" rows make experts thinner, "every" rows both.
KL and perplexity as `moecompress evaluate` measures them, in float32 (tests hold that to plain transformers). Encoding seconds are those of the whole walk:
calibration passes, rounding, packing, writing. Decoding is one token through its eight experts of one layer of Qwen3-30B-A3B, whose weights
come from memory: microseconds as `moecompress bench` measures them, all codes in turn, beside torch's bfloat16. A plan's time is
that of its codes, by the number of matrices that have them ("≈": not measured as a whole).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from texts import parser, read  # beside this file

METHODS = ["t0_5", "t0_75", "d0_7", "d0_8", "d1", "t1", "t1_5", "t2", "t2_5", "t3", "t4", "sign", "ternary", "v2", "b2g64a", "b2g64a_o1",
           "b3g64a", "b4g64a", "plan:1", "joint:1", "every:1", "plan:1.5", "joint:1.5", "plan:2", "joint:2", "plan:2.5"]  # fmt: skip
TRELLIS = ["t0_5", "t0_75", "t1", "t1_25", "t1_5", "t2", "t2_5", "t3", "t4"]


def main() -> None:
    options = parser(__doc__, METHODS, 64)
    options.add_argument("--set", dest="changes", action="append", default=[], help="of the recipe, for all codes: quantize.refine=0")
    given = options.parse_args()
    tokens, unseen, reference = read(given)
    decoding = decode_times(given.only)
    rows = []
    if not given.json:
        print(f"one token in torch's bfloat16: {decoding['bfloat16']:.0f} µs\n", flush=True)
        print("| code | bits | bytes | KL | perplexity | top-1 | encoding, s | one token, µs |\n|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for method in given.only:
            rows.append(run(given.model, method, tokens, unseen, reference, Path(folder), given.changes, decoding))
            if not given.json:
                print(markdown(rows[-1]), flush=True)
    if given.json:
        print(json.dumps(rows))


def run(model: Path, method: str, tokens, unseen: list[torch.Tensor], reference, work: Path, changes: list[str],
        decoding: dict[str, float]) -> dict:  # fmt: skip
    from moecompress import pipeline, plans
    from moecompress.recipe import recipe_from

    kind, _, bits = method.partition(":")
    # A uniform plan has one candidate; its target only has to be wide enough.
    names = TRELLIS if bits else kind.split("+")
    drop, slim = (str(kind in kinds).lower() for kinds in (("joint", "every"), ("slim", "every")))
    recipe = recipe_from([f"target.bits={bits or 16}", f"allocate.allocator={'global' if bits else 'uniform'}", f"allocate.drop={drop}",
                          f"allocate.slim={slim}", f"allocate.candidates=[{', '.join(map(candidate, names))}]", "allocate.compare=none",
                          "calibration.heldout=4", "quantize.attention_bits=16", "quantize.shared_bits=16", "quantize.dense_bits=16", *changes])  # fmt: skip
    job = pipeline.make_job(str(model), recipe, tokens=tokens)
    statistics = pipeline.calibrate(job, work / f"calibrate-{kind}")
    chosen, _ = plans.plan(job, statistics)
    if len(names) == 2 and not bits:
        chosen = by_projection(chosen, *names)
    start = time.perf_counter()
    record = pipeline.build(job, statistics, chosen, work / "built", "plan")
    seconds = time.perf_counter() - start
    out = work / "built" / "out"
    measured = pipeline.load_and_measure(out, unseen, reference, torch.float32).summary()
    codes = Counter(choice.candidate.partition("w")[0] for choice in chosen.choices)  # "t2w192": 192 neurons are left
    one_token = sum(count * decoding.get(code, 0.0) for code, count in codes.items()) / len(chosen.choices)  # left out: nothing to do
    result = {"method": method, "codes": codes, "microseconds_per_token": one_token,
              "bits": record["bits_per_weight"], "bytes": record["total_bytes"], "seconds": seconds,
              "predicted": chosen.harm, "dropped": chosen.dropped, "slimmed": chosen.slimmed, **measured}
    shutil.rmtree(work / "built")
    return result


def decode_times(methods: list[str]) -> dict[str, float]:
    """Microseconds of one token, by code."""
    from moecompress.evaluate.bench import SHAPES, measure
    from moecompress.pack.scheme import Scheme

    uniform = {name for method in methods if ":" not in method for name in method.split("+")}
    names = uniform | {name for name in TRELLIS if any(":" in method for method in methods)}
    found = measure(SHAPES["qwen3-30b-a3b"], [Scheme.parse(name) for name in sorted(names)], [1], 8 << 30, 40)
    return {row["weights"]: row["microseconds_per_token"] for row in found["results"]}


def by_projection(plan, gate_and_up: str, down: str):
    """The same plan with one code for gate and up, another one for down."""
    from moecompress.pack.scheme import Scheme

    names = [down if choice.unit.endswith(".down") else gate_and_up for choice in plan.choices]
    choices = (dataclasses.replace(choice, candidate=name, bytes=Scheme.parse(name).price(choice.rows, choice.cols))
               for choice, name in zip(plan.choices, names, strict=True))  # fmt: skip
    return dataclasses.replace(plan, choices=tuple(choices))


def candidate(name: str) -> str:
    from moecompress.pack.scheme import Scheme

    scheme = Scheme.parse(name)
    if scheme.code == "int":
        return f"{{bits: {scheme.bits}, group: {scheme.group}, symmetric: {str(scheme.symmetric).lower()}, outliers: {scheme.outliers}}}"
    if scheme.code == "shared-basis":
        plain = candidate(scheme.coefficients.name).strip("{}").removesuffix(", outliers: 0.0")
        return f"{{code: shared-basis, rank: {scheme.shares[0] / 1000}, {plain}}}"
    return f"{{code: {scheme.code}, bits: {scheme.bits}}}"


def markdown(row: dict) -> str:
    return (f"| {row['method']} | {row['bits']:.3f} | {row['bytes']:,} | {row['kl_mean']:.5f} | {row['perplexity']:.2f} | {row['top1_agreement']:.2%} "
            f"| {row['seconds']:.1f} | {'≈ ' * (':' in row['method'])}{row['microseconds_per_token']:.0f} |")  # fmt: skip


if __name__ == "__main__":
    main()
