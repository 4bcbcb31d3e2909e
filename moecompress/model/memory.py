"""Freed memory goes back to the system, so that a run over many layers needs no more than its largest layer.

glibc serves blocks of up to 32 MB from heaps that it hardly ever shrinks: after a few layers of tensors of all sizes
such heaps hold several layers' worth of holes. With a fixed threshold every large block is a mapping of its own, gone
when freed.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
#: Blocks from this size on are mapped. Smaller ones are too many to map; their holes are reused.
LARGE = 32 * 1024**2


def map_large_blocks() -> None:
    """For the whole process, from now on. Other C libraries than glibc do something like it on their own."""
    call = _glibc("mallopt")
    if call is not None:
        call(_M_MMAP_THRESHOLD, LARGE)
        call(_M_TRIM_THRESHOLD, 512 * 1024**2)


def trim() -> None:
    """Give the system back whatever whole pages are free inside the heaps."""
    call = _glibc("malloc_trim")
    if call is not None:
        call(0)


def forget(tensor: torch.Tensor) -> None:
    """Give the system back the memory of a contiguous CPU tensor that nobody will read again; its values are lost.

    The tensor may be a part of a larger one: this is how the weights of a layer go while their packed form comes.
    """
    call = _glibc("madvise")
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    last = (tensor.data_ptr() + tensor.nbytes) // page * page
    if call is not None and tensor.device.type == "cpu" and tensor.is_contiguous() and last > first:
        call(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def _glibc(name: str):
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
