"""The compiled rounding library (cpu/rounding.cpp), through ctypes. Without it quantize/gptq.py runs in plain torch."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from moecompress.kernels.native import torch_threads

INTERFACE = 1  # kInterface in rounding.cpp


class _Feedback(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "matrix", "scales", "zeros", "order", "codes")),
        *((name, ctypes.c_int64) for name in ("count", "rows", "cols", "groups", "width")),
        *((name, ctypes.c_int32) for name in ("bits", "descend")),
    )


class _Search(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "importance", "shrinks", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("count", "rows", "cols", "groups", "width", "tries", "steps")),
        *((name, ctypes.c_int32) for name in ("bits", "symmetric")),
    )


def available() -> bool:
    return _load() is not None


def feedback(values: torch.Tensor, matrix: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, codes: torch.Tensor,
             width: int, bits: int, order: torch.Tensor | None, descend: bool) -> None:  # fmt: skip
    """Fill ``codes`` uint8 [n, rows, cols] in place.

    Rounding with feedback: values are weights and matrix the upper factor, both in processing ``order`` [n, cols].
    Descent: values are pulls (W − Ŵ) H, matrix the Hessian, codes the current ones. scales, zeros: float32 [n, rows, G].
    """
    count, rows, cols = values.shape
    groups = scales.shape[-1]
    _check({"values": (values, (count, rows, cols)), "matrix": (matrix, (count, cols, cols)),
            "scales": (scales, (count, rows, groups)), "zeros": (zeros, (count, rows, groups))}, torch.float32)  # fmt: skip
    _check({"codes": (codes, (count, rows, cols))}, torch.uint8)
    if order is not None:
        _check({"order": (order, (count, cols))}, torch.int64)
    job = _Feedback(values.data_ptr(), matrix.data_ptr(), scales.data_ptr(), zeros.data_ptr(),
                    None if order is None else order.data_ptr(), codes.data_ptr(),
                    count, rows, cols, groups, width, bits, int(descend))  # fmt: skip
    _run("moec_feedback", job)


def search(weights: torch.Tensor, importance: torch.Tensor, shrinks: torch.Tensor, width: int, bits: int, symmetric: bool,
           steps: int) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Scales and zeros, float32 [n, rows, G], of weights [n, rows, cols] with importance [n, cols]."""
    count, rows, cols = weights.shape
    groups = -(-cols // width)
    _check({"weights": (weights, (count, rows, cols)), "importance": (importance, (count, cols)),
            "shrinks": (shrinks, (len(shrinks),))}, torch.float32)  # fmt: skip
    scales, zeros = torch.empty(count, rows, groups), torch.empty(count, rows, groups)
    job = _Search(weights.data_ptr(), importance.data_ptr(), shrinks.data_ptr(), scales.data_ptr(), zeros.data_ptr(),
                  count, rows, cols, groups, width, len(shrinks), steps, bits, int(symmetric))  # fmt: skip
    _run("moec_search", job)
    return scales, zeros


def _check(tensors: dict[str, tuple[torch.Tensor, tuple[int, ...]]], dtype: torch.dtype) -> None:
    for name, (tensor, shape) in tensors.items():
        if (
            tensor.dtype != dtype
            or tuple(tensor.shape) != shape
            or not tensor.is_contiguous()
            or tensor.device.type != "cpu"
        ):
            raise ValueError(
                f"{name} must be contiguous {dtype} {shape} on the CPU, got {tensor.dtype} {tuple(tensor.shape)}"
            )


def _run(function: str, job: ctypes.Structure) -> None:
    library = _load()
    assert library is not None
    status = getattr(library, function)(ctypes.byref(job), torch_threads(), torch.get_num_threads())
    if status == 2:
        raise MemoryError("no memory for rounding")
    if status:
        raise ValueError(f"{function} refused its arguments (status {status})")


@cache
def _load() -> ctypes.CDLL | None:
    here = Path(__file__).parent
    found = [path for suffix in EXTENSION_SUFFIXES if (path := here / f"_rounding{suffix}").exists()]
    if not found:
        return None
    try:
        library = ctypes.CDLL(str(found[0]))
        if library.moec_rounding_interface() != INTERFACE:
            return None
    except (OSError, AttributeError):
        return None
    for function in (library.moec_feedback, library.moec_search):
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    return library
