"""QMoE's dictionary against a heap and a shortest path written here; the archive against the empirical entropy."""

from __future__ import annotations

import hashlib
import heapq
import math
import random
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch

from moecompress.errors import UserError
from moecompress.pack import dictionary, rans
from moecompress.pack.dictionary import prices

WIDTHS = [1, 2, 31, 33, 257]
QMOE = prices(0.885)


def random_trits(*shape: int, zero_rate: float = 0.885) -> torch.Tensor:
    u = torch.rand(*shape, generator=torch.Generator().manual_seed(shape[-1]))
    return torch.where(u < zero_rate, 1, torch.where(u < (1 + zero_rate) / 2, 0, 2)).to(torch.uint8)


def levels(trits: torch.Tensor) -> torch.Tensor:
    return torch.randn(*trits.shape[:2], 2).bfloat16()


@cache
def heap_words(zero: int, sign: int, size: int, longest: int) -> list[tuple[int, ...]]:
    """QMoE's construction: pop the best sequence, push its nine extensions."""
    cost = [(zero if a == 1 else sign) + (zero if b == 1 else sign) for a, b in product(range(3), repeat=2)]
    heap, words = [(0, 0, ())], []
    while len(words) < size:
        price, length, word = heapq.heappop(heap)
        if word:
            words.append(word)
        if length < longest:
            for symbol in range(9):
                heapq.heappush(heap, (price + cost[symbol], length + 1, (*word, symbol)))
    return words


def words_of(book: dictionary.Dictionary) -> list[tuple[int, ...]]:
    symbols = dictionary.pair_symbols(book.trits).tolist()
    return [tuple(s[:n]) for s, n in zip(symbols, book.lengths.tolist(), strict=True)]


@pytest.mark.parametrize(("zero_rate", "size", "longest"), [(0.885, 2**16, 14), (0.46, 5000, 14), (0.2, 300, 3), (0.97, 500, 14)])
def test_the_words_are_those_that_a_heap_pops(zero_rate, size, longest):
    assert words_of(dictionary.dictionary(prices(zero_rate), size, longest)) == heap_words(*prices(zero_rate), size, longest)


def test_frozen_dictionary_and_words():
    assert QMOE == (722, 16877)
    book = dictionary.dictionary(QMOE)
    digest = hashlib.sha256(book.lengths.numpy().tobytes() + book.trits.numpy().tobytes()).hexdigest()
    assert digest == "c0d8abe517d0a9a0b745d0cd69a43d3c09d3d069aef6d6e47c285879a67fca90"
    trits = torch.tensor([[[1] * 31, [0, 1, 1, 2, 2, *[1] * 26]]], dtype=torch.uint8)
    bank = dictionary.pack(trits, levels(trits), QMOE)
    assert (bank.words.tolist(), bank.ends.tolist()) == ([[25, 1, 64151, 2]], [[2, 4]])


@pytest.mark.parametrize("zero_rate", [0.0, 0.3, 0.46, 0.885, 0.99, 1.0])
def test_every_zero_rate_has_all_single_pairs_and_every_part_of_a_word(zero_rate):
    words = set(words_of(dictionary.dictionary(prices(zero_rate))))
    assert {(symbol,) for symbol in range(9)} <= words and len(words) == 2**16
    # What makes greedy matching the shortest parse, and a trie of words possible.
    assert all(word[1:] in words and word[:-1] in words for word in words if len(word) > 1)


@pytest.mark.parametrize(("zero_rate", "cols"), list(product([0.0, 0.46, 0.885, 1.0], WIDTHS)))
def test_round_trip(zero_rate, cols):
    trits = random_trits(3, 7, cols, zero_rate=zero_rate)
    bank = dictionary.pack(trits, levels(trits), prices(zero_rate))
    assert torch.equal(dictionary.decode(bank), trits)
    assert torch.equal(dictionary.decode(bank, 1, 2), trits[1:2])
    assert dictionary.decode(bank, 1, 1).shape == (0, 7, cols)
    dense = dictionary.dequantize(bank, first=1)
    expected = torch.stack([bank.levels[..., 0], torch.zeros(3, 7), bank.levels[..., 1]], -1)[1:].gather(-1, trits[1:].long())
    assert torch.equal(dense, expected)
    assert bank.bits_per_weight == pytest.approx((16 * bank.words.numel() + 64 * 21) / trits.numel())


def test_rows_read_alone_word_by_word():
    trits = random_trits(2, 5, 257)
    bank, book = dictionary.pack(trits, levels(trits), QMOE), dictionary.dictionary(QMOE)
    for matrix, row in ((0, 0), (0, 4), (1, 0), (1, 3)):
        ends, found = [0, *bank.ends[matrix].tolist()], []
        for word in bank.words[matrix, ends[row] : ends[row + 1]].tolist():
            found += book.trits[word, : 2 * int(book.lengths[word])].tolist()
        assert found[:257] == trits[matrix, row].tolist()


def fewest(symbols: list[int], words: set[tuple[int, ...]], longest: int) -> int:
    """Shortest path over the positions of a row."""
    best = [0] + [len(symbols) + 1] * len(symbols)
    for end in range(1, len(symbols) + 1):
        for begin in range(max(0, end - longest), end):
            if tuple(symbols[begin:end]) in words:
                best[end] = min(best[end], best[begin] + 1)
    return best[-1]


@pytest.mark.parametrize(
    ("dictionary_rate", "data_rate", "size", "longest"),
    [(0.885, 0.885, 2**16, 14), (0.885, 0.5, 2**16, 14), (0.46, 0.46, 2000, 6), (0.97, 0.885, 500, 14), (0.6, 0.6, 80, 2)],
)
def test_no_parse_has_fewer_words(dictionary_rate, data_rate, size, longest):
    book = dictionary.dictionary(prices(dictionary_rate), size, longest)
    words, trits = set(words_of(book)), random_trits(12, 121, zero_rate=data_rate)
    counts = dictionary.encode(trits, book)[1].tolist()
    assert counts == [fewest(row, words, longest) for row in dictionary.pair_symbols(trits).tolist()]


def test_all_parses_of_short_rows_on_a_tiny_dictionary():
    book = dictionary.dictionary(prices(0.6), 20, 3)
    words = set(words_of(book))

    @cache
    def parses(row: tuple[int, ...]) -> list[int]:
        return [1 + n for k in range(1, len(row) + 1) if row[:k] in words for n in parses(row[k:])] if row else [0]

    rows = torch.tensor(list(product([0, 1, 2], repeat=8)), dtype=torch.uint8)
    counts = dictionary.encode(rows, book)[1].tolist()
    assert counts == [min(parses(tuple(row))) for row in dictionary.pair_symbols(rows).tolist()]


@pytest.mark.parametrize(("cols", "most"), [(768, 0.83), (2048, 0.775), (2080, 0.775), (6144, 0.75)])
def test_bits_per_weight_on_the_published_zero_rate(cols, most):
    """0.807 is published for weights of 88.5 % zeros; the row tables (64 / cols bits) are counted."""
    trits = random_trits(1, 2**20 // cols, cols)
    bank = dictionary.pack(trits, levels(trits), QMOE)
    assert bank.bits_per_weight <= most


def test_a_dictionary_of_the_right_rate_is_the_better_one():
    trits = random_trits(1, 200, 2048, zero_rate=0.92)
    fitted, other = (dictionary.pack(trits, levels(trits), prices(rate)).bits_per_weight for rate in (0.92, 0.6))
    assert fitted < 0.9 * other
    best = dictionary.pack(trits, levels(trits), dictionary.fit_prices(trits[0])).bits_per_weight
    assert best <= fitted
    for zero_rate in (0.0, 0.1, 1.0):
        dictionary.dictionary(dictionary.fit_prices(random_trits(2, 50, zero_rate=zero_rate)))


def test_padding_is_never_read():
    trits = random_trits(3, 5, 257)
    bank = dictionary.pack(trits, levels(trits), QMOE, room=200)
    assert bank.words.shape == (3, 200) and not bank.words[:, int(bank.ends.max()) :].any()
    for matrix, words in enumerate(bank.words):
        words.view(torch.int16)[int(bank.ends[matrix, -1]) :] = -1
    assert torch.equal(dictionary.decode(bank), trits)
    with pytest.raises(ValueError, match="room for"):
        dictionary.pack(trits, levels(trits), QMOE, room=int(bank.ends.max()) - 1)


def damaged_banks(bank: dictionary.DictionaryBank):
    yield replace(bank, words=bank.words[1:])
    yield replace(bank, words=bank.words[0])
    yield replace(bank, words=bank.words[:, : bank.words.shape[1] // 2])
    yield replace(bank, words=bank.words.to(torch.int32))
    yield replace(bank, words=torch.cat([bank.words, bank.words[:1]]))
    yield replace(bank, levels=bank.levels[:1])
    yield replace(bank, ends=bank.ends.long())
    yield replace(bank, ends=bank.ends[0])
    yield replace(bank, ends=-bank.ends)
    yield replace(bank, ends=bank.ends.flip(1))
    yield replace(bank, ends=bank.ends + 1)
    yield replace(bank, cols=bank.cols + 2)
    yield replace(bank, cols=0)
    for bad in [(0, 5), (5, -1), (2**40, 5), (1.5, 5), (2**20, 1)]:
        yield replace(bank, prices=bad)


def test_damage_is_refused():
    trits = random_trits(2, 5, 257)
    for damaged in damaged_banks(dictionary.pack(trits, levels(trits), QMOE)):
        with pytest.raises(UserError):
            dictionary.decode(damaged)


def flipped(tensor: torch.Tensor, dice: random.Random) -> torch.Tensor:
    data = tensor.clone()
    raw = data.view(-1).view(torch.uint8)
    raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
    return data


def test_flipped_bits_never_crash():
    trits, dice = random_trits(2, 5, 257), random.Random(0)
    bank, packed = dictionary.pack(trits, levels(trits), QMOE), rans.archive(trits)
    refused = 0
    for _ in range(300):
        name = dice.choice(["words", "ends"])
        try:
            found = dictionary.decode(replace(bank, **{name: flipped(getattr(bank, name), dice)}))
            assert name == "words" and found.shape == trits.shape and int(found.max()) <= 2
        except UserError:
            pass
        name = dice.choice(["stream", "ends", "states", "tables"])
        try:
            found = rans.restore(replace(packed, **{name: flipped(getattr(packed, name), dice)}))
            assert found.shape == trits.shape and int(found.max()) <= 2
        except UserError:
            refused += 1
    assert refused > 290


@pytest.mark.parametrize("zero_rate", [0.0, 0.46, 0.885, 1.0])
def test_archive_round_trip(zero_rate):
    for cols in WIDTHS:
        trits = random_trits(3, 7, cols, zero_rate=zero_rate)
        packed = rans.archive(trits)
        assert torch.equal(rans.restore(packed), trits)
        assert packed.bits_per_weight == 8 * sum(t.nbytes for t in packed.tensors().values()) / trits.numel()
    row = levels(trits)
    direct, repacked = dictionary.pack(trits, row, QMOE), rans.repack(packed, row, QMOE)
    assert all(torch.equal(direct.tensors()[name], tensor) for name, tensor in repacked.tensors().items())


@pytest.mark.parametrize("zero_rate", [0.46, 0.885, 0.97])
def test_archive_is_within_a_hundredth_of_the_entropy(zero_rate):
    trits = random_trits(1, 512, 2048, zero_rate=zero_rate)
    share = [float((trits == t).double().mean()) for t in range(3)]
    entropy = -sum(p * math.log2(p) for p in share)
    assert rans.entropy(trits) == pytest.approx(entropy)
    assert 0.999 * entropy < rans.archive(trits).bits_per_weight < 1.01 * entropy


def test_frozen_archive():
    packed = rans.archive(torch.arange(2 * 3 * 257).remainder(3).to(torch.uint8).view(2, 3, 257))
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in packed.tensors().values())).hexdigest()
    assert digest == "8048c4c195b6c009a93e6777fc6b28cd61b79c6462bd03d8a7f43f53c8d6c070"


def test_a_damaged_archive_is_refused():
    packed = rans.archive(random_trits(2, 5, 257))
    for damaged in (
        replace(packed, stream=packed.stream[1:]), replace(packed, ends=packed.ends.flip(0)), replace(packed, ends=packed.ends[:1]),
        replace(packed, states=packed.states[:, 1:]), replace(packed, tables=packed.tables[:, 1:]), replace(packed, rows=0),
        replace(packed, states=torch.zeros_like(packed.states)), replace(packed, tables=torch.zeros_like(packed.tables)),
        replace(packed, cols=400),
    ):  # fmt: skip
        with pytest.raises(UserError):
            rans.restore(damaged)
