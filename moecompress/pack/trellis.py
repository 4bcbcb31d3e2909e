"""Format ``trellis``: tiles of 256 weights as circular bit streams through a shared table (SPEC.md, section 9).

A pair of pure functions, `pack` and `dequantize`, and the sizes they imply. Nothing here searches for a stream; that is
kernels/trellis.py. The code is QTIP's bitshift trellis (arXiv:2406.11235) with windows of 12 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moecompress.errors import UserError
from moecompress.pack.fields import Tensors, demand, unpack_plane
from moecompress.recipe import TRELLIS_RATES

if TYPE_CHECKING:
    from moecompress.pack.scheme import Scheme

WINDOW = 12
TILE = 256  # weights
ROW_STEPS = 4  # of a tile: a row of a tile is what four steps give, so that a kernel adds four products a row and value


def _values(rate: float) -> int:
    """Of a step: two, but four where a step of two would have no whole number of bits, and one where its windows would
    overlap too little."""
    return 1 if rate >= 3 else 2 if rate * 2 == int(rate * 2) else 4


#: rate in bits a weight -> (bits, values) of a step
RATES: dict[float, tuple[int, int]] = {rate: (int(rate * _values(rate)), _values(rate)) for rate in TRELLIS_RATES}
TABLE_STEP = 1 / 32  # value of one in the table


@dataclass(frozen=True)
class TrellisBank:
    """n matrices of one shape and one rate."""

    stream: Tensor  # uint8 (n, tiles, 32 · rate)
    scales: Tensor  # float32 (n,)
    rate: float
    rows: int
    cols: int

    def tensors(self) -> dict[str, Tensor]:
        return {"stream": self.stream, "scales": self.scales}


def tile_shape(rate: float) -> tuple[int, int]:
    """Rows and columns of a tile: 64 × 4, 32 × 8 or 16 × 16. Narrow, since feedback works between tiles and not inside."""
    cols = ROW_STEPS * RATES[rate][1]
    return TILE // cols, cols


def tiles(rows: int, cols: int, rate: float) -> tuple[int, int]:
    """Tiles down and across: both sides are padded to multiples of a tile's."""
    high, wide = tile_shape(rate)
    return -(-rows // high), -(-cols // wide)


def stored(scheme: Scheme, rows: int, cols: int) -> Tensors:
    """Tensors of one matrix in the file, as `int_format.stored`."""
    down, across = tiles(rows, cols, scheme.bits)
    return {"stream": (torch.uint8, (down * across, tile_bytes(scheme.bits))), "scales": (torch.float32, ())}


def tile_bytes(rate: float) -> int:
    return int(TILE * rate) // 8


def scramble(numbers: Tensor) -> Tensor:
    """int64 -> int64 below 2^32: consecutive numbers spread over 32 bits, the same on every machine."""
    for _ in range(2):
        numbers = ((numbers ^ (numbers >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return numbers


@dataclass(frozen=True)
class Table:
    """What a window stands for: value v is levels[(low[v, w mod 64] + high[v, w div 64]) mod 256] / 32.

    Two look-ups of 64 bytes and one of 256 fit the registers of a CPU, where 4096 entries would need a slow gather; on normal
    data the sums are as good as 4096 random values (a little better: every level comes up equally often).
    """

    low: Tensor  # uint8 (V, 64)
    high: Tensor  # uint8 (V, 64)
    levels: Tensor  # int8 (256,)

    def values(self) -> Tensor:
        """int8 (4096, V), by window."""
        index = self.low[:, None, :].int() + self.high[:, :, None].int()  # (V, 64, 64)
        return self.levels[(index % 256).long()].flatten(1).T.contiguous()


@cache
def table(rate: float) -> Table:
    """The table of a rate: from a counter and integer arithmetic, so every machine makes the same and none is stored."""
    _, values = RATES[rate]
    numbers = scramble(torch.arange(1, 8 * 64 + 1, dtype=torch.int64)).view(8, 64)
    # 4 · (a random order of 0 to 63) + 0 to 3: the sum of two of them reaches every level equally often.
    halves = (4 * numbers.argsort(-1).argsort(-1) + (numbers >> 7) % 4).to(torch.uint8)
    quantile = torch.special.ndtri((torch.arange(256, dtype=torch.float64) + 0.5) / 256)
    if rate >= 3:  # many bits reach into the tails of the normal distribution
        quantile = quantile * (1 + 0.02 * quantile.square())
    levels = (quantile / quantile.square().mean().sqrt() / TABLE_STEP).round().to(torch.int8)
    return Table(halves[:values], halves[4 : 4 + values], levels)


def to_tiles(weights: Tensor, rate: float) -> Tensor:
    """(n, rows, cols) -> (n, tiles, 256), tiles row by row, weights row by row inside a tile; padded with zeros."""
    count, rows, cols = weights.shape
    (down, across), (high, wide) = tiles(rows, cols, rate), tile_shape(rate)
    padded = torch.nn.functional.pad(weights, (0, across * wide - cols, 0, down * high - rows))
    return padded.unflatten(2, (across, wide)).unflatten(1, (down, high)).transpose(2, 3).reshape(count, -1, TILE)


def from_tiles(values: Tensor, rows: int, cols: int, rate: float) -> Tensor:
    """The inverse of `to_tiles`."""
    (down, across), (high, wide) = tiles(rows, cols, rate), tile_shape(rate)
    grid = values.view(-1, down, across, high, wide).transpose(2, 3)
    return grid.reshape(-1, down * high, across * wide)[:, :rows, :cols]


def windows(stream: Tensor, bits: int) -> Tensor:
    """uint8 (..., bytes) -> int64 (..., steps): the 12 bits of the circular stream that end with each step's last bit.

    Bit i of the stream is bit i % 8 of byte i // 8; the oldest bit of a window is its lowest.
    """
    line = unpack_plane(stream, 1).long()  # (..., bits of the tile)
    ends = torch.arange(bits, line.shape[-1] + 1, bits, device=stream.device)
    at = (ends[:, None] - WINDOW + torch.arange(WINDOW, device=stream.device)) % line.shape[-1]
    return (line[..., at] << torch.arange(WINDOW, device=stream.device)).sum(-1)


def dequantize(bank: TrellisBank) -> Tensor:
    """float32 (n, rows, cols) before any rotation is undone."""
    check(bank)
    bits, _ = RATES[bank.rate]
    values = table(bank.rate).values().to(bank.stream.device)[windows(bank.stream, bits)].flatten(-2).float() * TABLE_STEP
    return from_tiles(values, bank.rows, bank.cols, bank.rate) * bank.scales[:, None, None]


def check(bank: TrellisBank) -> None:
    """Raise UserError, naming the tensor, unless every tensor has the shape and dtype that the format demands."""
    if bank.rate not in RATES:
        raise UserError(f"the format trellis has no rate {bank.rate}", expected=f"one of {sorted(RATES)}", got=bank.rate)
    down, across = tiles(bank.rows, bank.cols, bank.rate)
    size = (len(bank.scales), down * across, tile_bytes(bank.rate))
    demand("stream", bank.stream, torch.uint8, size)
    demand("scales", bank.scales, torch.float32, size[:1])
