"""Arithmetic on integers with outliers, as torch operators: the integers' kernels, and what the outliers add.

On the CPU the latter runs the compiled library (cpu/outliers.cpp) where there is one, everywhere else plain torch. They are
registered as ``moecompress::outlier_matmul`` and ``moecompress::outlier_dequantize``, so torch.compile keeps them whole. No
gradients.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from moecompress.kernels import crowd, library, native, ops
from moecompress.pack import outliers
from moecompress.pack.int_format import IntBank
from moecompress.pack.outliers import SEGMENT, OutlierBank
from moecompress.progress import notice

INTERFACE = 1  # kInterface in outliers.cpp

_library = torch.library.Library("moecompress", "FRAGMENT")
_BANK = "Tensor codes, Tensor row_scales, Tensor? scales, Tensor? zeros, Tensor values, Tensor columns, int bits, int group, float share"
_library.define(f"outlier_matmul(Tensor x, Tensor slots, {_BANK}) -> Tensor")
_library.define(f"outlier_dequantize({_BANK}, int cols, ScalarType dtype, Tensor? index=None) -> Tensor")


class _Outliers(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "slots", "values", "columns", "segment", "y")),
        *((name, ctypes.c_int64) for name in ("batch", "count", "k", "rows", "segments")),
    )


def matmul(x: Tensor, slots: Tensor, bank: OutlierBank) -> Tensor:
    """Row s of the result is matrix ``slots[s]`` of the bank times row s of ``x``; zeros where ``slots[s]`` is -1.

    x (S, cols) float32, bfloat16 or float16; slots int32 (S,). -> (S, rows), x.dtype. The integers' product is rounded to that
    before the outliers' is added in float32. Raises UserError if a tensor does not fit the format, or a slot is outside.
    """
    return torch.ops.moecompress.outlier_matmul(x, slots, *_tensors(bank), bank.dense.bits, bank.dense.group, bank.share)


def dequantize(bank: OutlierBank, dtype: torch.dtype = torch.float32, index: Tensor | None = None) -> Tensor:
    """Matrices (n, rows, cols) of the bank, or those that ``index`` (int64, any order) selects along n."""
    settings = (bank.dense.bits, bank.dense.group, bank.share, bank.dense.cols)
    return torch.ops.moecompress.outlier_dequantize(*_tensors(bank), *settings, dtype, index)


def _tensors(bank: OutlierBank) -> tuple[Tensor | None, ...]:
    dense = bank.dense
    return dense.codes, dense.row_scales, dense.scales, dense.zeros, bank.values, bank.columns


def _matmul(x: Tensor, slots: Tensor, codes: Tensor, row_scales: Tensor, scales: Tensor | None, zeros: Tensor | None,
            values: Tensor, columns: Tensor, bits: int, group: int, share: float) -> Tensor:  # fmt: skip
    bank = OutlierBank(IntBank(codes, row_scales, scales, zeros, bits, group, x.shape[-1]), values, columns, share)
    ops.check_operands(x, slots, bank.dense)
    outliers.check_added(bank)
    if x.dtype == torch.float16:
        return matmul(x.float(), slots, bank).to(torch.float16)
    dense_type = torch.bfloat16 if x.dtype == torch.bfloat16 and native.multiplies_bfloat16() else torch.float32
    dense = crowd.crowded(slots, ops.CROWD[dense_type]) if x.device.type == "cpu" else []

    def few(x: Tensor, slots: Tensor) -> Tensor:
        return ops.multiply(x, slots, bank.dense).add_(_added(x, slots, bank))

    def unpack(slot: int, first: int, last: int, out: Tensor) -> None:
        out.copy_(_rows(bank, slice(slot, slot + 1), first, last)[0])

    if not dense:
        return few(x, slots)
    crowd.check_range("slots", slots, -1, bank.dense.count)
    return crowd.multiply(x, slots, dense, bank.dense.rows, dense_type, few, unpack)


def _added(x: Tensor, slots: Tensor, bank: OutlierBank) -> Tensor:
    """float32 (S, rows): what the outliers add to the product."""
    if x.device.type == "cpu" and _ready():
        return added(x, slots, bank)
    index = outliers.index_of(bank)
    empty = x.new_zeros(bank.dense.rows, bank.dense.cols, dtype=torch.float32)

    def matrix(slot: int) -> Tensor:
        return empty.scatter_add(1, index[slot].T, bank.values[slot].T.float())

    return crowd.by_matrix(x.float(), slots, slots.unique().tolist(), bank.dense.rows, torch.float32, matrix)


def added(x: Tensor, slots: Tensor, bank: OutlierBank) -> Tensor:
    """As `_added`, by the library; everything on the CPU, operands checked but for the slots."""
    segments = -(-bank.dense.cols // SEGMENT)
    padded = torch.nn.functional.pad(x.float(), (0, segments * SEGMENT - x.shape[1])).contiguous()
    segment = _segments(bank.dense.cols, bank.share)
    values, columns, slots = bank.values.contiguous(), bank.columns.contiguous(), slots.contiguous()
    y = torch.zeros(x.shape[0], bank.dense.rows)
    count, k, rows = values.shape
    job = _Outliers(*(t.data_ptr() for t in (padded, slots, values, columns, segment, y)), len(x), count, k, rows, segments)
    found = _load()
    assert found is not None
    library.run(found, "moec_outliers_add", job)
    return y


@cache
def _segments(cols: int, share: float) -> Tensor:
    return outliers.starts(cols, share) // SEGMENT


def _rows(bank: OutlierBank, matrices: slice | Tensor, first: int = 0, last: int | None = None) -> Tensor:
    """Rows first ... last - 1 of some matrices, float32."""
    some = outliers.select(bank, matrices)
    dense = {name: tensor[:, first:last] for name, tensor in some.dense.tensors().items()}
    part = replace(some, dense=replace(some.dense, **dense), values=some.values[..., first:last], columns=some.columns[..., first:last])
    return outliers.add_to(ops.dequantize(part.dense), part)


def _dequantize(codes: Tensor, row_scales: Tensor, scales: Tensor | None, zeros: Tensor | None, values: Tensor, columns: Tensor,
                bits: int, group: int, share: float, cols: int, dtype: torch.dtype, index: Tensor | None = None) -> Tensor:  # fmt: skip
    bank = OutlierBank(IntBank(codes, row_scales, scales, zeros, bits, group, cols), values, columns, share)
    outliers.check(bank)
    if index is not None:
        crowd.check_range("index", index, 0, bank.dense.count)
    return _rows(bank, slice(None) if index is None else index).to(dtype)


@cache
def _ready() -> bool:
    if _load() is not None:
        return True
    notice("no compiled kernels for outliers, experts with them run slowly; install moecompress where a C++ compiler is")
    return False


def _load() -> ctypes.CDLL | None:
    return library.load("outliers", INTERFACE)


_library.impl("outlier_matmul", _matmul, "CompositeExplicitAutograd")
_library.impl("outlier_dequantize", _dequantize, "CompositeExplicitAutograd")


@torch.library.register_fake("moecompress::outlier_matmul")
def _matmul_shape(x, slots, codes, row_scales, scales, zeros, values, columns, bits, group, share):
    return x.new_empty(x.shape[0], codes.shape[1])


@torch.library.register_fake("moecompress::outlier_dequantize")
def _dequantize_shape(codes, row_scales, scales, zeros, values, columns, bits, group, share, cols, dtype, index=None):
    return codes.new_empty(codes.shape[0] if index is None else index.shape[0], codes.shape[1], cols, dtype=dtype)
