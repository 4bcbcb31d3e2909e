"""The compiled trellis encoder (cpu/trellis.cpp), through ctypes. There is no other: a search in plain torch takes hours."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from moecompress.errors import UserError
from moecompress.kernels.native import torch_threads

INTERFACE = 1  # kInterface in trellis.cpp
TILE, STATES = 256, 4096
#: (bits a step, values a step) that the encoder knows.
STEPS = [*((bits, 2) for bits in (1, 2, 3, 4, 5)), (3, 1), (4, 1), (3, 4), (5, 4)]


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
    library = _load()
    if library is None:
        raise UserError("The compiled trellis encoder is missing", remedy="install moecompress where a C++ compiler is")
    vector = table.shape[1]
    if (bits, vector) not in STEPS or table.shape[0] != STATES or values.ndim != 2 or values.shape[1] != TILE:
        raise ValueError(f"no trellis of {bits} bits a step for tiles {tuple(values.shape)} and a table {tuple(table.shape)}")
    values = values.float().contiguous()
    columns = table.float().T.contiguous()  # (V, 4096)
    stream = torch.empty(len(values), TILE // vector * bits // 8, dtype=torch.uint8)
    decoded = torch.empty_like(values)
    job = _Encode(values.data_ptr(), columns.data_ptr(), stream.data_ptr(), decoded.data_ptr(), len(values), bits, vector)
    status = library.moec_trellis_encode(ctypes.byref(job), torch_threads(), torch.get_num_threads())
    if status == 2:
        raise MemoryError("no memory for the trellis search")
    if status:
        raise ValueError(f"moec_trellis_encode refused its arguments (status {status})")
    return stream, decoded


@cache
def _load() -> ctypes.CDLL | None:
    here = Path(__file__).parent
    found = [path for suffix in EXTENSION_SUFFIXES if (path := here / f"_trellis{suffix}").exists()]
    if not found:
        return None
    try:
        library = ctypes.CDLL(str(found[0]))
        if library.moec_trellis_interface() != INTERFACE:
            return None
    except (OSError, AttributeError):
        return None
    library.moec_trellis_encode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    return library
