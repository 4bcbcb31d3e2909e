"""The whole evaluation of a folder: divergence, size, speed, memory. One flat record."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from moecompress.calibrate.data import token_batches
from moecompress.errors import UserError
from moecompress.evaluate.divergence import compare, trace
from moecompress.model.anatomy import IGNORED
from moecompress.model.checkpoint import resolve
from moecompress.model.skeleton import compute_dtype, load_tokenizer
from moecompress.model.walk import OpenModel
from moecompress.pack.manifest import expert_bytes
from moecompress.progress import track
from moecompress.runtime.loading import load, prepare, verify_files

DECODE_TOKENS = 32


def evaluate(model: str, reference: str, text: str, sequences: int, length: int, dtype: str = "auto", speed: bool = True,
             trust_remote_code: bool = False, load_bits: int | None = None) -> dict[str, Any]:  # fmt: skip
    """See `moecompress evaluate --help`. ``model`` may be compressed or not (then its own divergence is measured)."""
    original = resolve(reference)
    tokens = token_batches(load_tokenizer(original, trust_remote_code), text, sequences, length)
    record = measure(resolve(model), original, tokens.ids, dtype, speed, trust_remote_code, load_bits)
    return record | {"model": str(model), "reference": str(reference), "text": text}


def measure(folder: Path, original: Path, ids: torch.Tensor, dtype: str = "auto", speed: bool = True,
            trust_remote_code: bool = False, load_bits: int | None = None) -> dict[str, Any]:  # fmt: skip
    """The record of `moecompress evaluate` for token ids [N, L]. Sizes are of what is loaded at ``load_bits``."""
    verify_files(folder)
    batches = list(ids.split(1))
    precision = compute_dtype(original, dtype)
    first = OpenModel(original, precision, trust_remote_code)
    second = OpenModel(folder, first.dtype, trust_remote_code, prepare=prepare(folder, load_bits=load_bits))
    if set(first.anatomy.moe) != set(second.anatomy.moe) or first.config.vocab_size != second.config.vocab_size:
        raise UserError(f"{folder} was not made from {original}", expected=f"{len(first.anatomy.moe)} MoE layers, vocabulary "
                        f"{first.config.vocab_size}", got=f"{len(second.anatomy.moe)} and {second.config.vocab_size}",
                        remedy="pass the original as --reference")  # fmt: skip
    divergence = compare(second, batches, trace(first, batches))
    files = sorted(folder.glob("*.safetensors"))
    left_out = 0 if load_bits is None else sum(t.nbytes for t in second.anatomy.tensors if t.role == IGNORED and "_banks." in t.name)
    packed = expert_bytes(files) - left_out
    record = divergence.summary()
    record |= {
        "model": folder.name,
        "reference": original.name,
        "compute_dtype": str(first.dtype).removeprefix("torch."),
        "bits_per_weight": 8 * (packed or _dense_expert_bytes(second)) / first.anatomy.expert_weights,
        "total_bytes": sum(file.stat().st_size for file in files) - left_out,
        "reference_bytes": sum(file.stat().st_size for file in original.glob("*.safetensors")),
    }
    if load_bits is not None:
        record["load_bits"] = load_bits
    if speed:
        record["tokens_per_second"] = decode_speed(load(folder, trust_remote_code=trust_remote_code, load_bits=load_bits), ids[0])
    record["peak_memory_bytes"] = peak_memory()
    return record


def _dense_expert_bytes(opened: OpenModel) -> int:
    return sum(tensor.nbytes for tensor in opened.anatomy.tensors if tensor.role == "expert")


def decode_speed(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Tokens per second of one-token decoding: the text of token ids [L], and behind its end what the model says."""
    steps = decoding(model, ids)
    return 1 / median(next(steps) for _ in track(range(DECODE_TOKENS), "decode speed"))


def decoding(model: PreTrainedModel, ids: torch.Tensor) -> Iterator[float]:
    """Seconds of each token behind the first few; see `decode_speed`. Experts are chosen, and skipped, as on that text."""
    prompt = ids[None, :32]
    name, read = "input_ids", {}
    with torch.no_grad():
        if model.config.is_encoder_decoder:  # it reads the prompt once, and decodes behind it
            name, read = "decoder_input_ids", {"encoder_outputs": model.get_encoder()(input_ids=prompt)}
        past = model(**{name: prompt}, **read, use_cache=True)
    for place in count(prompt.shape[1]):
        start = time.perf_counter()
        with torch.no_grad():
            last = ids[None, place : place + 1] if place < len(ids) else past.logits[:, -1:].argmax(-1)
            past = model(**{name: last}, **read, past_key_values=past.past_key_values, use_cache=True)
        yield time.perf_counter() - start


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
