"""The GPU kernels through Triton's compiler, down to machine code, for GPUs that are not here: the interpreter takes what the
compiler refuses. Run by test_triton.py in a process of its own, since it tells Triton of a GPU that does not exist."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from moecompress.kernels.triton import dictionary, few_values, integers, launch, rotation, trellis
from moecompress.pack import dictionary as dictionary_format
from moecompress.pack.scheme import Scheme
from moecompress.pack.trellis import TrellisBank
from moecompress.runtime.bank import make_bank

#: bytes of shared memory that a program may take on consumer GPUs since Ampere
SHARED = 99 << 10


class AbsentGpu:
    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it compiled by this number

    def get_current_stream(self, device: int) -> int:
        return 0


class CompileOnly:
    """Stands for a kernel: where it would be launched, it is compiled."""

    def __init__(self, kernel):
        self.kernel, self.done = kernel, []

    def __getitem__(self, grid):
        return lambda *arguments, **named: self.done.append(self.kernel.warmup(*arguments, grid=grid, **named))


@pytest.fixture
def compiled(monkeypatch):
    """Compiles what ``call`` launches of ``module``, for one of two kinds of matrix units; -> the only launch, compiled."""
    monkeypatch.setattr(launch, "_matrix_type", lambda x: tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float32)

    def compile(module, call, capability=90):
        driver.set_active(AbsentGpu(capability))
        kernel = CompileOnly(module._kernel)
        monkeypatch.setattr(module, "_kernel", kernel)
        call()
        (done,) = kernel.done
        return done

    return compile


@pytest.mark.parametrize(
    ("code", "size", "count", "rows", "capability"),
    [("b3g32a", 300, 4, 70, 86), ("ternary", 40, 1, 1, 86), ("t1_25", 2, 1, 1, 90), ("t2", 300, 2, 64, 90)],
)
def test_kernels_compile(compiled, code, size, count, rows, capability):
    module = make_bank(Scheme.parse(code), count, rows, 160, torch.bfloat16)
    kind = torch.float32 if code.startswith("t") and code != "ternary" else torch.bfloat16
    x, slots, bank = torch.zeros(size, 160, dtype=kind), torch.zeros(size, dtype=torch.int32), module.bank()
    family = trellis if isinstance(bank, TrellisBank) else integers if code.startswith("b") else few_values
    kernel = compiled(family, lambda: family.matmul(x, slots, bank), capability)
    assert len(kernel.asm["cubin"]) and kernel.metadata.shared <= SHARED


@pytest.mark.parametrize("size", [2, 9])
def test_words_compile(compiled, size, monkeypatch):
    monkeypatch.setattr(dictionary, "LONGEST", 2)  # the rest is the same again
    bank = dictionary_format.pack(torch.ones(2, 70, 160, dtype=torch.uint8), torch.zeros(2, 70, 2).bfloat16(), (960, 15000))
    x, slots, book = torch.zeros(size, 160), torch.zeros(size, dtype=torch.int32), torch.zeros(2**16, dtype=torch.int64)
    call = partial(dictionary.matmul, x, slots, bank, book) if size < 5 else partial(dictionary.as_ternary, bank, book)
    assert len(compiled(dictionary, call).asm["cubin"])


def test_the_rotation_compiles(compiled):
    kernel = compiled(rotation, lambda: rotation.rotate(torch.zeros(3, 300), torch.ones(300), True))
    assert len(kernel.asm["cubin"]) and kernel.metadata.shared <= SHARED
