"""Where the bytes are: a folder of safetensors shards, read one tensor at a time and written one shard at a time."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moecompress.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
#: Files that make a folder loadable besides weights: tokenizer, chat template, generation settings, learned routing policy,
#: code of the model.
COMPANIONS = re.compile(
    r"^(tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab.*|merges\.txt|chat_template.*|generation_config\.json|"
    r"preprocessor_config\.json|processor_config\.json|video_preprocessor_config\.json|moecompress_routing\.safetensors|.*\.model|LICENSE.*|NOTICE.*|.*\.py)$"
)
#: safetensors' own limit: what claims to be longer is an attack or an accident.
HEADER_LIMIT = 100_000_000
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint: which file, which bytes of it."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # absolute position in the file, bytes
    nbytes: int


class Checkpoint:
    """A local folder of safetensors files. Opening it reads and checks every header and no weights."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_config(folder)
        self.entries: dict[str, TensorEntry] = {}
        for shard, promised in _shards(folder).items():
            entries = read_header(folder / shard)
            if promised is not None:
                _compare_with_index(folder / shard, set(entries), promised)
            self.entries.update(entries)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def read(self, name: str) -> torch.Tensor:
        """The tensor ``name``; UserError if it holds NaN or Inf."""
        tensor = read_entry(self.entries[name])
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not torch.isfinite(tensor).all():
            raise UserError(
                f"Tensor {name} contains NaN or Inf", expected="finite weights",
                got=f"{int((~torch.isfinite(tensor)).sum())} non-finite values in {self.entries[name].file.name}",
                remedy="download the checkpoint again, or repair the model: nothing useful can be computed from it",
            )  # fmt: skip
        return tensor

    def fingerprint(self) -> str:
        """sha256 over the headers, sizes and modification times: changes when the checkpoint does, costs no reading."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.entries):
            entry = self.entries[name]
            stat = entry.file.stat()
            digest.update(f"{name} {entry.shape} {entry.dtype} {entry.start} {stat.st_size} {stat.st_mtime_ns}".encode())
        return digest.hexdigest()


def resolve(model: str | Path) -> Path:
    """A local folder as it is; a hub id is downloaded (safetensors and companions only) and its folder returned."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists() or str(model).startswith((".", "/", "~")):
        raise UserError(f"No model folder at {model}", expected="a folder with config.json and *.safetensors",
                        got="a file" if folder.exists() else "nothing there", remedy="check the path")  # fmt: skip
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"Cannot get the model {model}", expected="a local folder or a reachable hub id",
                        got=str(error).splitlines()[0], remedy="check the spelling, the network, or pass a folder") from None  # fmt: skip


def read_config(folder: Path) -> dict:
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} is not a model folder", expected="a config.json", got="none",
                        remedy="pass the folder that holds config.json and the safetensors files")  # fmt: skip
    config = read_object(path)
    if not isinstance(config.get("quantization_config") or {}, dict):
        raise UserError(f"quantization_config in {path} is no section of settings", got=config["quantization_config"],
                        remedy="download config.json again")  # fmt: skip
    return config


def read_object(path: Path) -> dict:
    """A JSON file that holds an object."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON", got=str(error), remedy="download it again") from None
    if not isinstance(record, dict):
        raise UserError(f"{path} is damaged", expected="a JSON object", got=f"a {type(record).__name__}", remedy="download it again")
    return record


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors that a safetensors file lists; UserError if the file is truncated or malformed."""
    if not path.is_file():
        raise UserError(f"Shard {path.name} is missing", expected=f"{path} (named by {INDEX})", got="no such file",
                        remedy="download the missing shard")  # fmt: skip
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise _damaged(path, f"a header of {length} bytes", f"{size} bytes in the file")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {name: _entry(name, path, 8 + length, info) for name, info in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(path, "a safetensors header", f"{type(error).__name__}: {error}") from None
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.nbytes)):
        if entry.start != end:
            raise _damaged(path, f"the bytes of {entry.name} behind those of the tensor before it", "a gap or an overlap")
        end += entry.nbytes
    if end != size:
        raise _damaged(path, f"{end} bytes, as the header says", f"{size} bytes")
    return entries


def _entry(name: str, path: Path, data: int, info: dict) -> TensorEntry:
    dtype, shape, (first, last) = DTYPES[info["dtype"]], tuple(info["shape"]), info["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
        raise ValueError(f"{name}: shape {shape}, offsets {first} to {last}")
    if (needed := math.prod(shape) * dtype.itemsize) != last - first:
        raise _damaged(path, f"{needed} bytes for {name}", f"{last - first}")
    return TensorEntry(name, path, dtype, shape, data + first, last - first)


def read_entry(entry: TensorEntry) -> torch.Tensor:
    """Plain reads instead of a memory map: mapped pages would count as resident memory of the whole run."""
    data = torch.empty(entry.nbytes, dtype=torch.uint8)
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        if file.readinto(memoryview(data.numpy())) != entry.nbytes:
            raise _damaged(entry.file, f"{entry.nbytes} bytes for {entry.name}", "the end of the file")
    return data.view(entry.dtype).reshape(entry.shape)


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor], durable: bool = True) -> None:
    """Write a shard under its name only when it is complete (write, sync unless not ``durable``, rename).

    Tensor after tensor: the library's own function copies all of them first, which for a layer is too much memory.
    """
    partial = path.with_name(path.name + ".partial")
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    try:
        with partial.open("wb") as file:
            file.write(_header(ordered))
            for _, tensor in ordered:
                file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"Cannot write {path.name}", got=str(error), remedy="free disk space or check permissions") from None
    if durable:
        sync_file(partial)
    os.replace(partial, path)


def _header(ordered: Iterable[tuple[str, torch.Tensor]]) -> bytes:
    """The length and the JSON text that a safetensors file begins with; data starts at a multiple of 8."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_index(folder: Path, shards: Iterable[Path]) -> None:
    """The index that transformers reads: which tensor is in which shard."""
    weight_map: dict[str, str] = {}
    total = 0
    for shard in shards:
        for name, entry in read_header(shard).items():
            weight_map[name] = shard.name
            total += entry.nbytes
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=1)
    write_text(folder / INDEX, text)


def write_text(path: Path, text: str) -> None:
    """Atomic text file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    sync_file(partial)
    os.replace(partial, path)


def copy_companions(source: Path, target: Path) -> None:
    """Copy a checkpoint's small files (tokenizer, generation settings, ...) into the folder ``target``."""
    for path in source.iterdir():
        if path.is_file() and COMPANIONS.match(path.name):
            shutil.copyfile(path, target / path.name)


def give_name(ready: Path, out: Path) -> None:
    """A finished folder gets its name; ``out`` is missing or empty."""
    if out.exists():
        out.rmdir()
    os.replace(ready, out)


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shards(folder: Path) -> dict[str, set[str] | None]:
    """Shard file name -> the tensors that the index promises in it (None: there is no index)."""
    index = folder / INDEX
    if index.exists():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise UserError(f"{index} is damaged", expected="a weight_map of tensor names and file names", remedy="download it again")
        shards: dict[str, set[str] | None] = {}
        for name, shard in weight_map.items():
            if Path(shard).name != shard or shard == "..":
                raise UserError(f"{index} points outside its folder", got=shard, remedy="do not use this checkpoint")
            promised = shards.setdefault(shard, set())
            assert promised is not None
            promised.add(name)
        return shards
    if (folder / SINGLE).exists():
        return {SINGLE: None}
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise UserError(f"{folder} holds only pickled weights", expected="*.safetensors", got=", ".join(pickles[:3]),
                        remedy="convert it first with a tool you trust: unpickling a file can run any code in it")  # fmt: skip
    raise UserError(f"No weights in {folder}", expected=f"{SINGLE} or {INDEX}", got="neither", remedy="check the path")


def _compare_with_index(path: Path, found: set[str], promised: set[str]) -> None:
    missing, extra = sorted(promised - found), sorted(found - promised)
    if missing:
        raise UserError(f"Tensor {missing[0]} is missing from {path.name}", expected=f"{len(promised)} tensors, as in {INDEX}",
                        got=f"{len(found)}", remedy="download the shard again")  # fmt: skip
    if extra:
        raise UserError(f"Tensor {extra[0]} of {path.name} is not in the index", expected=f"every tensor listed in {INDEX}",
                        got=f"{len(extra)} unlisted", remedy="download the index again")  # fmt: skip


def _damaged(path: Path, expected: str, got: str) -> UserError:
    return UserError(f"Shard {path.name} is truncated or damaged", expected=expected, got=got, remedy="download it again")
