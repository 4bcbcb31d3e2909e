"""How fast the experts of one layer are, packed and as dense matrices, with weights that are not in the cache.

A step is what one MoE layer does for a batch of tokens: gate, up and down projection of the chosen experts, in packed
form (rotation included where the code has one) or expert by expert with torch's dense linear layers. Every step uses other
experts than the step before, and all contenders take turns, so that weights come from memory as they do in a model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from moecompress.errors import UserError
from moecompress.kernels import native
from moecompress.kernels.ops import native_status
from moecompress.pack.scheme import DICTIONARY, LOW_RANK, Scheme
from moecompress.progress import notice, track
from moecompress.quantize.encode import Settings, encode
from moecompress.runtime.bank import PackedBank, SharedBasis, make_bank, turn, turn_back


@dataclass(frozen=True)
class Shape:
    """The experts of one layer."""

    hidden: int  # d
    width: int  # m
    experts: int
    top_k: int


SHAPES = {
    "mixtral": Shape(4096, 14336, 8, 2),
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8),
    "olmoe": Shape(2048, 1024, 64, 8),
    "deepseek-v3": Shape(7168, 2048, 256, 8),
}

READ_BYTES = 1 << 26  # of one measurement of the memory
DENSE = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Contender:
    name: str
    bytes_per_expert: int
    dtype: torch.dtype  # of x
    step: Callable[[Tensor, list[list[int]]], None]  # x (tokens, d); for each token the experts it is sent to


def measure(shape: Shape, schemes: list[Scheme], batches: list[int], memory: int, rounds: int) -> dict:
    """Microseconds per token of every contender at every batch size, and the machine's memory bandwidth.

    memory: bytes that all weights together may take. rounds: steps of each contender; medians are reported.
    """
    contenders, experts = _contenders(shape, schemes, memory)
    weights_bytes = sum(contender.bytes_per_expert for contender in contenders) * experts
    if weights_bytes < 2 * last_level_cache():
        notice("the weights fit the cache, so these are not the speeds of a large model; raise --memory")
    buffer = torch.ones(max(READ_BYTES, min(memory // 4, 2 * last_level_cache())), dtype=torch.uint8)
    results: list[dict] = []
    reads: list[float] = []
    for batch in batches:
        seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        inputs = {dtype: torch.randn(batch, shape.hidden).to(dtype) for dtype in DENSE.values()}
        touched = []
        for routed in track(list(routes(shape, batch, experts, rounds + 1)), f"batch {batch}"):
            touched.append(len({expert for token in routed for expert in token}))
            for contender in contenders:
                start = time.perf_counter()
                contender.step(inputs[contender.dtype], routed)
                seconds[contender.name].append(time.perf_counter() - start)
            reads.append(_bandwidth(buffer, len(reads)))
        medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first is a warm-up
        for contender in contenders:
            results.append(row_of(contender.name, contender.bytes_per_expert, batch, statistics.mean(touched[1:]), medians))
    bandwidth = statistics.median(reads)
    for row in results:
        row["bandwidth_share"] = row["gigabytes_per_second"] / bandwidth
    return {
        "instruction_set": native_status(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache(),
        "bandwidth_gigabytes_per_second": bandwidth,
        "weights_bytes": weights_bytes,
        "hidden": shape.hidden,
        "width": shape.width,
        "top_k": shape.top_k,
        "experts_in_memory": experts,
        "rounds": rounds,
        "results": results,
    }


def last_level_cache() -> int:
    """Bytes of the last-level cache; 64 MiB if the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=64 << 20)


def _contenders(shape: Shape, schemes: list[Scheme], memory: int) -> tuple[list[Contender], int]:
    """The contenders that fit in memory, and how many experts each holds."""
    d, m = shape.hidden, shape.width
    shapes = ((m, d), (m, d), (d, m))
    sizes = {scheme.name: sum(scheme.price(*one) for one in shapes) for scheme in schemes}
    sizes |= {name: 3 * d * m * dtype.itemsize for name, dtype in DENSE.items()}
    if sum(sizes.values()) * shape.top_k > memory:
        notice("float32 is left out: with it the weights would not fit in --memory")
        del sizes["float32"]
    if (needed := sum(sizes.values()) * shape.top_k) > memory:
        raise UserError("not enough memory for one token's experts", expected=f"{needed} bytes", got=f"{memory} bytes",
                        remedy="raise --memory, or ask for fewer codes")  # fmt: skip
    # Beyond eight times the cache, more experts only take time to make.
    enough = max(shape.top_k, 8 * last_level_cache() // sum(sizes.values()))
    experts = min(memory // sum(sizes.values()), enough)
    contenders = []
    for scheme in schemes:
        banks = [random_bank(scheme, experts, *one) for one in shapes]
        contenders.append(Contender(scheme.name, sizes[scheme.name], torch.bfloat16, _packed_step(*banks)))
    for name, dtype in DENSE.items():
        if name in sizes:
            weights = [random_tensor(experts, *one).to(dtype) for one in shapes]
            contenders.append(Contender(name, sizes[name], dtype, _dense_step(*weights)))
    return contenders, experts


def _packed_step(gate: PackedBank, up: PackedBank, down: PackedBank) -> Callable[[Tensor, list[list[int]]], None]:
    def product(bank: PackedBank, x: Tensor, slots: Tensor, tokens: Tensor | None = None) -> Tensor:
        if isinstance(bank, SharedBasis) and tokens is not None:  # as in a model: once for each token
            return bank.of_reduced(bank.reduced(tokens).repeat_interleave(len(x) // len(tokens), dim=0), slots)
        return turn_back(bank.matmul(x, slots), 0) if bank.turns else bank.matmul(x, slots)

    def step(x: Tensor, routed: list[list[int]]) -> None:
        slots = torch.tensor([expert for token in routed for expert in token], dtype=torch.int32)
        tokens = turn(x, 0) if gate.turns else x
        x = tokens.repeat_interleave(len(routed[0]), dim=0)
        inner = silu(product(gate, x, slots, tokens)) * product(up, x, slots, tokens)
        product(down, turn(inner, 0) if down.turns else inner, slots)

    return step


def _dense_step(gate: Tensor, up: Tensor, down: Tensor) -> Callable[[Tensor, list[list[int]]], None]:
    def step(x: Tensor, routed: list[list[int]]) -> None:
        tokens: dict[int, list[int]] = {}
        for token, experts in enumerate(routed):
            for expert in experts:
                tokens.setdefault(expert, []).append(token)
        for expert, rows in tokens.items():
            own = x[rows]
            linear(silu(linear(own, gate[expert])) * linear(own, up[expert]), down[expert])

    return step


def routes(shape: Shape, batch: int, experts: int, rounds: int) -> Iterator[list[list[int]]]:
    """For every round, for every token, its experts.

    Tokens choose at random among the layer's experts (so many share one as in a model); what they choose is then
    given the experts in memory in turn, those used longest ago first.
    """
    generator = torch.Generator().manual_seed(0)
    available, turn = min(shape.experts, experts), 0
    for _ in range(rounds):
        chosen = [torch.randperm(available, generator=generator)[: shape.top_k].tolist() for _ in range(batch)]
        named: dict[int, int] = {}
        for expert in (expert for token in chosen for expert in token):
            if expert not in named:
                named[expert], turn = turn % experts, turn + 1
        yield [[named[expert] for expert in token] for token in chosen]


def random_bank(scheme: Scheme, count: int, rows: int, cols: int) -> PackedBank:
    """Codes of any bits that the format allows, the same in every matrix, with scales that keep numbers small. Where not all
    bits are allowed: a matrix of normal numbers, rounded to nearest."""
    scheme = scheme.fitted(cols)
    bank = make_bank(scheme, count, rows, cols, torch.bfloat16)
    coded = {}
    if scheme.code in (DICTIONARY, LOW_RANK):
        normal = torch.randn(1, rows, cols, generator=torch.Generator().manual_seed(0)) / 64
        coded = encode(normal, None, scheme, Settings(method="rtn")).bank.tensors()
    for name, tensor in bank.named_buffers():
        if name in coded:
            tensor.copy_(coded[name])
        elif tensor.dtype == torch.uint8:
            tensor.copy_(torch.randint(0, 243, (1, *tensor.shape[1:]), dtype=torch.uint8))  # five trits are below 243
        else:
            tensor.fill_(1e-4)
    return bank


def random_tensor(*shape: int) -> Tensor:
    return (torch.randn(1, *shape[1:]) / 64).expand(shape)


def _bandwidth(buffer: Tensor, turn: int) -> float:
    """GB/s of reading the next part of the buffer."""
    data = buffer.split(READ_BYTES)[turn % (buffer.numel() // READ_BYTES)]
    start = time.perf_counter()
    if native_status().startswith("reference"):
        data.view(torch.int64).sum()
    else:
        native.read(data, torch.get_num_threads())
    return data.nbytes / (time.perf_counter() - start) / 1e9


def row_of(name: str, bytes_per_expert: int, batch: int, touched: float, medians: dict[str, float]) -> dict:
    """What is reported of one contender. medians: seconds of a step, of all of them."""
    seconds = medians[name]
    row = {
        "weights": name,
        "batch": batch,
        "experts_per_step": touched,
        "microseconds_per_token": seconds * 1e6 / batch,
        "gigabytes_per_second": touched * bytes_per_expert / seconds / 1e9,
    }
    for dense in DENSE:
        if dense in medians:
            row[f"times_as_fast_as_{dense}"] = medians[dense] / seconds
    return row
