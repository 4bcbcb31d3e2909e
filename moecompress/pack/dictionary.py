"""Format ``dictionary``: ternary matrices as 16-bit words of 1 to 14 pairs of trits (SPEC.md, section 7).

QMoE's code (arXiv:2310.16795, section 3.3) with a dictionary fitted to the model's own zero rate. The words are the most
probable sequences of pairs when trits are independent. So every part of a word is a word too (it is more probable), and
the longest match from a later position ends no earlier: greedy matching needs the fewest words that any parse can have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moecompress.errors import UserError
from moecompress.pack import ternary
from moecompress.pack.fields import Tensors, demand, wrong
from moecompress.pack.ternary import ZERO

if TYPE_CHECKING:
    from moecompress.pack.scheme import Scheme

SIZE = 2**16  # words
LONGEST = 14  # pairs in a word
PAIRS = 9  # pair (s, t) is symbol 3 s + t
UNIT = 4096  # prices are in bits / UNIT
HIGHEST = 2**20  # price
#: Bits a weight for words -> thousandths of zeros at which independent trits need so many (measured on rows of 768)
ZEROS = {0.7: 896, 0.8: 866, 0.9: 836, 1: 802, 1.1: 765, 1.2: 725}
ROWS_AT_ONCE = 2**15  # rows that are encoded together; bounds the memory


@dataclass(frozen=True)
class Dictionary:
    """Words sorted by price. ``children`` is the trie: node 0 is its root, node w + 1 is word w, 0 means no child."""

    lengths: Tensor  # uint8 (size,), pairs
    trits: Tensor  # uint8 (size, 2 * longest), padded with zeros (trit 1)
    children: Tensor  # int32 (size + 1, 9)


@dataclass(frozen=True)
class DictionaryBank:
    """n matrices of one shape, each row of values {low, 0, high}, each row its own run of words. A matrix has ``room`` for
    words, as many as any of the bank; what it does not need is padding behind its last row."""

    words: Tensor  # uint16 (n, room)
    ends: Tensor  # int32 (n, rows): number of the matrix's words up to the end of that row
    levels: Tensor  # bfloat16 (n, rows, 2): low, high
    prices: tuple[int, int]  # of a zero and of a sign: they define the dictionary
    cols: int

    def tensors(self) -> dict[str, Tensor]:
        return {"words": self.words, "ends": self.ends, "levels": self.levels}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Words with padding, row ends and levels; the dictionary itself costs nothing, it is rebuilt from two prices."""
        return 8 * self.nbytes / (self.ends.numel() * self.cols)


def prices(zero_rate: float) -> tuple[int, int]:
    """Code lengths −log2 P of a zero and of either sign, when zeros have that rate. Integers, so that the dictionary is
    the same on every machine. Below a third (zeros rarer than signs) the rate counts as a third."""
    rate = min(max(zero_rate, 1 / 3), 0.999)
    return round(-math.log2(rate) * UNIT), round(-math.log2((1 - rate) / 2) * UNIT)


def fit_prices(trits: Tensor) -> tuple[int, int]:
    """Prices for trits like these, rows (rows, cols): of the dictionaries for their zero rate and with signs a few percent
    cheaper, the one that needs the fewest words (cheaper signs often save 1 %)."""
    zero, sign = prices(float((trits == ZERO).double().mean()))
    tried = [(zero, max(round(sign * factor), zero)) for factor in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)]
    return min(tried, key=lambda p: len(encode(trits, dictionary(p))[0]))


@lru_cache(maxsize=4)
def dictionary(prices: tuple[int, int], size: int = SIZE, longest: int = LONGEST) -> Dictionary:
    """The ``size`` cheapest sequences of 1 to ``longest`` pairs; among equals the shorter, then the one that is first in
    the alphabet. The same set as QMoE's heap pops, level by level. UserError if a single pair is not among them."""
    zero, sign = prices
    if not all(isinstance(price, int) and 1 <= price <= HIGHEST for price in prices):
        raise UserError("a dictionary has no such prices", expected=f"integers from 1 to {HIGHEST}", got=prices)
    trit_price = np.array([sign, zero, sign])
    pair_price = (trit_price[:, None] + trit_price).ravel()
    # A word is a base-9 number behind a leading 1, so keys tell lengths apart and sort by length, then alphabet.
    keys = fresh = np.array([1])
    cost = fresh_cost = np.array([0])
    for _ in range(longest):
        fresh = (fresh[:, None] * PAIRS + np.arange(PAIRS)).ravel()
        fresh_cost = (fresh_cost[:, None] + pair_price).ravel()
        keys, cost = np.concatenate([keys, fresh]), np.concatenate([cost, fresh_cost])
        if len(cost) > size + 1:  # with the root, which is no word but the cheapest
            limit = np.partition(cost, size)[size]
            keys, cost = keys[cost <= limit], cost[cost <= limit]
            fresh, fresh_cost = fresh[fresh_cost <= limit], fresh_cost[fresh_cost <= limit]
    keys = keys[np.lexsort((keys, cost))][: size + 1]
    if not np.isin(np.arange(PAIRS, 2 * PAIRS), keys).all():
        raise UserError("a dictionary must have all nine single pairs", got=f"prices {prices}")
    return _tables(keys, longest)


def _tables(keys: np.ndarray, longest: int) -> Dictionary:
    """keys of all nodes, the root's first."""
    lengths = np.searchsorted(PAIRS ** np.arange(1, longest + 1), keys, side="right")
    trits = np.full((len(keys), 2 * longest), ZERO, dtype=np.uint8)
    for position in range(longest):
        has = lengths > position
        symbol = keys[has] // PAIRS ** (lengths[has] - 1 - position) % PAIRS
        trits[has, 2 * position], trits[has, 2 * position + 1] = symbol // 3, symbol % 3
    by_key = np.argsort(keys)
    parent = by_key[np.searchsorted(keys[by_key], keys[1:] // PAIRS)]
    children = np.zeros((len(keys), PAIRS), dtype=np.int32)
    children[parent, keys[1:] % PAIRS] = np.arange(1, len(keys))
    return Dictionary(
        torch.from_numpy(lengths[1:].astype(np.uint8)), torch.from_numpy(trits[1:]), torch.from_numpy(children)
    )


def room(rows: int, cols: int, bits: float) -> int:
    """Words that a matrix may have at ``bits`` a weight; at least what zeros need, so that every matrix can be made to fit."""
    return max(round(10 * bits) * rows * cols // 160, rows * -(-cols // (2 * LONGEST)))


def stored(scheme: Scheme, rows: int, cols: int) -> Tensors:
    """Tensors of one matrix in the file, as `int_format.stored`: words and padding, row ends, levels."""
    words = (room(rows, cols, scheme.bits),)
    return {"words": (torch.uint16, words), "ends": (torch.int32, (rows,)), "levels": (torch.bfloat16, (rows, 2))}


def rate_prices(bits: float) -> tuple[int, int]:
    """Of the dictionary for matrices with ``bits`` a weight of room for words."""
    return prices(ZEROS[bits] / 1000)


def pack(trits: Tensor, levels: Tensor, prices: tuple[int, int], room: int | None = None) -> DictionaryBank:
    """trits uint8 (n, rows, cols), levels bfloat16 (n, rows, 2). ``room``: for the words of a matrix (None: what the longest
    needs); ValueError if one is longer."""
    words, counts = encode(trits.flatten(0, 1), dictionary(prices))
    ends = counts.view(trits.shape[:2]).cumsum(1)
    lengths = ends[:, -1] if trits.shape[1] else ends.sum(1)
    longest = int(lengths.max()) if len(lengths) else 0
    room = longest if room is None else room
    if longest > room or room >= 2**31:
        raise ValueError(f"a matrix needs {longest} words, there is room for {room}")
    padded = torch.zeros(len(trits), room, dtype=torch.int32)
    padded[torch.arange(room) < lengths.unsqueeze(-1)] = words
    bank = DictionaryBank(padded.to(torch.uint16), ends.to(torch.int32), levels.contiguous(), prices, trits.shape[-1])
    check(bank)
    return bank


def needed(trits: Tensor, prices: tuple[int, int]) -> Tensor:
    """Words that each matrix of trits (n, rows, cols) needs, int64 (n,)."""
    return encode(trits.flatten(0, 1), dictionary(prices))[1].view(trits.shape[:2]).sum(1)


def encode(trits: Tensor, book: Dictionary) -> tuple[Tensor, Tensor]:
    """Words int32 (N,) of rows of trits (rows, cols), fewest possible, and their number in every row, int64 (rows,)."""
    ternary.refuse_above("trit", trits, 2)
    done = [_encode_some(rows, book) for rows in trits.split(ROWS_AT_ONCE)]
    return torch.cat([words for words, _ in done]), torch.cat([counts for _, counts in done])


def _encode_some(trits: Tensor, book: Dictionary) -> tuple[Tensor, Tensor]:
    """All rows walk the trie in step, a pair at a time; a row that finds no child puts its word out and starts again."""
    symbols = pair_symbols(trits).T.to(torch.int32).contiguous()  # (pairs, rows)
    steps = book.children.flatten()
    node = torch.zeros(len(trits), dtype=torch.int32)
    out = torch.zeros(len(symbols) + 1, len(trits), dtype=torch.int32)  # nodes; 0: no word ends here
    for pair, put in zip(symbols, out, strict=False):
        child = steps.index_select(0, node * PAIRS + pair)
        stuck = child == 0
        put.copy_(node * stuck)
        node = torch.where(stuck, steps.index_select(0, pair), child)
    out[-1] = node
    out = out.T
    ended = out > 0
    return out[ended] - 1, ended.sum(-1)


def pair_symbols(trits: Tensor) -> Tensor:
    """uint8 (..., cols) -> uint8 (..., ceil(cols / 2)), each below 9."""
    padded = torch.nn.functional.pad(trits, (0, trits.shape[-1] % 2), value=ZERO)
    return padded[..., ::2] * 3 + padded[..., 1::2]


def decode(bank: DictionaryBank, first: int = 0, last: int | None = None) -> Tensor:
    """Trits uint8 (last − first, rows, cols) of matrices first ... last − 1. UserError if they are damaged."""
    check(bank)
    count, rows = bank.ends.shape
    last = count if last is None else last
    if not 0 <= first <= last <= count:
        raise ValueError(f"no matrices {first} ... {last} in a bank of {count}")
    ends = bank.ends[first:last].long()
    starts = torch.cat([ends.new_zeros(len(ends), 1), ends[:, :-1]], 1)
    room = bank.words.shape[1]
    if bool((ends < starts).any()) or bool((ends > room).any()):
        raise wrong("ends", f"rising to {room} words at most", f"{ends.flatten()[:8].tolist()} ...")
    book = dictionary(bank.prices)
    used = torch.arange(room) < (ends[:, -1:] if rows else ends.sum(1, keepdim=True))
    words = bank.words[first:last].to(torch.int32)[used]
    lengths = book.lengths.index_select(0, words)
    total = torch.cat([ends.new_zeros(1), lengths.cumsum(0, dtype=torch.int64)])
    counts = (ends - starts).flatten()
    behind = counts.cumsum(0)
    pairs = -(-bank.cols // 2)
    if bool((total[behind] - total[behind - counts] != pairs).any()):
        raise wrong("words", f"{pairs} pairs in every row", "a row of another length")
    taken = torch.arange(2 * LONGEST) < 2 * lengths.unsqueeze(-1).to(torch.int32)
    return book.trits.index_select(0, words)[taken].view(last - first, rows, 2 * pairs)[..., : bank.cols]


def dequantize(bank: DictionaryBank, dtype: torch.dtype = torch.float32, first: int = 0, last: int | None = None) -> Tensor:
    """Weights (last − first, rows, cols) of matrices first ... last − 1. UserError if they are damaged."""
    return ternary.weights(decode(bank, first, last), bank.levels[first:last], dtype)


def check(bank: DictionaryBank) -> None:
    """Raise UserError, naming the tensor, unless every tensor has the shape and dtype that the format demands."""
    if bank.cols < 1:
        raise UserError("a packed matrix needs columns", expected="cols >= 1", got=bank.cols)
    if bank.ends.dim() != 2:
        raise wrong("ends", "2 dimensions (n, rows)", f"shape {tuple(bank.ends.shape)}")
    if bank.words.dim() != 2:
        raise wrong("words", "2 dimensions (n, room)", f"shape {tuple(bank.words.shape)}")
    demand("ends", bank.ends, torch.int32, tuple(bank.ends.shape))
    demand("words", bank.words, torch.uint16, (len(bank.ends), bank.words.shape[1]))
    demand("levels", bank.levels, torch.bfloat16, (*bank.ends.shape, 2))
