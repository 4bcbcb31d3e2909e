"""Nested integers against integers that Python itself takes apart, and frozen bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moecompress.errors import UserError
from moecompress.pack import int_format, nested
from moecompress.pack.int_format import GROUPS
from moecompress.pack.nested import NestedBank, widths
from moecompress.pack.scheme import Scheme

SHAPES = [(1, 1), (3, 31), (2, 33), (5, 257)]  # rows, cols


def random_parts(rows: int, cols: int, bits: int, group: int):
    """codes, row_scales, scales of two matrices: what `pack` takes."""
    generator = torch.Generator().manual_seed(rows * cols + bits)
    codes = torch.randint(0, 2**bits, (2, rows, cols), generator=generator, dtype=torch.uint8)
    row_scales = (torch.rand(2, rows, generator=generator) + 0.1).bfloat16()
    scales = torch.randint(1, 256, (2, rows, int_format.groups(cols, group)), generator=generator, dtype=torch.uint8) if group else None
    return codes, row_scales, scales


def at(bank: NestedBank, bits: int) -> NestedBank:
    """The bank without the planes that ``bits`` bits do not need."""
    return replace(bank, planes=dict(list(bank.planes.items())[: bits - 2]))


def bit_field(data: torch.Tensor, width: int, position: int) -> int:
    return (int.from_bytes(bytes(data.tolist()), "little") >> (width * position)) & (2**width - 1)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_codes_lie_where_the_specification_says(bits, rows, cols):
    codes = random_parts(rows, cols, bits, 0)[0]
    base, planes = nested.split(codes, bits)
    padded = -(-cols // 16) * 16
    assert base.shape == (2, rows, padded // 4) and all(plane.shape == (2, rows, padded // 8) for plane in planes.values())
    for column, code in enumerate(codes[1, rows - 1].tolist() + [0] * (padded - cols)):
        digits = f"{code:0{bits}b}"
        assert bit_field(base[1, rows - 1], 2, column) == int(digits[:2], 2)
        assert [str(bit_field(plane[1, rows - 1], 1, column)) for plane in planes.values()] == list(digits[2:])


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [3, 4])
def test_fewer_bits_are_the_shifted_codes(bits, group):
    for rows, cols in SHAPES:
        codes, row_scales, scales = random_parts(rows, cols, bits, group)
        bank = nested.pack(codes, row_scales, scales, bits, group)
        scheme = Scheme.parse(f"n{bits}g{group}s")
        assert {name: (t.dtype, tuple(t.shape)) for name, t in bank.tensors().items()} == scheme.tensors(2, rows, cols, torch.float32)
        assert scheme.price(rows, cols) == Scheme.parse(f"b{bits}g{group}s").price(rows, cols)
        of_column = torch.tensor([c // group if group else 0 for c in range(cols)])
        scale = row_scales.double()[..., None] * (scales.double()[..., of_column] if scales is not None else 1)
        for k in widths(bits):
            top = (codes >> (bits - k)).double()
            expected = scale * 2 ** (bits - k) * (top - (2**k - 1) / 2)
            loaded = nested.as_integers(at(bank, k))
            int_format.check(loaded)
            assert loaded.bits == k and torch.equal(int_format.unpack_codes(loaded.codes, k, cols), (codes >> (bits - k)))
            torch.testing.assert_close(int_format.dequantize(loaded).double(), expected, rtol=2e-7, atol=0)
        again = nested.from_integers(nested.as_integers(bank))
        assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in bank.tensors().items())


@pytest.mark.parametrize("bits", [3, 4])
def test_a_coarse_value_is_the_mean_of_the_fine_ones_it_stands_for(bits):
    bank = nested.pack(torch.arange(2**bits, dtype=torch.uint8)[None, None], torch.ones(1, 1).bfloat16(), None, bits, 0)
    fine = int_format.dequantize(nested.as_integers(bank)).flatten()
    for k in widths(bits):
        coarse = int_format.dequantize(nested.as_integers(at(bank, k))).flatten()
        assert torch.equal(coarse.unflatten(0, (2**k, -1))[:, 0], fine.unflatten(0, (2**k, -1)).mean(1))


# The row of test_int_format.py's four-bit codes; frozen with the format.
GOLDEN_CODES = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 9, 6]
GOLDEN = {"codes": "0055aaff06000000", "plane_3": "cccc0200", "plane_4": "aaaa0100"}


def test_golden_bytes():
    bank = nested.pack(torch.tensor([[GOLDEN_CODES]], dtype=torch.uint8), torch.tensor([[1.5]]).bfloat16(), torch.tensor([[[2]]], dtype=torch.uint8), 4, 32)
    assert {name: bytes(bank.tensors()[name].flatten().tolist()).hex() for name in GOLDEN} == GOLDEN
    last = {k: int_format.dequantize(nested.as_integers(at(bank, k)))[0, 0, 17].item() for k in (2, 3, 4)}
    assert last == {4: 3.0 * (6 - 7.5), 3: 6.0 * (3 - 3.5), 2: 12.0 * (1 - 1.5)}


def test_what_does_not_fit_is_refused():
    codes, row_scales, scales = random_parts(3, 40, 4, 32)
    with pytest.raises(ValueError, match="codes must be below 8"):
        nested.pack(codes, row_scales, scales, 3, 32)
    with pytest.raises(UserError, match="no bits = 8"):
        nested.pack(codes, row_scales, scales, 8, 32)
    bank = nested.pack(codes, row_scales, scales, 4, 32)
    for name, broken in {
        "plane_4": replace(bank, planes=bank.planes | {"plane_4": bank.planes["plane_4"][:, :2]}),
        "plane": replace(bank, planes={"plane_4": bank.planes["plane_4"]}),
        "codes": replace(bank, codes=bank.codes[..., 1:]),
        "scales": replace(bank, scales=None),
    }.items():
        with pytest.raises(UserError, match=f"'{name}'"):
            nested.check(broken)
