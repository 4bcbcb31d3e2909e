"""Format ``dictionary`` (SPEC.md, section 7) on a GPU: rows in parallel, and of a row as many words as a running sum of their
lengths places at once."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moecompress.kernels.triton import few_values, launch
from moecompress.pack.dictionary import LONGEST, DictionaryBank
from moecompress.pack.ternary import TRITS, TernaryBank

ROWS, WORDS = 8, 64  # rows of a matrix that a program decodes, and words of each at a time


def matmul(x: Tensor, slots: Tensor, bank: DictionaryBank, book: Tensor) -> Tensor:
    """As ternary_matmul.matmul, on checked operands on one GPU; slots outside the bank and damaged rows give NaN.

    book: ternary_matmul.book of the bank's prices. Many rows of x: the whole bank becomes a ternary one for the moment.
    """
    if len(x) > launch.FEW * len(bank.ends):
        return few_values.matmul(x, slots, as_ternary(bank, book))
    y = launch.blank(slots, len(bank.ends), bank.ends.shape[1], x.dtype)
    _run(x.contiguous(), slots.contiguous(), y, slots, bank, book, len(x))
    return y


def as_ternary(bank: DictionaryBank, book: Tensor) -> TernaryBank:
    """The same matrices five trits a byte; 255 in all of a damaged row."""
    count, rows = bank.ends.shape
    device = bank.words.device
    trits = torch.empty(count, rows, -(-bank.cols // TRITS) * TRITS, dtype=torch.uint8, device=device)
    trits[..., bank.cols :] = 1
    damaged = torch.zeros(count, rows, 1, dtype=torch.uint8, device=device)
    _run(trits, torch.arange(count, dtype=torch.int32, device=device), trits, damaged, bank, book, count)
    powers = (3 ** torch.arange(TRITS, device=device)).to(torch.uint8)
    codes = (trits.unflatten(-1, (-1, TRITS)) * powers).sum(-1, dtype=torch.uint8)
    return TernaryBank(codes.masked_fill(damaged > 0, 255), bank.levels, bank.cols)


def _run(x: Tensor, slots: Tensor, y: Tensor, damaged: Tensor, bank: DictionaryBank, book: Tensor, size: int) -> None:
    """y: (S, rows) of x's type, products; or uint8 (n, rows, width), trits, and in ``damaged`` 1 for rows of another length."""
    count, rows = bank.ends.shape
    if not (size and rows and count):
        return
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _kernel[(size, triton.cdiv(rows, ROWS))](
            x, slots, y, damaged, launch.words(bank.words, torch.int16), bank.ends.contiguous(), bank.levels.contiguous(),
            _on(book, x.device), count, rows, bank.cols, y.shape[-1], bank.words.shape[1],
            TRITS=y.dim() == 3, LONGEST=LONGEST, ROWS=ROWS, WORDS=WORDS, num_warps=4,
        )  # fmt: skip


@lru_cache(maxsize=64)
def _on(book: Tensor, device: torch.device) -> Tensor:
    return book.to(device)


@triton.jit
def _kernel(
    x, slots, y, damaged, words, ends, levels, book, count, rows, cols, width, room,
    TRITS: tl.constexpr, LONGEST: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + pair).to(tl.int64)
    inside = (slot >= 0) & (slot < count)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there = row < tl.where(inside, rows, 0)
    line = tl.where(inside, slot, 0) * rows + row  # of the bank, [R]
    # Whatever the ends say, no word outside the matrix is read and no row has more of them than the matrix.
    begin = tl.load(ends + line - 1, mask=there & (row > 0), other=0)
    begin = tl.minimum(tl.maximum(begin, 0), room)
    end = tl.load(ends + line, mask=there, other=0)
    end = tl.maximum(tl.minimum(end, room), begin)
    low = tl.load(levels + line * 2, mask=there, other=0.0).to(tl.float32)[:, None]
    high = tl.load(levels + line * 2 + 1, mask=there, other=0.0).to(tl.float32)[:, None]
    done = tl.zeros((ROWS,), dtype=tl.int32)  # pairs
    total = tl.zeros((ROWS, WORDS), dtype=tl.float32)
    # One word more than a row can have is enough to see that there are too many.
    for first in range(0, tl.minimum(tl.max(end - begin, axis=0), (cols + 1) // 2 + 1), WORDS):
        at = begin[:, None].to(tl.int64) + first + tl.arange(0, WORDS)[None, :]
        mask = there[:, None] & (at < end[:, None])
        word = tl.load(words + tl.where(inside, slot, 0) * room + at, mask=mask, other=0).to(tl.int32) & 0xFFFF
        entry = tl.load(book + word, mask=mask, other=0)
        length = ((entry >> 56) & 15).to(tl.int32)  # 0 where there is no word
        start = done[:, None] + tl.cumsum(length, axis=1) - length
        done += tl.sum(length, axis=1)
        for inner in tl.static_range(LONGEST):
            both = (entry >> (4 * inner)).to(tl.int32)
            for second in tl.static_range(2):
                trit = (both >> (2 * second)) & 3
                col = (start + inner) * 2 + second
                live = (inner < length) & (col < cols)
                if TRITS:
                    tl.store(y + (line * width)[:, None] + col, trit.to(tl.uint8), mask=live)
                else:
                    value = tl.load(x + pair * cols + col, mask=live, other=0.0).to(tl.float32)
                    total += tl.where(trit == 2, high, tl.where(trit == 0, low, 0.0)) * value
    if TRITS:
        tl.store(damaged + line, (done != (cols + 1) // 2).to(tl.uint8), mask=there)
    else:
        values = tl.where(there & (done != (cols + 1) // 2), float("nan"), tl.sum(total, axis=1))
        values += tl.where((slot >= -1) & (slot < count), 0.0, float("nan"))
        tl.store(y + pair * rows + row, values.to(y.dtype.element_ty), mask=row < rows)
