"""The compiled CPU library (cpu/int_matmul.cpp), through ctypes.

It is built when the package is installed; without it `status` says why, and callers use reference.py.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from moecompress.errors import UserError
from moecompress.pack import int_format
from moecompress.pack.int_format import IntBank

INTERFACE = 3  # kInterface in int_matmul.cpp

_TYPES = {torch.float32: 0, torch.bfloat16: 1}  # Type in int_matmul.cpp
_BAD_BANK, _BAD_SLOT, _NO_MEMORY = 1, 2, 4  # Status in int_matmul.cpp


class _Bank(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "row_scales", "scales", "zeros")),
        *((f"{name}_bytes", ctypes.c_int64) for name in ("codes", "row_scales", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("count", "rows", "cols")),
        *((name, ctypes.c_int32) for name in ("bits", "group", "has_scales", "has_zeros")),
    )


def status() -> str:
    """ "avx512_vnni", "avx512", "avx2", "neon" or "scalar"; or "reference: <why the library is not there>"."""
    library = _load()
    return library if isinstance(library, str) else library.moec_instruction_set().decode()


def choose(instruction_set: str) -> bool:
    """Use this instruction set from now on; False if the machine lacks it. For tests and benchmarks."""
    library = _load()
    return not isinstance(library, str) and library.moec_choose(instruction_set.encode()) == 0


def contiguous(bank: IntBank) -> IntBank:
    """The bank itself if its tensors are contiguous, as the functions below need them; else a copy."""
    if all(tensor.is_contiguous() for tensor in bank.tensors().values()):
        return bank
    copied = {name: tensor.contiguous() for name, tensor in bank.tensors().items()}
    return int_format.from_tensors(copied, bank.bits, bank.group, bank.cols)


def grouped_matmul(x: Tensor, slots: Tensor, bank: IntBank) -> Tensor:
    """As reference.grouped_matmul; x contiguous, float32 or bfloat16; everything on the CPU. Sizes are checked.

    On "avx512_vnni", bfloat16 x are taken as integers times a scale for each 4 to 16 neighbouring columns: exact down
    to 1/64 of the largest neighbour, and 2^-14 of it off at most below.
    """
    y = x.new_empty(x.shape[0], bank.rows)
    sizes = (x.data_ptr(), x.nbytes, slots.data_ptr(), x.shape[0], y.data_ptr(), y.nbytes, _TYPES[x.dtype])
    _run("moec_grouped_matmul", bank, *sizes)
    return y


def dequantize(bank: IntBank, index: Tensor, first: int, last: int, out: Tensor) -> None:
    """Write rows first ... last - 1 of the matrices that ``index`` (int64) names to ``out``.

    out (count, last - first, cols) contiguous, float32 or bfloat16.
    """
    sizes = (index.data_ptr(), index.shape[0], first, last, out.data_ptr(), out.nbytes, _TYPES[out.dtype])
    _run("moec_dequantize", bank, *sizes)


@cache
def multiplies_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 in hardware."""
    library = _load()
    return not isinstance(library, str) and bool(library.moec_multiplies_bfloat16())


def read(data: Tensor, threads: int) -> None:
    """Read the whole tensor once, as fast as the machine does."""
    library = _load()
    assert not isinstance(library, str), library
    library.moec_read(data.data_ptr(), data.nbytes, threads)


def _run(function: str, bank: IntBank, *arguments: int) -> None:
    library = _load()
    assert not isinstance(library, str), library
    tensors = (bank.codes, bank.row_scales, bank.scales, bank.zeros)
    pointers = (None if t is None else t.data_ptr() for t in tensors)
    sizes = (0 if t is None else t.nbytes for t in tensors)
    shape = (bank.count, bank.rows, bank.cols, bank.bits, bank.group)
    record = _Bank(*pointers, *sizes, *shape, bank.scales is not None, bank.zeros is not None)
    code = getattr(library, function)(ctypes.byref(record), *arguments, torch.get_num_threads())
    if code == _BAD_BANK:
        int_format.check(bank)  # names the tensor
    elif code == _BAD_SLOT:
        raise UserError(f"a slot points outside the bank of {bank.count} matrices", expected=f"-1 ... {bank.count - 1}")
    elif code == _NO_MEMORY:
        raise MemoryError("no memory for the activations of a packed matrix product")
    if code:
        raise ValueError(f"{function} refused its arguments (status {code})")


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    here = Path(__file__).parent
    found = [path for suffix in EXTENSION_SUFFIXES if (path := here / f"_int_matmul{suffix}").exists()]
    if not found:
        return "reference: the compiled library is missing; install moecompress where a C++ compiler is"
    try:
        library = ctypes.CDLL(str(found[0]))
        built = library.moec_interface()
    except (OSError, AttributeError) as error:
        return f"reference: {found[0].name} does not load ({error})"
    if built != INTERFACE:
        return f"reference: {found[0].name} belongs to another version; install moecompress again"
    _declare(library)
    library.moec_use_parallel(torch_threads())
    return library


def _declare(library: ctypes.CDLL) -> None:
    bank, pointer, size, number = ctypes.POINTER(_Bank), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.moec_instruction_set.restype = ctypes.c_char_p
    library.moec_choose.argtypes = [ctypes.c_char_p]
    library.moec_use_parallel.argtypes = [pointer]
    library.moec_use_parallel.restype = None
    library.moec_grouped_matmul.argtypes = [bank, pointer, size, pointer, size, pointer, size, number, number]
    library.moec_dequantize.argtypes = [bank, pointer, size, size, size, pointer, size, number, number]
    library.moec_read.argtypes = [pointer, size, number]
    library.moec_read.restype = ctypes.c_uint64


@cache
def torch_threads() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch uses, or None (then one thread works)."""
    # torch loads its runtime into the global scope; whichever library answers here answers torch's own calls too.
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
