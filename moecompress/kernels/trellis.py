"""The compiled trellis encoder (cpu/trellis.cpp), through ctypes. There is no other: a search in plain torch takes hours."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from moecompress.errors import UserError
from moecompress.kernels import library
from moecompress.pack.trellis import RATES, TABLE_STEP, TILE, WINDOW, table, tile_bytes

INTERFACE = 2  # kInterface in trellis.cpp


class _Encode(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "table", "stream", "decoded")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("bits", "vector")),
    )


def available() -> bool:
    return _load() is not None


def encode(values: torch.Tensor, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles float32 [n, 256] -> (stream uint8 [n, 32 · rate], decoded [n, 256]); ``rate``: bits a weight, a key of RATES."""
    found = _load()
    if found is None:
        raise UserError("The compiled trellis encoder is missing", remedy="install moecompress where a C++ compiler is")
    bits, vector = RATES[rate]
    if values.shape[1:] != (TILE,):
        raise ValueError(f"tiles have {TILE} weights, not {tuple(values.shape[1:])}")
    values = values.float().contiguous()
    columns = (table(rate).values()[_reversed()].float() * TABLE_STEP).T  # (V, 4096)
    columns = torch.cat([columns, columns.square().sum(0, keepdim=True)])
    stream = torch.empty(len(values), tile_bytes(rate), dtype=torch.uint8)
    decoded = torch.empty_like(values)
    job = _Encode(values.data_ptr(), columns.data_ptr(), stream.data_ptr(), decoded.data_ptr(), len(values), bits, vector)
    library.run(found, "moec_trellis_encode", job)
    return stream, decoded


@cache
def _reversed() -> torch.Tensor:
    """The search numbers windows with the newest bit lowest, the format with the oldest: [4096] from the one to the other."""
    window = torch.arange(2**WINDOW)
    return sum(((window >> bit) & 1) << (WINDOW - 1 - bit) for bit in range(WINDOW))


def _load() -> ctypes.CDLL | None:
    return library.load("trellis", INTERFACE)
