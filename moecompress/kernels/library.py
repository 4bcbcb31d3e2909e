"""The compiled encoders (cpu/*.cpp with pool.h): find, load and call them through ctypes, on the threads that torch has."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from moecompress.kernels.native import torch_threads


@cache
def load(name: str, interface: int) -> ctypes.CDLL | None:
    """The library _``name``, or None if it is missing or of another version. Functions return an int status."""
    here = Path(__file__).parent
    found = [path for suffix in EXTENSION_SUFFIXES if (path := here / f"_{name}{suffix}").exists()]
    if not found:
        return None
    try:
        library = ctypes.CDLL(str(found[0]))
        return library if getattr(library, f"moec_{name}_interface")() == interface else None
    except (OSError, AttributeError):
        return None


def run(library: ctypes.CDLL, function: str, job: ctypes.Structure) -> None:
    """``call`` it; MemoryError or ValueError by its status."""
    status = call(library, function, job)
    if status == 2:
        raise MemoryError(f"no memory for {function}")
    if status:
        raise ValueError(f"{function} refused its arguments (status {status})")


def call(library: ctypes.CDLL, function: str, job: ctypes.Structure) -> int:
    """The status of ``function`` (job, torch's threads, how many of them); 0 is good."""
    entry = getattr(library, function)
    entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    return entry(ctypes.byref(job), torch_threads(), torch.get_num_threads())
