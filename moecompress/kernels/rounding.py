"""The compiled rounding library (cpu/rounding.cpp), through ctypes. Without it quantize/gptq.py runs in plain torch."""

from __future__ import annotations

import ctypes

import torch

from moecompress.kernels import library

INTERFACE = 4  # kInterface in rounding.cpp


class _Feedback(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "matrix", "scales", "zeros", "order", "codes", "balance", "exact")),
        *((name, ctypes.c_int64) for name in ("count", "rows", "cols", "groups", "width")),
        *((name, ctypes.c_int32) for name in ("bits", "descend", "widths")),
    )


class _Search(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "importance", "shrinks", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("count", "rows", "cols", "groups", "width", "tries", "steps")),
        *((name, ctypes.c_int32) for name in ("bits", "symmetric")),
    )


class _Refit(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "zeros", "matrix", "target", "scales", "steps", "factors")),
        *((name, ctypes.c_int64) for name in ("count", "rows", "cols", "groups", "width")),
    )


def available() -> bool:
    return _load() is not None


def feedback(values: torch.Tensor, matrix: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, codes: torch.Tensor,
             width: int, bits: int, order: torch.Tensor | None, descend: bool, balance: torch.Tensor | None = None,
             exact: torch.Tensor | None = None) -> None:  # fmt: skip
    """Fill ``codes`` uint8 [n, rows, cols] in place.

    Rounding with feedback: values are weights and matrix the upper factor, both in processing ``order`` [n, cols].
    Descent: values are pulls (W − Ŵ) H, matrix the Hessian, codes the current ones. scales, zeros: float32 [n, rows, G].
    ``balance`` float32 [w], of nested codes: values have w rows for each row of codes, for bits − w + 1, …, bits bits.
    ``exact`` bool [n, rows, cols], of rounding codes that are not nested: where nothing is lost, whatever the code.
    """
    widths = 1 if balance is None else len(balance)
    count, rows, cols = values.shape[0], values.shape[1] // widths, values.shape[2]
    groups = scales.shape[-1]
    _check({"values": (values, (count, rows * widths, cols)), "matrix": (matrix, (count, cols, cols)),
            "scales": (scales, (count, rows, groups)), "zeros": (zeros, (count, rows, groups))}, torch.float32)  # fmt: skip
    _check({"codes": (codes, (count, rows, cols))}, torch.uint8)
    if balance is not None:
        _check({"balance": (balance, (widths,))}, torch.float32)
    if exact is not None:
        _check({"exact": (exact, (count, rows, cols))}, torch.bool)
    if order is not None:
        _check({"order": (order, (count, cols))}, torch.int64)
    job = _Feedback(values.data_ptr(), matrix.data_ptr(), scales.data_ptr(), zeros.data_ptr(),
                    None if order is None else order.data_ptr(), codes.data_ptr(), None if balance is None else balance.data_ptr(),
                    None if exact is None else exact.data_ptr(), count, rows, cols, groups, width, bits, int(descend), widths)  # fmt: skip
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


def refit(codes: torch.Tensor, zeros: torch.Tensor, hessian: torch.Tensor, target: torch.Tensor, scales: torch.Tensor,
          width: int, steps: torch.Tensor, factors: torch.Tensor | None) -> None:  # fmt: skip
    """Change ``steps`` float32 [n, rows] and ``factors`` uint8 [n, rows, G] (None: one group a row) to better ones, in place.

    codes uint8 [n, rows, cols]; zeros and the present scales float32 [n, rows, G]; target: weights times hessian [n, cols, cols].
    """
    count, rows, cols = codes.shape
    groups = scales.shape[-1]
    _check({"zeros": (zeros, (count, rows, groups)), "hessian": (hessian, (count, cols, cols)),
            "target": (target, (count, rows, cols)), "scales": (scales, (count, rows, groups)),
            "steps": (steps, (count, rows))}, torch.float32)  # fmt: skip
    _check({"codes": (codes, (count, rows, cols))}, torch.uint8)
    if factors is not None:
        _check({"factors": (factors, (count, rows, groups))}, torch.uint8)
    job = _Refit(codes.data_ptr(), zeros.data_ptr(), hessian.data_ptr(), target.data_ptr(), scales.data_ptr(),
                 steps.data_ptr(), None if factors is None else factors.data_ptr(), count, rows, cols, groups, width)  # fmt: skip
    _run("moec_refit", job)


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
    found = _load()
    assert found is not None
    library.run(found, function, job)


def _load() -> ctypes.CDLL | None:
    return library.load("rounding", INTERFACE)
