"""Products with packed matrices on NVIDIA GPUs: one kernel for each family of formats, written in Triton.

Decoding and multiplication are one kernel, launched once for a projection and bank, whatever experts the tokens chose.
Triton comes with torch's builds for GPUs and is looked for only when tensors are on one; the modules beside this one import it.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from moecompress.progress import notice

LEAST_CAPABILITY = (8, 0)  # Ampere, the first that multiplies bfloat16


def ready(device: torch.device) -> bool:
    """Whether products on this device run here; says once why not, on a GPU where they could."""
    if device.type != "cuda":
        return False
    return _found(torch.cuda.current_device() if device.index is None else device.index)


def status() -> str:
    """What runs on GPUs: "triton <version>"; or "reference: <why not>"."""
    if not torch.cuda.is_available():
        return "reference: there is no GPU that torch can use"
    return _status(torch.cuda.current_device())


@cache
def _status(index: int) -> str:
    if find_spec("triton") is None:
        return "reference: triton is not installed"
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        return f"reference: GPU {index} has compute capability {capability[0]}.{capability[1]}, below 8.0"
    import triton

    return f"triton {triton.__version__}"


@cache
def _found(index: int) -> bool:
    found = _status(index)
    if found.startswith("reference"):
        notice(f"no GPU kernels, packed experts run slowly ({found.removeprefix('reference: ')})")
    return not found.startswith("reference")
