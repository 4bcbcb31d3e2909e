"""Ternary matrices at their entropy: an archive for storage and transport, and the bound that the dictionary is held to.

Static interleaved range coding with asymmetric numeral systems (arXiv:1311.2540; SPEC.md, section 8). Symbols are pairs
of trits of the whole matrix, row after row; every matrix has its own table of nine frequencies. Matrices are coded side by
side; nothing here is meant to be read while a model runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moecompress.pack import dictionary
from moecompress.pack.dictionary import PAIRS, DictionaryBank
from moecompress.pack.fields import demand, wrong
from moecompress.pack.ternary import ZERO, refuse_above

LANES = 32  # states of a matrix; pair p belongs to lane p mod 32
PRECISION = 14  # frequencies of a table sum to 2**14
LOW = 2**16  # a state is at least this; it moves 16 bits at a time
MATRICES_AT_ONCE = 32


@dataclass(frozen=True)
class Archive:
    """n ternary matrices of one shape; see `pack/ternary.py` for the meaning of trits."""

    stream: Tensor  # uint16 (N,)
    ends: Tensor  # int64 (n,): length of the stream up to the end of that matrix
    states: Tensor  # uint32 (n, 32), at the beginning of decoding
    tables: Tensor  # uint16 (n, 9), frequencies that sum to 2**14
    rows: int
    cols: int

    def tensors(self) -> dict[str, Tensor]:
        return {"stream": self.stream, "ends": self.ends, "states": self.states, "tables": self.tables}

    @property
    def bits_per_weight(self) -> float:
        """Everything but the levels, which `DictionaryBank` has as well."""
        stored = sum(tensor.nbytes for tensor in self.tensors().values())
        return 8 * stored / (len(self.tables) * self.rows * self.cols)


def entropy(trits: Tensor) -> float:
    """Empirical entropy of trits that are taken as independent, in bits per weight."""
    share = trits.flatten().bincount(minlength=3).double() / max(trits.numel(), 1)
    return float(-(share * share.clamp_min(1e-300).log2()).sum())


def archive(trits: Tensor) -> Archive:
    """uint8 (n, rows, cols), each below 3 -> smallest lossless form."""
    refuse_above("trit", trits, 2)
    coded = [_encode(part) for part in trits.split(MATRICES_AT_ONCE)]
    streams, counts, states, tables = (torch.cat(parts) for parts in zip(*coded, strict=True))
    return Archive(streams, counts.cumsum(0), states, tables, trits.shape[1], trits.shape[2])


def restore(packed: Archive) -> Tensor:
    """uint8 (n, rows, cols). UserError if the archive is damaged: every state must end where encoding began."""
    _check(packed)
    ends = [0, *packed.ends.tolist()]
    parts = []
    for begin in range(0, len(packed.tables), MATRICES_AT_ONCE):
        here = slice(begin, begin + MATRICES_AT_ONCE)
        parts.append(_decode(packed, packed.states[here].long(), packed.tables[here].long(), ends[begin:]))
    return torch.cat(parts)


def repack(packed: Archive, levels: Tensor, prices: tuple[int, int]) -> DictionaryBank:
    """The dictionary form of an archive; the same bytes that packing the trits themselves gives."""
    return dictionary.pack(restore(packed), levels, prices)


def _encode(trits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = len(trits)
    symbols = _lanes(trits)  # (n, T, lanes)
    tables = _tables(torch.stack([matrix.flatten().bincount(minlength=PAIRS) for matrix in symbols]))
    below = tables.cumsum(-1) - tables
    frequency, start = (table.unsqueeze(1).expand(-1, symbols.shape[1], -1) for table in (tables, below))
    state = torch.full((count, LANES), LOW)
    out = torch.full(symbols.shape, -1, dtype=torch.int32)
    for step in reversed(range(symbols.shape[1])):
        symbol = symbols[:, step].long()
        f, b = frequency[:, step].gather(-1, symbol), start[:, step].gather(-1, symbol)
        full = (state >> (32 - PRECISION)) >= f
        out[:, step] = torch.where(full, state & (LOW - 1), -1)
        state = torch.where(full, state >> 16, state)
        state = (state // f << PRECISION) + state % f + b
    written = out >= 0
    return out[written].to(torch.uint16), written.sum((1, 2)), state.to(torch.uint32), tables.to(torch.uint16)


def _decode(packed: Archive, state: Tensor, tables: Tensor, ends: list[int]) -> Tensor:
    count, pairs = len(state), -(-packed.rows * packed.cols // 2)
    steps = -(-pairs // LANES)
    below = tables.cumsum(-1) - tables
    symbol_at = torch.stack([torch.arange(PAIRS).repeat_interleave(table) for table in tables])  # (n, 2**14)
    position, end = torch.tensor(ends[:count]), torch.tensor(ends[1 : count + 1])
    stream = torch.cat([packed.stream.to(torch.int32), torch.zeros(1, dtype=torch.int32)])
    out = torch.empty(count, steps, LANES, dtype=torch.uint8)
    for step in range(steps):
        slot = state & (2**PRECISION - 1)
        symbol = symbol_at.gather(-1, slot)
        out[:, step] = symbol
        state = tables.gather(-1, symbol) * (state >> PRECISION) + slot - below.gather(-1, symbol)
        hungry = state < LOW
        place = position.unsqueeze(-1) + hungry.cumsum(-1) - 1
        read = stream[place.clamp(0, len(stream) - 1)]
        state = torch.where(hungry, state << 16 | read, state)
        position = position + hungry.sum(-1)
    if bool((position != end).any()) or bool((state != LOW).any()):
        raise wrong("stream", "states that end where encoding began", "another end")
    flat = out.flatten(1)
    trits = torch.stack([flat // 3, flat % 3], -1).flatten(1)[:, : packed.rows * packed.cols]
    return trits.view(count, packed.rows, packed.cols)


def _lanes(trits: Tensor) -> Tensor:
    """uint8 (n, rows, cols) -> symbols (n, T, lanes), the last ones padded with pairs of zeros."""
    flat = trits.flatten(1)
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[-1] % (2 * LANES)), value=ZERO)
    return dictionary.pair_symbols(padded).unflatten(-1, (-1, LANES))


def _tables(counts: Tensor) -> Tensor:
    """counts (n, 9) -> frequencies (n, 9) that sum to 2**14, at least 1 where the count is."""
    scaled = counts.double() * 2**PRECISION / counts.sum(-1, keepdim=True)
    tables = scaled.round().long().clamp_min(1) * (counts > 0)
    excess = tables.sum(-1) - 2**PRECISION
    largest = tables.argmax(-1, keepdim=True)  # what rounding left over is nothing to the largest: it is a ninth or more
    return tables.scatter_add(-1, largest, -excess.unsqueeze(-1))


def _check(packed: Archive) -> None:
    count = len(packed.tables)
    if packed.rows < 1 or packed.cols < 1:
        raise wrong("stream", "rows and columns", f"{packed.rows} × {packed.cols}")
    demand("tables", packed.tables, torch.uint16, (count, PAIRS))
    demand("states", packed.states, torch.uint32, (count, LANES))
    demand("ends", packed.ends, torch.int64, (count,))
    demand("stream", packed.stream, torch.uint16, (packed.stream.numel(),))
    if count and bool((packed.tables.long().sum(-1) != 2**PRECISION).any()):
        raise wrong("tables", f"frequencies that sum to {2**PRECISION}", "another sum")
    ends = packed.ends.tolist()
    if ends != sorted(ends) or (ends and ends[0] < 0) or (ends[-1] if ends else 0) != len(packed.stream):
        raise wrong("ends", f"rising to the {len(packed.stream)} numbers there are", f"{ends[:8]} ...")
    if bool((packed.states.long() < LOW).any()):
        raise wrong("states", f"at least {LOW}", f"{int(packed.states.long().min())}")
