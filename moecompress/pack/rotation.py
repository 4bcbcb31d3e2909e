"""Incoherence: random signs and blockwise Hadamard transforms make the entries of any matrix look normally distributed.

(QuIP#, arXiv:2402.04396, section 3; blocks of 128 as in EXL3.) Orthogonal, so nothing is lost; the inverse is applied to
activations at run time. Sizes that are no multiple of 128 end in smaller blocks, powers of two, so nothing is padded.
"""

from __future__ import annotations

import torch

from moecompress.pack.trellis import scramble

BLOCK = 128


def blocks(size: int) -> list[int]:
    """Sizes of the Hadamard blocks that cover ``size`` columns: 128s, then the binary digits of the rest."""
    rest = size % BLOCK
    return [BLOCK] * (size // BLOCK) + [1 << bit for bit in range(BLOCK.bit_length() - 2, -1, -1) if rest >> bit & 1]


def signs(size: int, seed: int) -> torch.Tensor:
    """float32 [size] of ±1 from a seed, by integer arithmetic, so that every machine makes the same."""
    x = scramble(torch.arange(1, size + 1, dtype=torch.int64) + (seed << 20))
    return 1.0 - 2.0 * ((x >> 13) & 1).float()


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal blockwise Hadamard transform of the last dimension; its own inverse. Any shape [..., size]."""
    parts = x.split(blocks(x.shape[-1]), -1)
    return torch.cat([_one(part) for part in parts], -1)


def _one(x: torch.Tensor) -> torch.Tensor:
    size, half = x.shape[-1], 1
    while half < size:
        pairs = x.unflatten(-1, (-1, 2, half))
        x = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2).flatten(-3)
        half *= 2
    return x / size**0.5


def rotate(x: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """H (s ⊙ x) along the last dimension."""
    return hadamard(x * sign)


def unrotate(x: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """The inverse of `rotate`: s ⊙ H x."""
    return hadamard(x) * sign
