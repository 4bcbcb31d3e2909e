"""Never silent: every planted fault ends with exit code 2 and a message that names it; no traceback, no output folder."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"


# --- planting faults ------------------------------------------------------------------------------------------------


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def edit_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Replace a tensor in its shard, or take it out (None); the index stays."""
    shard = shard_of(folder, name)
    tensors = load_file(shard)
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else tensors | {name: changed}, shard, metadata={"format": "pt"})


def delete(folder: Path, name: str) -> None:
    """A tensor disappears from its shard and from the index."""
    edit_tensor(folder, name, lambda _: None)
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(name))


def add(folder: Path, name: str, tensor: torch.Tensor) -> None:
    """A tensor that belongs nowhere, in a shard of its own and in the index."""
    save_file({name: tensor}, folder / "model-extra.safetensors", metadata={"format": "pt"})
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({name: "model-extra.safetensors"}))


def poke(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[tensor.numel() // 2] = value
    return tensor


def set_config(**values: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(values))


def drop_config(*names: str) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda config: [config.pop(name) for name in names])


def in_index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / INDEX, change)


def malicious_header(length: int) -> Callable[[Path], None]:
    """A header that says it is as long as ``length`` bytes."""

    def plant(folder: Path) -> None:
        shard = shard_of(folder, GATE)
        data = shard.read_bytes()
        shard.write_bytes(length.to_bytes(8, "little") + data[8:])

    return plant


def header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Edit the JSON header of the shard that holds GATE, keeping its data."""

    def plant(folder: Path) -> None:
        shard = shard_of(folder, GATE)
        data = shard.read_bytes()
        size = int.from_bytes(data[:8], "little")
        record = json.loads(data[8 : 8 + size])
        text = json.dumps(change(record) or record).encode()
        shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return plant


def offsets(name: str, start: int, end: int) -> Callable[[dict], object]:
    return lambda record: record[name].update(data_offsets=[start, end])


def pickle_only(folder: Path) -> None:
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    (folder / INDEX).unlink()
    torch.save({"w": torch.zeros(1)}, folder / "pytorch_model.bin")


def into_folder(shard: Path) -> None:
    shard.unlink()
    shard.mkdir()


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def swap(folder: Path) -> None:
    """Two experts' tensors of different layers point to each other's shard."""
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    other = next(name for name, shard in index.items() if shard != index[GATE])
    edit_json(folder / INDEX, lambda i: i["weight_map"].update({GATE: index[other], other: index[GATE]}))


#: What is planted in a copy of the checkpoint, and words that the message must hold.
CHECKPOINT_FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "shard missing": (lambda f: shard_of(f, GATE).unlink(), ["model-0000", "missing", "download"]),
    "shard truncated": (lambda f: truncate(shard_of(f, GATE), 100_000), ["model-0000", "truncated", "100000 bytes"]),
    "shard empty": (lambda f: truncate(shard_of(f, GATE), 0), ["model-0000", "truncated"]),
    "shard cut in its header": (lambda f: truncate(shard_of(f, GATE), 300), ["model-0000", "truncated"]),
    "shard with bytes behind its end": (lambda f: shard_of(f, GATE).open("ab").write(b"x"), ["model-0000", "damaged"]),
    "shard is a folder": (lambda f: into_folder(shard_of(f, GATE)), ["model-0000"]),
    "tensor missing from the shard": (lambda f: edit_tensor(f, GATE, lambda _: None), [GATE, "missing from model-0000"]),
    "tensor missing from the index": (in_index(lambda i: i["weight_map"].pop(GATE)), [GATE, "not in the index"]),
    "tensors in other shards than the index says": (swap, ["missing from model-0000"]),
    "a norm missing": (lambda f: delete(f, "model.norm.weight"), ["model.norm.weight", "Nothing in the checkpoint fills"]),
    "a matrix of an expert missing": (lambda f: delete(f, GATE), ["model.layers.1.mlp.experts.3", "gate_proj", "8 experts"]),
    "an expert missing": (lambda f: [delete(f, GATE.replace("gate", p)) for p in ("gate", "up", "down")],
                          ["model.layers.1.mlp.experts.3", "8 experts"]),
    "the last expert missing": (lambda f: [delete(f, GATE.replace("gate", p).replace("3", "7")) for p in ("gate", "up", "down")],
                                ["model.layers.1.mlp.experts.7", "8 experts"]),
    "all experts of a layer missing": (lambda f: [delete(f, GATE.replace("gate", p).replace("3", str(e)))
                                                  for p in ("gate", "up", "down") for e in range(8)],
                                       ["model.layers.1.mlp.experts"]),
    "an extra expert": (lambda f: add(f, GATE.replace("3", "8"), torch.zeros(64, 64, dtype=torch.bfloat16)),
                        ["model.layers.1.mlp.experts.8", "gate_proj", "8 experts"]),
    "an extra tensor": (lambda f: add(f, "model.layers.1.mlp.novelty.weight", torch.zeros(4)),
                        ["model.layers.1.mlp.novelty.weight", "no place"]),
    "an extra layer": (lambda f: add(f, "model.layers.3.input_layernorm.weight", torch.zeros(64)),
                       ["model.layers.3.input_layernorm.weight", "no place"]),
    "a transposed projection": (lambda f: edit_tensor(f, "model.layers.0.self_attn.k_proj.weight", lambda t: t.T.contiguous()),
                                ["model.layers.0.self_attn.k_proj.weight", "(32, 64)", "(64, 32)"]),
    "an expert of another width": (lambda f: edit_tensor(f, GATE, lambda t: t[:32].contiguous()), ["model.layers.1.mlp.experts"]),
    "an expert with a third axis": (lambda f: edit_tensor(f, GATE, lambda t: t[None].contiguous()), ["model.layers.1.mlp.experts"]),
    "all experts of another width": (set_config(moe_intermediate_size=32), ["model.layers", "experts", "config.json"]),
    "integer weights": (lambda f: edit_tensor(f, GATE, lambda t: t.to(torch.int8)), [GATE]),
    "NaN in an expert": (lambda f: edit_tensor(f, GATE, lambda t: poke(t, float("nan"))), [GATE, "NaN"]),
    "Inf in an expert": (lambda f: edit_tensor(f, GATE, lambda t: poke(t, float("inf"))), [GATE, "Inf"]),
    "NaN in the last norm": (lambda f: edit_tensor(f, "model.norm.weight", lambda t: poke(t, float("nan"))), ["model.norm.weight"]),
    "NaN in the embedding": (lambda f: edit_tensor(f, "model.embed_tokens.weight", lambda t: poke(t, float("nan"))),
                             ["model.embed_tokens.weight"]),
    "Inf in the head": (lambda f: edit_tensor(f, "lm_head.weight", lambda t: poke(t, float("-inf"))), ["lm_head.weight"]),
    "weights that overflow": (lambda f: edit_tensor(f, "model.layers.1.mlp.experts.3.down_proj.weight",
                                                    lambda t: torch.full_like(t, 3e38)), ["layer"]),
    "config: another hidden size": (set_config(hidden_size=128), ["config.json"]),
    "config: more experts": (set_config(num_local_experts=16), ["experts.8", "16 experts"]),
    "config: fewer experts": (set_config(num_local_experts=4), ["experts.4", "4 experts"]),
    "config: more layers": (set_config(num_hidden_layers=4), ["model.layers.3"]),
    "config: fewer layers": (set_config(num_hidden_layers=2), ["model.layers.2"]),
    "config: another vocabulary": (set_config(vocab_size=500), ["512", "500"]),
    "config: more experts a token than there are": (set_config(num_experts_per_tok=9), ["9", "8"]),
    "config: no expert a token": (set_config(num_experts_per_tok=0), ["0"]),
    "config: an unknown activation": (set_config(hidden_act="selu2"), ["config.json", "selu2"]),
    "config: a number as text": (set_config(hidden_size="sixty-four"), ["config.json", "hidden_size"]),
    "config: a negative size": (set_config(moe_intermediate_size=-64), ["config.json"]),
    "config: no layers": (set_config(num_hidden_layers=0), ["Mixture-of-Experts"]),
    "config: a list": (lambda f: (f / "config.json").write_text("[1]"), ["config.json", "list"]),
    "config: unknown model": (set_config(model_type="qwen17", architectures=["Qwen17"]), ["qwen17"]),
    "config: no model type": (drop_config("model_type", "architectures"), ["model"]),
    "config: its own code": (set_config(model_type="mine", auto_map={"AutoConfig": "mine.Config"}), ["--trust-remote-code"]),
    "config: an unknown dtype": (set_config(dtype="bfloat17"), ["bfloat17"]),
    "config.json cut": (lambda f: truncate(f / "config.json", 100), ["config.json", "JSON"]),
    "config.json empty": (lambda f: truncate(f / "config.json", 0), ["config.json", "JSON"]),
    "config.json binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00\x01" * 9), ["config.json"]),
    "config.json missing": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "config.json nested too deeply": (lambda f: (f / "config.json").write_text("[" * 100_000), ["config.json"]),
    "index cut": (lambda f: truncate(f / INDEX, 500), [INDEX, "JSON"]),
    "index empty": (lambda f: truncate(f / INDEX, 0), [INDEX]),
    "index binary": (lambda f: (f / INDEX).write_bytes(b"\xff\xfe\x00\x01" * 9), [INDEX]),
    "index a list": (lambda f: (f / INDEX).write_text("[]"), [INDEX]),
    "index without tensors": (in_index(lambda i: i.update(weight_map={})), []),
    "index with a list of tensors": (in_index(lambda i: i.update(weight_map=[1])), [INDEX]),
    "index with a number for a shard": (in_index(lambda i: i["weight_map"].update({GATE: 7})), [INDEX]),
    "index above its folder": (in_index(lambda i: i["weight_map"].update({GATE: "../model-00001-of-00005.safetensors"})),
                               ["outside its folder", "../model-00001"]),
    "index at an absolute path": (in_index(lambda i: i["weight_map"].update({GATE: "/etc/passwd"})), ["outside its folder"]),
    "index with dots": (in_index(lambda i: i["weight_map"].update({GATE: ".."})), ["outside its folder"]),
    "header of 2**63 bytes": (malicious_header(2**63), ["model-0000", "damaged"]),
    "header of 2**64 - 1 bytes": (malicious_header(2**64 - 1), ["model-0000", "damaged"]),
    "header of zero bytes": (malicious_header(0), ["model-0000", "damaged"]),
    "header that is a list": (header(lambda r: [1, 2]), ["model-0000", "damaged"]),
    "header with an unknown dtype": (header(lambda r: r[GATE].update(dtype="Q7")), ["model-0000", "Q7"]),
    "header without a shape": (header(lambda r: r[GATE].pop("shape")), ["model-0000", "damaged"]),
    "header with a huge shape": (header(lambda r: r[GATE].update(shape=[2**62, 2**62])), ["model-0000", GATE]),
    "header with a negative shape": (header(lambda r: r[GATE].update(shape=[-64, -64])), ["model-0000", GATE]),
    "header with a fractional shape": (header(lambda r: r[GATE].update(shape=[64.0, 64.0])), ["model-0000", GATE]),
    "header with a shape of words": (header(lambda r: r[GATE].update(shape=["a", 64])), ["model-0000", "damaged"]),
    "header with negative offsets": (header(offsets(GATE, -8192, 0)), ["model-0000", GATE]),
    "header with overlapping tensors": (header(lambda r: r[GATE].update(data_offsets=[0, 8192])), ["model-0000", GATE]),
    "header with offsets behind the end": (header(offsets(GATE, 2**40, 2**40 + 8192)), ["model-0000", "damaged"]),
    "only pickled weights": (pickle_only, ["pickled", "pytorch_model.bin", "safetensors"]),
    "no weights at all": (lambda f: [p.unlink() for p in f.glob("model*")], ["No weights"]),
    "quantized by another tool": (set_config(quantization_config={"quant_method": "gptq", "bits": 4}), ["already quantized", "gptq"]),
    "quantization settings that are none": (set_config(quantization_config="yes"), ["quantization_config", "yes"]),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], ["tokenizer"]),
    "tokenizer cut": (lambda f: truncate(f / "tokenizer.json", 1000), ["tokenizer"]),
    "tokenizer of another format": (lambda f: (f / "tokenizer.json").write_text('{"version": "9"}'), ["tokenizer"]),
    "tokenizer settings cut": (lambda f: truncate(f / "tokenizer_config.json", 20), ["tokenizer"]),
    "tokenizer of a larger vocabulary": (lambda f: edit_json(f / "tokenizer.json", larger), ["tokenizer", "512"]),
}  # fmt: skip


def larger(tokenizer: dict) -> None:
    """The token for "e" moves behind the end of the embedding."""
    tokenizer["model"]["vocab"]["e"] = 600


@pytest.mark.parametrize("fault", CHECKPOINT_FAULTS)
def test_checkpoint_fault(fault, copy_of_tiny, moecompress, quick, tmp_path):
    plant, words = CHECKPOINT_FAULTS[fault]
    plant(copy_of_tiny)
    refused(moecompress("quantize", copy_of_tiny, "-o", tmp_path / "out", "--target-bits", 3.6, *quick), words)
    assert not (tmp_path / "out").exists()


def refused(ran, words: list[str]) -> None:
    assert ran.code == 2, ran
    assert ran.err.startswith("error: ") or "\nerror: " in ran.err, ran.err
    assert "Traceback" not in ran.err
    assert not ran.out
    said = ran.err[ran.err.index("error: ") :]
    for word in words:
        assert word in said, said


# --- what the command line is given ---------------------------------------------------------------------------------


def test_a_dense_model_is_refused(tmp_path, moecompress, quick, tokenizer_folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    shutil.copytree(tokenizer_folder, tmp_path / "llama", dirs_exist_ok=True)
    for command in (["quantize", tmp_path / "llama", "-o", tmp_path / "out", "--target-bits", 3, *quick], ["inspect", tmp_path / "llama"]):
        refused(moecompress(*command), ["LlamaForCausalLM", "not a Mixture-of-Experts", "moecompress convert"])


@pytest.mark.parametrize("target, words", [
    (["--target-size", "200kB"], ["cannot be reached", "200,000 bytes", "at least"]),
    (["--target-bits", 0.1], ["cannot be reached", "bits per expert weight", "0.1"]),
    (["--target-bits", 1.5, "--set", "allocate.drop=false", "--set", "allocate.slim=false"], ["cannot be reached", "bits per expert weight", "1.5"]),
    (["--target-size", "80 parsecs"], ["not a size", "14GB"]),
    (["--target-size", "-3MB"], ["not a size"]),
    (["--target-bits", 0], ["target.bits"]),
    (["--target-bits", "nan"], ["target.bits"]),
    (["--target-bits", 3, "--target-size", "1GB"], ["Two targets"]),
    ([], ["No target", "--target-size"]),
])  # fmt: skip
def test_target(target, words, tiny_model, tmp_path, moecompress, quick):
    refused(moecompress("quantize", tiny_model, "-o", tmp_path / "out", *target, *quick), words)
    assert not (tmp_path / "out").exists()


def test_smallest_size_that_is_named_is_reachable(tiny_model, tmp_path, moecompress, quick):
    for options in ([], ["--set", "allocate.drop=false"]):
        ran = moecompress("quantize", tiny_model, "-o", tmp_path / "out", "--target-size", "200kB", *options, *quick)
        least = int(ran.err.split("at least ")[1].split(" bytes")[0].replace(",", ""))
        refused(moecompress("plan", tiny_model, "--target-size", least - 1, *options, *quick), ["cannot be reached", f"{least:,}"])
        assert moecompress("plan", tiny_model, "--target-size", least, *options, *quick).code == 0


def test_recipe_faults(tiny_model, tmp_path, moecompress, quick):
    recipe = tmp_path / "recipe.yaml"
    for text, words in {
        "target: {bits: 3}\nquantise: {method: gptq}\n": [f"{recipe}:2:1", "quantise", "did you mean 'quantize'?"],
        "target: {bits: 3}\nquantize:\n  damp: 0.1\n": [f"{recipe}:3:3", "did you mean 'quantize.damping'?"],
        "target: {bits: three}\n": [f"{recipe}:1:10", "three"],
        "target: [3\n": [str(recipe), "YAML"],
        "": [str(recipe), "empty"],
    }.items():
        recipe.write_text(text)
        refused(moecompress("quantize", tiny_model, "-o", tmp_path / "out", "--recipe", recipe, *quick), words)
    recipe.write_bytes(b"\xff\xfe\x00")
    refused(moecompress("quantize", tiny_model, "-o", tmp_path / "out", "--recipe", recipe, *quick), [str(recipe)])
    refused(moecompress("quantize", tiny_model, "-o", tmp_path / "out", "--recipe", tmp_path / "recip.yaml", *quick), ["recip.yaml"])
    refused(moecompress("quantize", tiny_model, "-o", tmp_path / "out", "--set", "quantize.hesian=g", *quick),
            ["quantize.hesian", "did you mean 'quantize.hessian'?"])  # fmt: skip


@pytest.mark.parametrize("name, content, words", [
    ("empty.txt", b"", ["empty.txt", "empty"]),
    ("blank.txt", b" \n\n\t\n", ["blank.txt", "empty"]),
    ("short.txt", b"Not much to read.\n", ["short.txt", "too short", "288 tokens"]),
    ("binary.txt", bytes(range(256)) * 40, ["binary.txt", "not text"]),
    ("zeros.txt", bytes(5000), ["zeros.txt", "binary"]),
    ("latin.txt", "naïve café ".encode("latin-1") * 900, ["latin.txt", "UTF-8"]),
    ("pipe.jsonl", b'{"text": "fine"}\n{"text": \n', ["pipe.jsonl:2", "JSON"]),
    ("other.jsonl", b'{"prompt": "fine"}\n', ["other.jsonl:1", "prompt"]),
    ("broken.parquet", b"PAR1 no more", ["broken.parquet"]),
    ("picture.png", b"\x89PNG", ["picture.png", ".txt"]),
    (None, None, ["missing.txt"]),
])  # fmt: skip
def test_calibration_text(name, content, words, tiny_model, tmp_path, moecompress, quick):
    if name == "broken.parquet":
        pytest.importorskip("pyarrow")
    text = tmp_path / (name or "missing.txt")
    if content is not None:
        text.write_bytes(content)
    refused(moecompress("quantize", tiny_model, "-o", tmp_path / "out", "--target-bits", 3.6, *quick, "--text", text), words)
    assert not (tmp_path / "out").exists()


def test_model_that_is_not_there(tmp_path, moecompress, quick):
    out = ["-o", tmp_path / "out", "--target-bits", 3.6, *quick]
    refused(moecompress("quantize", tmp_path / "nowhere", *out), ["nowhere", "nothing there"])
    (tmp_path / "file").write_text("x")
    refused(moecompress("quantize", tmp_path / "file", *out), ["a file"])
    (tmp_path / "empty").mkdir()
    refused(moecompress("quantize", tmp_path / "empty", *out), ["config.json"])


# --- where it writes ------------------------------------------------------------------------------------------------


def test_output_is_never_overwritten(tiny_model, tmp_path, moecompress, quick):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    for command in ("quantize", "calibrate"):
        target = ["--target-bits", 3.6] if command == "quantize" else []
        refused(moecompress(command, tiny_model, "-o", out, *target, *quick), ["not empty", str(out)])
    assert (out / "precious").read_text() == "mine"
    refused(moecompress("quantize", tiny_model, "-o", out / "precious", "--target-bits", 3.6, *quick), ["precious"])


def test_output_under_a_file(tiny_model, packed_tiny, tmp_path, moecompress, quick):
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" / "out"
    refused(moecompress("quantize", tiny_model, "-o", out, "--target-bits", 3.6, *quick), ["file"])
    refused(moecompress("export", packed_tiny, "-o", out), ["file"])
    refused(moecompress("plan", tiny_model, "--target-bits", 3.6, "-o", out / "plan.json", *quick), ["file"])


def test_no_permission_to_write(tiny_model, packed_tiny, tmp_path, moecompress, quick, monkeypatch):
    """Root may write anywhere, so the test takes a folder in which even root may not make files."""
    closed = Path("/proc/self")
    refused(moecompress("quantize", tiny_model, "-o", closed / "out", "--target-bits", 3.6, *quick), ["/proc/self"])
    refused(moecompress("export", packed_tiny, "-o", closed / "out"), ["/proc/self"])
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o555)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != shut)  # for root
    refused(moecompress("quantize", tiny_model, "-o", shut / "out", "--target-bits", 3.6, *quick), ["shut", "write permission"])


def test_no_permission_to_read(copy_of_tiny, tmp_path, moecompress, quick, monkeypatch):
    shard = shard_of(copy_of_tiny, GATE)
    opened = Path.open

    def closed(path, *args, **kwargs):
        if path == shard:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", closed)
    refused(moecompress("quantize", copy_of_tiny, "-o", tmp_path / "out", "--target-bits", 3.6, *quick), ["Permission denied", shard.name])


@contextmanager
def files_of_at_most(size: int):
    """The kernel refuses to let a file grow beyond ``size``: the same path through every writer as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [50, 3_000, 20_000, 60_000, 120_000])
def test_disk_that_fills_up(size, tiny_model, tmp_path, moecompress, quick):
    out = tmp_path / "out"
    with files_of_at_most(size):
        ran = moecompress("quantize", tiny_model, "-o", out, "--target-bits", 3.6, *quick)
    refused(ran, ["File too large"])
    assert not out.exists()
    assert moecompress("quantize", tiny_model, "-o", out, "--target-bits", 3.6, *quick).code == 0  # with room, it goes on


def test_disk_that_fills_up_while_exporting(packed_tiny, tmp_path, moecompress):
    with files_of_at_most(100_000):
        refused(moecompress("export", packed_tiny, "-o", tmp_path / "out"), ["File too large"])
    assert not (tmp_path / "out").exists()


def test_real_full_disk(tiny_model, tmp_path, moecompress, quick):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        refused(moecompress("quantize", tiny_model, "-o", disk / "out", "--target-bits", 3.6, *quick), ["disk is too full", "bytes free"])
        free = shutil.disk_usage
        shutil.disk_usage = lambda path: free("/")  # somebody else fills it up after we looked
        try:
            refused(moecompress("quantize", tiny_model, "-o", disk / "out", "--target-bits", 3.6, *quick), ["No space left on device"])
        finally:
            shutil.disk_usage = free
        assert not (disk / "out").exists()
    finally:
        subprocess.run(["umount", disk], check=True)


# --- compressed folders ---------------------------------------------------------------------------------------------


@pytest.fixture
def copy_of_packed(packed_tiny, tmp_path):
    return Path(shutil.copytree(packed_tiny, tmp_path / "packed"))


def uses(packed: Path, original: Path, text: Path, out: Path) -> list[list[object]]:
    """Every command that reads a compressed folder."""
    return [
        ["evaluate", packed, "--reference", original, "--text", text, "--sequences", 2, "--length", 16],
        ["export", packed, "-o", out],
        ["run", packed, "--prompt", "The", "-n", 2],
    ]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model-layer-00001-of-00003.safetensors", "model-rest-00000.safetensors", "config.json",
                                  "tokenizer.json", "moecompress/plan.json"])  # fmt: skip
def test_one_flipped_byte(name, copy_of_packed, tiny_model, text_file, tmp_path, moecompress):
    flip(copy_of_packed / name, (copy_of_packed / name).stat().st_size * 2 // 3)
    for command in uses(copy_of_packed, tiny_model, text_file, tmp_path / "dense"):
        early = command[0] == "run" and name == "tokenizer.json"  # run reads the tokenizer before it looks at hashes
        refused(moecompress(*command), ["tokenizer" if early else name])
    assert not (tmp_path / "dense").exists()


def test_missing_and_emptied_files(copy_of_packed, tiny_model, text_file, tmp_path, moecompress):
    shard = copy_of_packed / "model-layer-00001-of-00003.safetensors"
    data = shard.read_bytes()
    for damage in (lambda: shard.write_bytes(data[:-1]), lambda: shard.write_bytes(b""), shard.unlink):
        damage()
        for command in uses(copy_of_packed, tiny_model, text_file, tmp_path / "dense"):
            refused(moecompress(*command), [shard.name])
    shard.write_bytes(data)
    (copy_of_packed / "moecompress" / "manifest.json").write_text("{")
    for command in uses(copy_of_packed, tiny_model, text_file, tmp_path / "dense"):
        refused(moecompress(*command), ["manifest.json"])


def test_compressed_input_is_refused(packed_tiny, tmp_path, moecompress, quick):
    for command in (["quantize", packed_tiny, "-o", tmp_path / "out", "--target-bits", 3.6, *quick],
                    ["calibrate", packed_tiny, "-o", tmp_path / "out", *quick]):  # fmt: skip
        refused(moecompress(*command), ["already", "compressed", "original"])
    assert not (tmp_path / "out").exists()


def test_another_original_is_refused(packed_tiny, copy_of_tiny, text_file, moecompress):
    """Comparing with a model that this one was not made from is a mistake worth stopping."""
    set_config(vocab_size=500)(copy_of_tiny)
    refused(moecompress("evaluate", packed_tiny, "--reference", copy_of_tiny, "--text", text_file, "--sequences", 2, "--length", 16), ["512", "500"])


def test_export_of_an_ordinary_model_is_refused(tiny_model, tmp_path, moecompress):
    refused(moecompress("export", tiny_model, "-o", tmp_path / "out"), ["not a compressed folder"])
    refused(moecompress("export", tiny_model, "-o", tmp_path / "out", "--format", "zip"), ["zip", "dense"])
    refused(moecompress("export", tiny_model, "-o", tmp_path / "out", "--dtype", "float17"), ["float17"])


# --- anything else --------------------------------------------------------------------------------------------------


def test_random_damage_never_ends_in_a_traceback(tiny_model, packed_tiny, text_file, tmp_path, moecompress):
    """Cut every file at random places and flip random bits: the command works or says why not."""
    draw = random.Random(0)
    for folder in (tiny_model, packed_tiny):
        for original in sorted(path for path in folder.rglob("*") if path.is_file()):
            broken = Path(shutil.copytree(folder, tmp_path / "broken"))
            path = broken / original.relative_to(folder)
            data = original.read_bytes()
            for trial in range(3):
                if trial == 0:
                    path.write_bytes(data[: draw.randrange(len(data))])
                else:
                    path.write_bytes(data)
                    flip(path, draw.randrange(min(len(data), 2000)))
                command = ["inspect", broken] if folder == tiny_model else ["run", broken, "--prompt", "The", "-n", 1]
                ran = moecompress(*command)
                assert ran.code in (0, 2) and "Traceback" not in ran.err, (original.name, ran)
                assert ran.code == 0 or "error: " in ran.err
            shutil.rmtree(broken)
