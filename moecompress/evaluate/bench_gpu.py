"""How fast the experts of one layer are on a GPU: packed, and as bfloat16 matrices in grouped products (torch's own).

As evaluate/bench.py, with two differences. A step is captured as a CUDA graph, so that what is timed is the GPU's work and
not Python's. And bfloat16 gets what a model would use there: one grouped product for all experts of a projection.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import silu

from moecompress.errors import UserError
from moecompress.evaluate.bench import Shape, random_bank, random_tensor, routes, row_of
from moecompress.kernels import gpu_status
from moecompress.pack.scheme import Scheme
from moecompress.progress import notice, track
from moecompress.runtime.bank import PackedBank, turn, turn_back

WARM_UPS = 3  # steps before the capture: kernels are compiled, memory is found
COPY_BYTES = 1 << 28  # of one measurement of the memory

#: x (tokens, d), slots int32 (tokens · k): which expert each token is sent to -> (tokens · k, d)
Step = Callable[[Tensor, Tensor], Tensor]


def measure(shape: Shape, schemes: list[Scheme], batches: list[int], memory: int, rounds: int) -> dict:
    """As bench.measure, on the current CUDA device. UserError where there is none, or no kernels for it."""
    if not torch.cuda.is_available():
        raise UserError("there is no GPU to measure on", expected="a CUDA device that torch can use",
                        remedy="leave out --device to measure the CPU, or install a torch that was built for the GPU")  # fmt: skip
    if gpu_status().startswith("reference"):
        raise UserError("there are no kernels to measure on this GPU", got=gpu_status(), expected="triton, and compute capability 8.0 or more")
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    steps, sizes, experts = _contenders(shape, schemes, memory, device)
    if sum(sizes.values()) * experts < 2 * properties.L2_cache_size:
        notice("the weights fit the cache, so these are not the speeds of a large model; raise --memory")
    bandwidth = _bandwidth(device)
    results = []
    for batch in batches:
        chosen = [torch.tensor(routed, dtype=torch.int32).flatten() for routed in routes(shape, batch, experts, rounds + 1)]
        seconds = _time(steps, batch, shape, chosen, device)
        touched = statistics.mean(len(slots.unique()) for slots in chosen[1:])
        for name in steps:
            row = row_of(name, sizes[name], batch, touched, seconds)
            results.append(row | {"bandwidth_share": row["gigabytes_per_second"] / bandwidth})
    return {
        "instruction_set": f"{gpu_status()} on {properties.name}",
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": properties.L2_cache_size,
        "bandwidth_gigabytes_per_second": bandwidth,
        "weights_bytes": sum(sizes.values()) * experts,
        "hidden": shape.hidden,
        "width": shape.width,
        "top_k": shape.top_k,
        "experts_in_memory": experts,
        "rounds": rounds,
        "results": results,
    }


def packed_step(gate: PackedBank, up: PackedBank, down: PackedBank) -> Step:
    def product(bank: PackedBank, x: Tensor, slots: Tensor) -> Tensor:
        return turn_back(bank.matmul(x, slots), 0) if bank.turns else bank.matmul(x, slots)

    def step(x: Tensor, slots: Tensor) -> Tensor:
        x = (turn(x, 0) if gate.turns else x).repeat_interleave(len(slots) // len(x), dim=0, output_size=len(slots))
        inner = silu(product(gate, x, slots)) * product(up, x, slots)
        return product(down, turn(inner, 0) if down.turns else inner, slots)

    return step


def dense_step(gate: Tensor, up: Tensor, down: Tensor) -> Step:
    """Matrices (E, rows, cols), bfloat16."""
    numbers = torch.arange(1, len(gate) + 1, dtype=torch.int32, device=gate.device)

    def step(x: Tensor, slots: Tensor) -> Tensor:
        ordered, order = slots.sort(stable=True)
        ends = torch.searchsorted(ordered, numbers).int()
        own = x[order // (len(slots) // len(x))]
        inner = silu(_grouped(own, gate, ends)) * _grouped(own, up, ends)
        y = torch.empty(len(slots), down.shape[1], dtype=x.dtype, device=x.device)
        return y.index_copy_(0, order, _grouped(inner, down, ends))

    return step


def _grouped(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return torch._grouped_mm(x, weights.transpose(1, 2), offs=ends)


def _contenders(shape: Shape, schemes: list[Scheme], memory: int, device: torch.device
                ) -> tuple[dict[str, Step], dict[str, int], int]:  # fmt: skip
    """What is compared, the bytes of one expert in each form, and how many experts there are."""
    d, m = shape.hidden, shape.width
    shapes = ((m, d), (m, d), (d, m))
    sizes = {scheme.name: sum(scheme.price(*one) for one in shapes) for scheme in schemes} | {"bfloat16": 6 * d * m}
    if (needed := sum(sizes.values()) * shape.top_k) > memory:
        raise UserError("not enough memory for one token's experts", expected=f"{needed} bytes", got=f"{memory} bytes",
                        remedy="raise --memory, or ask for fewer codes")  # fmt: skip
    experts = min(memory // sum(sizes.values()), shape.experts)
    steps = {scheme.name: packed_step(*(random_bank(scheme, experts, *one).to(device) for one in shapes)) for scheme in schemes}
    steps["bfloat16"] = dense_step(*(random_tensor(experts, *one).bfloat16().to(device) for one in shapes))
    return steps, sizes, experts


def _time(steps: dict[str, Step], batch: int, shape: Shape, chosen: list[Tensor], device: torch.device) -> dict[str, float]:
    """Median seconds of each step; all take turns, and each time with other experts."""
    x = torch.randn(batch, shape.hidden, device=device).bfloat16()
    slots = chosen[0].to(device)
    graphs = {name: _captured(step, x, slots) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for routed in track(chosen, f"batch {batch}"):
        slots.copy_(routed)
        for name, graph in graphs.items():
            seconds[name].append(_seconds(graph.replay))
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def _captured(step: Step, x: Tensor, slots: Tensor) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            step(x, slots)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(x, slots)
    return graph


def _seconds(work: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _bandwidth(device: torch.device) -> float:
    """GB/s of a copy in the GPU's memory, bytes read and written."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / min(_seconds(lambda: target.copy_(source)) for _ in range(10)) / 1e9
