"""Freed memory goes back to the system, so that a run over many layers needs no more than its largest layer.

glibc serves blocks of up to 32 MB from heaps that it hardly ever shrinks, and torch asks for aligned blocks, which leave holes
that glibc does not use again: after a few layers such heaps hold several layers' worth of holes. With a fixed, low threshold
every large block is a mapping of its own, gone when freed. Its pages must be zeroed each time, which costs a small model
half of its speed; so a model of small layers keeps the heap, and its holes, which are small then.

oneDNN, which multiplies bfloat16 for torch, keeps the code it made for the last 1024 shapes of products, a third of a megabyte
each: as every expert gets another number of tokens, that grows from layer to layer. For big layers it keeps a few.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
#: Size of a decoder layer from which memory matters more than the time to zero pages.
BIG_LAYER = 128 * 1024**2
#: For big layers, blocks from the first size on are mapped. For small ones from the second, and the third stays in the heap.
MAPPED, MAPPED_SMALL, KEPT_SMALL = 64 * 1024, 32 * 1024**2, 512 * 1024**2
#: Shapes that oneDNN keeps code for.
SHAPES_KEPT = "32"


def arrange_heap(layer_bytes: int) -> None:
    """For the whole process, from now on. Other C libraries than glibc do something like it on their own."""
    if layer_bytes >= BIG_LAYER:  # oneDNN looks when it first multiplies, and exports no function for it
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", SHAPES_KEPT)
    call = _glibc("mallopt")
    if call is not None and layer_bytes >= BIG_LAYER:
        call(_M_MMAP_THRESHOLD, MAPPED)
    elif call is not None:
        call(_M_MMAP_THRESHOLD, MAPPED_SMALL)
        call(_M_TRIM_THRESHOLD, KEPT_SMALL)


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


@contextmanager
def recomputing(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let a backward pass run each layer again instead of keeping what is inside: one layer's activations at a time."""
    layers = list(layers)
    for layer in layers:
        layer.forward = _again(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _again(forward: Callable) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def _glibc(name: str):
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
