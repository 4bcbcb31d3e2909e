"""Quality beside llama.cpp's low-bit types: same checkpoint, same calibration text, same measure, experts only, true bytes.

    python tests/benchmarks/against_llamacpp.py --model DIR --calibration A.txt --evaluation B.txt --llamacpp BIN_DIR \\
        --converter LLAMA_CPP/convert_hf_to_gguf.py --pre-tokenizer gpt-2 --types iq2_xxs iq2_xs iq1_m --ours OUR_FOLDER

BIN_DIR holds llama-imatrix and llama-quantize. The checkpoint becomes a GGUF file of its own dtype, whose experts must equal
the checkpoint's exactly; the importance matrix is computed on the calibration sequences; llama-quantize then changes the routed
experts and nothing else. The experts are dequantized by gguf-py into a float32 copy of the checkpoint, which is measured as
`moecompress evaluate --dtype float32` measures ours. So this is the quality of the codes, not of llama.cpp's kernels.

Bits are bytes of the GGUF tensors, scales included, over expert weights. `total_bytes` is what the checkpoint's files would weigh
with experts of that size: the target that our folders (--ours, made by `moecompress quantize`) have to meet.

An expert that no calibration token reached has no importances; llama-quantize then weighs its columns alike. A type whose block
does not divide the rows is replaced by llama.cpp with a wider one; such a line names the types found in the file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from moecompress.calibrate.data import token_batches
from moecompress.evaluate.report import measure
from moecompress.model.experts import parameters_from, projections
from moecompress.model.skeleton import load_tokenizer
from moecompress.model.walk import OpenModel

#: What the file calls each dtype, so that converting loses nothing.
OUTTYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
#: Runs the converter. It knows a tokenizer by a hash that depends on the vocabulary; a name given instead overrules it.
CONVERT = """
import runpy, sys
from pathlib import Path
script, pre, *sys.argv[1:] = sys.argv[1:]
sys.path[:0] = [str(Path(script).parent), str(Path(script).parent / "gguf-py")]
if pre:
    from conversion.base import TextModel
    TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
runpy.run_path(script, run_name="__main__")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--llamacpp", type=Path, required=True, help="folder of llama-imatrix and llama-quantize")
    parser.add_argument("--converter", type=Path, required=True, help="convert_hf_to_gguf.py, with conversion/ and gguf-py/ beside it")
    parser.add_argument("--pre-tokenizer", default="", help="for a tokenizer that the converter does not recognise")
    parser.add_argument("--types", nargs="*", default=["iq2_xxs", "iq2_xs", "iq1_m"])
    parser.add_argument("--ours", nargs="*", type=Path, default=[], help="compressed folders of the same checkpoint")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--evaluate", type=int, default=64, help="evaluation sequences")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--work", type=Path, help="keep the files here; those of an earlier run are used again")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        records = compare(arguments, work)
    if arguments.json:
        print(json.dumps(records))


def compare(arguments: argparse.Namespace, work: Path) -> list[dict]:
    tokenizer = load_tokenizer(arguments.model)
    unseen = token_batches(tokenizer, arguments.evaluation, arguments.evaluate, arguments.length).ids
    # One sequence more: llama-imatrix tokenizes the text by itself, and its last chunk must be full.
    seen = token_batches(tokenizer, arguments.calibration, arguments.sequences + 1, arguments.length)
    opened = OpenModel(arguments.model)
    base, importances = work / "base.gguf", work / f"imatrix-{seen.fingerprint[:8]}.gguf"
    make(base, partial(convert, arguments, opened))
    check_exact(opened, experts_of(arguments, base))
    text = "".join(tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in seen.ids)
    make(importances, partial(compute_importances, arguments, text, base))
    unreached = without_tokens(arguments, importances)
    records = []
    for name in arguments.types:
        quantized = work / f"{name}-{seen.fingerprint[:8]}.gguf"
        make(quantized, partial(quantize, arguments, opened, base, importances, name))
        write_copy(arguments.model, opened, experts_of(arguments, quantized), work / "copy")
        record = measured(work / "copy", arguments.model, unseen) | sizes(arguments, opened, quantized)
        records.append(record | {"tool": "llama.cpp", "type": name, "experts_without_tokens": unreached})
        report(records[-1], arguments.json)
    for folder in arguments.ours:
        records.append(measured(folder, arguments.model, unseen) | {"tool": "moecompress", "type": folder.name})
        report(records[-1], arguments.json)
    return records


def report(record: dict, quiet: bool) -> None:
    low, high = record["kl_interval_95"]
    found = record.get("types_found", {})
    note = f"  stored as {found}" if set(found) - {record["type"].upper()} else ""
    print(f"{record['tool'] + ' ' + record['type']:28s} {record['bits_per_weight']:.4f} bits {record['total_bytes']:>12,} bytes  "
          f"KL {record['kl_mean']:.5f} ({low:.5f} … {high:.5f})  top-1 {record['top1_agreement']:.2%}{note}",
          file=sys.stderr if quiet else sys.stdout, flush=True)  # fmt: skip


# --- llama.cpp's tools ----------------------------------------------------------------------------------------------


def make(path: Path, action: Callable[[Path], None]) -> None:
    """A file has its name only once it is whole."""
    if not path.exists():
        partial = path.with_name("partial.gguf")
        action(partial)
        partial.rename(path)


def convert(arguments: argparse.Namespace, opened: OpenModel, out: Path) -> None:
    run([sys.executable, "-c", CONVERT, str(arguments.converter.resolve()), arguments.pre_tokenizer,
         "--outtype", OUTTYPES[opened.stored_dtype], "--outfile", str(out), str(arguments.model.resolve())])  # fmt: skip


def compute_importances(arguments: argparse.Namespace, text: str, base: Path, out: Path) -> None:
    source = base.with_name("calibration.txt")
    source.write_text(text, encoding="utf-8")
    run([str(arguments.llamacpp / "llama-imatrix"), "-m", str(base), "-f", str(source), "-o", str(out), "--no-ppl",
         "-c", str(arguments.length), "-b", str(arguments.length), "--chunks", str(arguments.sequences)])  # fmt: skip


def quantize(arguments: argparse.Namespace, opened: OpenModel, base: Path, importances: Path, name: str, out: Path) -> None:
    # The first pattern that fits decides. Patterns are looked at only if the file's own type is a quantized one: hence Q8_0,
    # which no tensor gets.
    plain = OUTTYPES[opened.stored_dtype]
    run([str(arguments.llamacpp / "llama-quantize"), "--imatrix", str(importances), "--token-embedding-type", plain,
         "--output-tensor-type", plain, "--tensor-type", f"ffn_.*_exps={name}", "--tensor-type", f".*={plain}",
         str(base), str(out), "Q8_0"])  # fmt: skip


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"failed ({done.returncode}): {' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


# --- GGUF files -----------------------------------------------------------------------------------------------------


def reader(arguments: argparse.Namespace, path: Path):
    """gguf-py of the same llama.cpp as the tools."""
    library = str(arguments.converter.resolve().parent / "gguf-py")
    if library not in sys.path:
        sys.path.insert(0, library)
    import gguf

    return gguf.GGUFReader(path)


def expert_tensors(arguments: argparse.Namespace, path: Path) -> dict[tuple[int, str], Any]:
    """{(layer, projection): tensor of GGUFReader} of blk.3.ffn_gate_exps.weight and the like."""
    found = {}
    for tensor in reader(arguments, path).tensors:
        parts = tensor.name.split(".")
        if parts[0] == "blk" and parts[2].startswith("ffn_") and parts[2].endswith("_exps") and parts[3] == "weight":
            found[int(parts[1]), parts[2][4:-5]] = tensor
    return found


def experts_of(arguments: argparse.Namespace, path: Path) -> dict[tuple[int, str], torch.Tensor]:
    """{(layer, projection): float32 [E, out, in]}, dequantized."""
    tensors = expert_tensors(arguments, path)
    from gguf.quants import dequantize

    return {key: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()) for key, tensor in tensors.items()}


def sizes(arguments: argparse.Namespace, opened: OpenModel, path: Path) -> dict:
    tensors = expert_tensors(arguments, path).values()
    stored = sum(int(tensor.n_bytes) for tensor in tensors)
    dense = sum(tensor.nbytes for tensor in opened.anatomy.tensors if tensor.role == "expert")
    return {
        "expert_bytes": stored,
        "bits_per_weight": 8 * stored / opened.anatomy.expert_weights,
        "total_bytes": sum(file.stat().st_size for file in arguments.model.glob("*.safetensors")) - dense + stored,
        "gguf_bytes": path.stat().st_size,
        "types_found": dict(Counter(tensor.tensor_type.name for tensor in tensors)),
    }


def without_tokens(arguments: argparse.Namespace, importances: Path) -> int:
    """Experts that no calibration token reached."""
    tensors = reader(arguments, importances).tensors
    return sum(int((tensor.data == 0).sum()) for tensor in tensors if tensor.name.endswith("ffn_down_exps.weight.counts"))


# --- the copy -------------------------------------------------------------------------------------------------------


def check_exact(opened: OpenModel, weights: dict[tuple[int, str], torch.Tensor]) -> None:
    """Experts, their order and orientation in the unquantized file are the checkpoint's own."""
    for layer, moe in opened.anatomy.moe.items():
        opened.load_layer(layer)
        module = opened.model.get_submodule(moe.module)
        for projection, own in projections(module, moe.layout).items():
            if not torch.equal(own.float(), weights[layer, projection]):
                sys.exit(f"{projection} of layer {layer} changed when it was converted")
        opened.release_layer(layer)


@torch.no_grad()
def write_copy(model: Path, opened: OpenModel, weights: dict[tuple[int, str], torch.Tensor], copy: Path) -> None:
    """The checkpoint in float32 with other experts, under its own names."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    for layer, moe in opened.anatomy.moe.items():
        module = whole.get_submodule(moe.module)
        for name, tensor in parameters_from({p: weights[layer, p] for p in moe.layout.projections}, moe.layout).items():
            module.get_parameter(name).copy_(tensor)
    whole.save_pretrained(copy)


def measured(folder: Path, original: Path, unseen: torch.Tensor) -> dict:
    return measure(folder, original, unseen, "float32", speed=False)


if __name__ == "__main__":
    main()
