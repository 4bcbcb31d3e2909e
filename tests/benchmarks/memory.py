"""Does `moecompress quantize` hold one decoder layer at a time? Measured on random checkpoints of L and 2L layers.

    python tests/benchmarks/memory.py            # 4 GB and 8 GB, about ten minutes each on two cores
    python tests/benchmarks/memory.py --small    # 0.4 GB and 0.8 GB

The promise: beyond an interpreter that has imported the same libraries, the peak stays below 1.5 × (the largest layer + the
calibration states), and does not grow with the number of layers. The whole of `moecompress quantize` is measured:
calibration, planning, GPTQ (without descent sweeps, to save time), writing, loading again, comparing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ALLOWED = 1.5
#: What a run may grow from L to 2L layers, as a share of a layer: noise of the allocator.
GROWTH = 0.1
LIBRARIES = """
import moecompress.pipeline, moecompress.cli.quantize, accelerate, highspy, pulp
import transformers.models.qwen3_moe.modeling_qwen3_moe
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
TELL = """
import atexit, sys
told, sys.argv = sys.argv[1], ["moecompress", *sys.argv[2:]]
peak = lambda: next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
atexit.register(lambda: open(told, "w").write(peak()))
from moecompress.cli import main
main()
"""


@dataclass(frozen=True)
class Size:
    """Of a Qwen3-MoE model with one tensor an expert, in bfloat16; and of the calibration."""

    layers: int
    hidden: int
    width: int
    experts: int
    top_k: int
    vocabulary: int
    sequences: int
    length: int
    micro_batch: int

    @property
    def layer_bytes(self) -> int:
        """Bytes of a decoder layer as stored and computed."""
        attention = 4 * self.hidden * self.hidden + 2 * (self.hidden // 8)
        return 2 * (3 * self.experts * self.width * self.hidden + attention + (2 + self.experts) * self.hidden)

    @property
    def states_bytes(self) -> int:
        """Hidden states of all calibration sequences and of a perturbed micro-batch a layer; the capture of a layer."""
        tokens = self.sequences * self.length
        probes = self.layers * self.micro_batch * self.length
        return 2 * self.hidden * (2 * tokens + probes) + tokens * (12 * self.top_k + 2 * self.experts)


def tensors(size: Size) -> Iterator[dict[str, torch.Tensor]]:
    """Shard after shard: everything outside the layers, then layer after layer."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, cols: int) -> torch.Tensor:
        return (torch.randn(rows, cols, generator=generator) / cols**0.5).bfloat16()

    one = torch.ones(size.hidden, dtype=torch.bfloat16)
    yield {"model.embed_tokens.weight": matrix(size.vocabulary, size.hidden), "model.norm.weight": one,
           "lm_head.weight": matrix(size.vocabulary, size.hidden)}  # fmt: skip
    for layer in range(size.layers):
        found = {"input_layernorm": one, "post_attention_layernorm": one.clone(), "mlp.gate": matrix(size.experts, size.hidden)}
        found |= {f"self_attn.{x}_proj": matrix(size.hidden, size.hidden) for x in "qkvo"}
        found |= {f"self_attn.{x}_norm": torch.ones(size.hidden // 8, dtype=torch.bfloat16) for x in "qk"}
        for expert in range(size.experts):
            for name, shape in {"gate": (size.width, size.hidden), "up": (size.width, size.hidden), "down": (size.hidden, size.width)}.items():
                found[f"mlp.experts.{expert}.{name}_proj"] = matrix(*shape)
        yield {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in found.items()}


def make(folder: Path, size: Size) -> None:
    """Write the checkpoint, never more than a layer in memory."""
    from safetensors.torch import save_file
    from transformers import Qwen3MoeConfig

    folder.mkdir(parents=True)
    weight_map = {}
    for index, shard in enumerate(tensors(size)):
        name = f"model-{index + 1:05d}-of-{size.layers + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index_text)
    config = Qwen3MoeConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.width, moe_intermediate_size=size.width,
        num_hidden_layers=size.layers, num_attention_heads=8, num_key_value_heads=8, head_dim=size.hidden // 8,
        num_experts=size.experts, num_experts_per_tok=size.top_k, norm_topk_prob=True, eos_token_id=0, bos_token_id=None,
        architectures=["Qwen3MoeForCausalLM"], dtype=torch.bfloat16,
    )  # fmt: skip
    config.save_pretrained(folder)
    make_tokenizer(folder, size.vocabulary)


def make_tokenizer(folder: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from moecompress.calibrate.data import read_texts

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(read_texts("builtin"), trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<|end|>"], show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>").save_pretrained(folder)


def peak_of(command: list[str]) -> tuple[int, float]:
    """Largest resident size of `moecompress COMMAND` in bytes, and seconds.

    The process tells its own peak: that which the system reports of a child includes its parent's before exec.
    """
    start = time.perf_counter()
    with tempfile.NamedTemporaryFile("r") as told:
        done = subprocess.run([sys.executable, "-c", TELL, told.name, *command], stdout=subprocess.DEVNULL)
        if done.returncode:
            raise SystemExit(f"moecompress {' '.join(command)} ended with {done.returncode}")
        return int(told.read()) * 1024, time.perf_counter() - start


def measure(folder: Path, size: Size) -> dict:
    settings = {
        "quantize.refine": 0, "compute.dtype": "bfloat16", "compute.micro_batch": size.micro_batch,
        "calibration.sequences": size.sequences + 2, "calibration.heldout": 2, "calibration.length": size.length,
    }  # fmt: skip
    command = ["quantize", str(folder), "-o", str(folder) + "-out", "--target-bits", "3.0"]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    libraries = int(subprocess.run([sys.executable, "-c", LIBRARIES], capture_output=True, text=True, check=True).stdout) * 1024
    peak, seconds = peak_of(command)
    limit = ALLOWED * (size.layer_bytes + size.states_bytes)
    return {**asdict(size), "checkpoint_bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors")),
            "layer_bytes": size.layer_bytes, "states_bytes": size.states_bytes, "libraries_bytes": libraries,
            "peak_bytes": peak, "beyond_bytes": peak - libraries, "limit_bytes": int(limit),
            "ratio": (peak - libraries) / (size.layer_bytes + size.states_bytes), "seconds": seconds}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tenth of the size")
    parser.add_argument("--layers", type=int, help="L; the second run has 2L")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024, help="of an expert")
    parser.add_argument("--experts", type=int)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--folder", type=Path, help="where checkpoints are made and kept (default: a temporary folder)")
    parser.add_argument("--once", action="store_true", help="only the run of L layers")
    arguments = parser.parse_args()
    layers = arguments.layers or (2 if arguments.small else 6)
    experts = arguments.experts or (32 if arguments.small else 112)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for count in [layers] if arguments.once else [layers, 2 * layers]:
            size = Size(count, arguments.hidden, arguments.width, experts, arguments.top_k, arguments.vocabulary,
                        arguments.sequences, arguments.length, 1)  # fmt: skip
            folder = (arguments.folder or Path(temporary)) / f"random-{count}x{experts}x{arguments.width}x{arguments.hidden}"
            if not folder.exists():
                make(folder, size)
            rows.append(measure(folder, size))
            show(rows[-1])
    kept = all(row["beyond_bytes"] <= row["limit_bytes"] for row in rows)
    record = {"runs": rows, "promise_kept": kept}
    if len(rows) == 2:
        record["growth_bytes"] = rows[1]["peak_bytes"] - rows[0]["peak_bytes"]
        grown = record["growth_bytes"] - (rows[1]["states_bytes"] - rows[0]["states_bytes"])
        record["promise_kept"] = kept and grown <= GROWTH * rows[0]["layer_bytes"]
        print(f"growth from {layers} to {2 * layers} layers: {record['growth_bytes'] / 1e6:+.0f} MB", file=sys.stderr)
    print(json.dumps(record))
    return 0 if record["promise_kept"] else 1


def show(row: dict) -> None:
    mb = {name: f"{row[name + '_bytes'] / 1e6:,.0f} MB" for name in ("checkpoint", "layer", "states", "libraries", "peak", "beyond", "limit")}
    print(f"{row['layers']} layers, checkpoint {mb['checkpoint']}: layer {mb['layer']}, calibration states {mb['states']}; peak {mb['peak']}, "
          f"of which libraries {mb['libraries']}, beyond {mb['beyond']} (limit {mb['limit']}), ratio {row['ratio']:.2f}; "
          f"{row['seconds']:.0f} s", file=sys.stderr)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
