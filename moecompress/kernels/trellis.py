"""The compiled trellis encoder (cpu/trellis.cpp), through ctypes. There is no other: a search in plain torch takes hours."""

from __future__ import annotations

import ctypes

import torch

from moecompress.errors import UserError
from moecompress.kernels import library
from moecompress.pack.trellis import RATES, TILE, WINDOW

INTERFACE = 1  # kInterface in trellis.cpp


class _Encode(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "table", "stream", "decoded")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("bits", "vector")),
    )


def available() -> bool:
    return _load() is not None


def encode(values: torch.Tensor, table: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles float32 [n, 256] by the table float32 [4096, V] -> (stream uint8 [n, 32 · bits / V], decoded [n, 256]).

    ``bits``: B, appended to the window at each step of V values. The table's rows are numbered by windows whose newest bit
    is the lowest.
    """
    found = _load()
    if found is None:
        raise UserError("The compiled trellis encoder is missing", remedy="install moecompress where a C++ compiler is")
    vector = table.shape[1]
    if (bits, vector) not in RATES.values() or table.shape[0] != 2**WINDOW or values.shape[1:] != (TILE * TILE,):
        raise ValueError(f"no trellis of {bits} bits a step for tiles {tuple(values.shape)} and a table {tuple(table.shape)}")
    values = values.float().contiguous()
    columns = table.float().T.contiguous()  # (V, 4096)
    stream = torch.empty(len(values), TILE * TILE // vector * bits // 8, dtype=torch.uint8)
    decoded = torch.empty_like(values)
    job = _Encode(values.data_ptr(), columns.data_ptr(), stream.data_ptr(), decoded.data_ptr(), len(values), bits, vector)
    library.run(found, "moec_trellis_encode", job)
    return stream, decoded


def _load() -> ctypes.CDLL | None:
    return library.load("trellis", INTERFACE)
