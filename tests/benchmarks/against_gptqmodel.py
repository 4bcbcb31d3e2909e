"""Quality and speed beside GPTQModel: same checkpoint, same calibration and evaluation tokens, same bytes, experts only.

    python tests/benchmarks/against_gptqmodel.py --model DIR --calibration A.txt --evaluation B.txt \\
        --gptqmodel-python VENV/bin/python --settings 4:128:sym 3:64:asym 2:64:asym

GPTQModel pins its own dependencies, so it runs in an environment of its own (`pip install torch==2.13.0 gptqmodel optimum`),
where this same file is its worker. It quantizes the routed experts; attention stays as it is in both. Our target is the size
of the files that GPTQModel wrote. KL is measured through each tool's own loader, in float32, against the original. Seconds
are those of quantizing: for GPTQModel its `quantize` call, for us everything after the plan; both run calibration tokens
through every layer in that time. `first` marks GPTQModel's first run, which also compiles.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--gptqmodel-python", required=True)
    parser.add_argument("--settings", nargs="+", default=["4:128:sym", "3:128:sym", "2:64:asym"])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--evaluate", type=int, default=64, help="evaluation sequences")
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    import torch

    from moecompress.calibrate.data import token_batches
    from moecompress.model.skeleton import load_tokenizer

    tokenizer = load_tokenizer(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        # Four sequences more: our pipeline keeps them out of calibration to measure on.
        ours = token_batches(tokenizer, arguments.calibration, arguments.sequences + 4, arguments.length)
        unseen = token_batches(tokenizer, arguments.evaluation, arguments.evaluate, arguments.length).ids
        torch.save({"calibration": ours.ids[: arguments.sequences], "evaluation": unseen}, work / "tokens.pt")
        for setting in arguments.settings:
            theirs = gptqmodel(arguments, setting, work)
            report(f"GPTQModel {setting}", theirs)
            for allocator in ("global", "uniform"):
                report(f"moecompress {allocator}", moecompress(arguments.model, ours, unseen, theirs["bytes"], allocator, work))


def report(label: str, record: dict) -> None:
    print(f"{label:28s} {record['bytes']:>12,} bytes  KL {record['kl']:.5f}  top-1 {record['top1']:.2%}  {record['seconds']:7.1f} s",
          flush=True)  # fmt: skip


def gptqmodel(arguments: argparse.Namespace, setting: str, work: Path) -> dict:
    command = [arguments.gptqmodel_python, str(Path(__file__).resolve()), "--worker", str(arguments.model.resolve()), setting, str(work)]
    environment = os.environ | {"GPTQMODEL_CPU_WORKERS": "2"}
    environment.pop("PYTHONPATH", None)
    # It leaves logs in the folder where it runs.
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=work)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"bytes"')]
    if not lines:
        sys.exit(f"GPTQModel failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return json.loads(lines[-1])


def moecompress(model: Path, tokens, unseen, size: int, allocator: str, work: Path) -> dict:
    from transformers import AutoModelForCausalLM

    from moecompress import pipeline, plans
    from moecompress.recipe import recipe_from

    job = pipeline.make_job(
        str(model),
        recipe_from([f"target.size={size}", f"allocate.allocator={allocator}", "allocate.compare=none", "quantize.attention_bits=16",
                     "quantize.shared_bits=16", "quantize.dense_bits=16", "calibration.heldout=4"]),
        tokens=tokens,
    )  # fmt: skip
    statistics = pipeline.calibrate(job, work / "calibrate")
    chosen, _ = plans.plan(job, statistics)
    start = time.perf_counter()
    pipeline.build(job, statistics, chosen, work / "built", "plan")
    seconds = time.perf_counter() - start
    out = work / "built" / "out"
    record = measure(AutoModelForCausalLM.from_pretrained(out, dtype="float32"), model, unseen)
    record |= {"bytes": files(out), "seconds": seconds}
    shutil.rmtree(work / "built")
    return record


def measure(compressed, model: Path, unseen) -> dict:
    """Mean KL(original ‖ compressed) and top-1 agreement by plain forward passes of both models."""
    import torch
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    kl, same, tokens = 0.0, 0, 0
    with torch.no_grad():
        for ids in unseen.split(2):
            p = torch.log_softmax(original(ids).logits.float(), -1)
            q = torch.log_softmax(compressed(ids).logits.float(), -1)
            kl += float((p.exp() * (p - q)).sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            tokens += ids.numel()
    return {"kl": kl / tokens, "top1": same / tokens}


def files(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def worker(model: str, setting: str, folder: str) -> None:
    """In GPTQModel's environment."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    bits, group, kind = setting.split(":")
    tokens = torch.load(Path(folder) / "tokens.pt")
    skip = {r"-:.*self_attn.*": {}, r"-:.*shared_expert.*": {}}
    settings = QuantizeConfig(bits=int(bits), group_size=int(group), sym=kind == "sym", desc_act=False, dynamic=skip)
    loaded = GPTQModel.load(model, settings, device="cpu")
    data = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens["calibration"]]
    start = time.perf_counter()
    loaded.quantize(data, batch_size=4)
    seconds = time.perf_counter() - start
    out = Path(folder) / "gptqmodel"
    shutil.rmtree(out, ignore_errors=True)
    loaded.save(str(out))
    record = measure(GPTQModel.load(str(out), device="cpu").model, Path(model), tokens["evaluation"])
    print(json.dumps({"bytes": files(out), **record, "seconds": seconds}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:5])
    else:
        main()
