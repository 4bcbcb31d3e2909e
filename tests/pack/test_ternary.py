"""Base-3 and sign packing against digits that Python takes apart, frozen bytes, and damage."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moecompress.errors import UserError
from moecompress.pack import ternary
from moecompress.pack.scheme import Scheme

WIDTHS = [1, 4, 5, 6, 31, 33, 257]


def random_digits(base: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, base, shape, generator=torch.Generator().manual_seed(shape[-1]), dtype=torch.uint8)


@pytest.mark.parametrize("cols", WIDTHS)
def test_trits_round_trip_and_lie_where_the_specification_says(cols):
    trits = random_digits(3, 2, 3, cols)
    packed = ternary.pack_trits(trits)
    assert packed.shape == (2, 3, -(-cols // 5))
    assert torch.equal(ternary.unpack_trits(packed, cols), trits)
    row = trits[1, 2].tolist() + [1] * (-cols % 5)
    assert packed[1, 2].tolist() == [sum(row[i + j] * 3**j for j in range(5)) for i in range(0, cols, 5)]


@pytest.mark.parametrize("cols", WIDTHS)
def test_bits_round_trip_and_lie_where_the_specification_says(cols):
    bits = random_digits(2, 2, 3, cols)
    packed = ternary.pack_bits(bits)
    assert packed.shape == (2, 3, -(-cols // 8))
    assert torch.equal(ternary.unpack_bits(packed, cols), bits)
    assert int.from_bytes(bytes(packed[1, 2].tolist()), "little") == sum(b << i for i, b in enumerate(bits[1, 2].tolist()))


def test_frozen_bytes():
    assert ternary.pack_trits(torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.uint8)).tolist() == [102, 2 + 3 + 9 + 27 + 81]
    assert ternary.pack_bits(torch.tensor([1, 0, 1, 1, 0, 0, 0, 1, 1], dtype=torch.uint8)).tolist() == [141, 1]


@pytest.mark.parametrize("cols", WIDTHS)
def test_banks_hold_their_weights_in_the_bytes_they_say(cols):
    trits, levels = random_digits(3, 2, 3, cols), torch.randn(2, 3, 2).bfloat16()
    bank = ternary.pack_ternary(trits, levels)
    assert sum(t.nbytes for t in bank.tensors().values()) == 2 * Scheme.parse("ternary").price(3, cols)
    found = ternary.dequantize(bank)
    for n, r, c in [(0, 0, 0), (1, 2, cols - 1), (1, 0, cols // 2)]:
        assert found[n, r, c] == [float(levels[n, r, 0]), 0.0, float(levels[n, r, 1])][trits[n, r, c]]

    bits, scales = random_digits(2, 2, 3, cols), torch.rand(2, 3).bfloat16()
    signs = ternary.pack_signs(bits, scales)
    assert sum(t.nbytes for t in signs.tensors().values()) == 2 * Scheme.parse("sign").price(3, cols)
    assert torch.equal(ternary.dequantize(signs), (2.0 * bits - 1) * scales.float().unsqueeze(-1))
    assert ternary.dequantize(signs, torch.bfloat16).dtype == torch.bfloat16


def test_every_byte_is_five_trits_or_refused():
    for byte in range(256):
        packed = torch.tensor([byte], dtype=torch.uint8)
        if byte < 243:
            assert torch.equal(ternary.pack_trits(ternary.unpack_trits(packed, 5)), packed)
        else:
            with pytest.raises(UserError, match="codes"):
                ternary.unpack_trits(packed, 5)


def test_damage_and_nonsense_are_refused():
    bank = ternary.pack_ternary(random_digits(3, 2, 3, 31), torch.zeros(2, 3, 2).bfloat16())
    signs = ternary.pack_signs(random_digits(2, 2, 3, 31), torch.zeros(2, 3).bfloat16())
    for damaged in (
        replace(bank, codes=bank.codes[..., 1:]), replace(bank, codes=bank.codes[0]), replace(bank, codes=bank.codes.int()),
        replace(bank, levels=bank.levels[:1]), replace(bank, levels=bank.levels.float()), replace(bank, cols=36),
        replace(bank, cols=0), replace(signs, codes=signs.codes[..., 1:]), replace(signs, scales=signs.scales[:, 1:]),
        replace(signs, cols=40),
    ):  # fmt: skip
        with pytest.raises(UserError):
            ternary.dequantize(damaged)
    with pytest.raises(ValueError, match="0 to 2"):
        ternary.pack_trits(torch.tensor([3], dtype=torch.uint8))
    with pytest.raises(ValueError, match="0 to 1"):
        ternary.pack_bits(torch.tensor([2], dtype=torch.uint8))
