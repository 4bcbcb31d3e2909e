"""The packed format against integers that Python itself takes apart, and frozen bytes."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import pytest
import torch

from moecompress.errors import UserError
from moecompress.pack import int_format
from moecompress.pack.int_format import BITS, GROUPS, IntBank
from moecompress.pack.scheme import Scheme

SHAPES = [(1, 1), (3, 31), (2, 33), (5, 257)]  # rows, cols


def random_parts(rows: int, cols: int, bits: int, group: int, symmetric: bool, count: int = 2):
    """codes, row_scales, scales, zeros: what `pack` takes."""
    generator = torch.Generator().manual_seed(rows * cols + bits)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator, dtype=torch.uint8)

    n_groups = int_format.groups(cols, group)
    codes = integers(2**bits, count, rows, cols)
    row_scales = torch.rand(count, rows, generator=generator).bfloat16()
    scales = integers(256, count, rows, n_groups) if group else None
    zeros = None if symmetric else integers(2**bits, count, rows, n_groups)
    return codes, row_scales, scales, zeros


def random_bank(rows: int, cols: int, bits: int, group: int, symmetric: bool, count: int = 2) -> IntBank:
    return int_format.pack(*random_parts(rows, cols, bits, group, symmetric, count), bits, group)


def bit_field(data: torch.Tensor, width: int, position: int) -> int:
    """Number ``position`` of ``width`` bits in a byte string, lowest bit first."""
    return (int.from_bytes(bytes(data.tolist()), "little") >> (width * position)) & (2**width - 1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_codes_lie_where_the_specification_says(bits, rows, cols):
    codes = random_parts(rows, cols, bits, 0, True)[0]
    packed = int_format.pack_codes(codes, bits)
    padded = -(-cols // 16) * 16
    assert packed.shape == (2, rows, 2 * bits * padded // 16)
    low_width = 2 if bits == 3 else bits
    low_bytes = low_width * padded // 8
    row, expected = packed[1, rows - 1], codes[1, rows - 1].tolist() + [0] * (padded - cols)
    for column, code in enumerate(expected):
        value = bit_field(row[:low_bytes], low_width, column)
        if bits == 3:
            value += 4 * bit_field(row[low_bytes:], 1, column)
        assert value == code


@pytest.mark.parametrize(("bits", "group"), list(product(BITS, GROUPS)))
def test_zeros_lie_where_the_specification_says(bits, group):
    zeros = random_parts(2, 500, bits, group, False)[3]
    packed = int_format.pack_zeros(zeros, bits)
    assert packed.shape[-1] == int_format.zero_bytes(500, bits, group)
    assert [bit_field(packed[1, 1], bits, j) for j in range(zeros.shape[-1])] == zeros[1, 1].tolist()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), list(product(BITS, GROUPS)))
def test_round_trip_sizes_and_weights(bits, group, symmetric):
    for rows, cols in SHAPES:
        codes, row_scales, scales, zeros = random_parts(rows, cols, bits, group, symmetric)
        bank = int_format.pack(codes, row_scales, scales, zeros, bits, group)
        int_format.check(bank)
        assert (bank.symmetric, bank.rows, bank.count, bank.cols) == (symmetric, rows, 2, cols)

        assert torch.equal(int_format.unpack_codes(bank.codes, bits, cols), codes)
        if zeros is not None:
            assert torch.equal(int_format.unpack_zeros(bank.zeros, bits, zeros.shape[-1]), zeros)
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in bank.tensors().items()}
        assert found == Scheme(bits, group, symmetric).tensors(2, rows, cols, torch.float32)

        # In float64, column by column.
        of_column = torch.tensor([c // group if group else 0 for c in range(cols)])
        scale = row_scales.double()[..., None] * (scales.double()[..., of_column] if scales is not None else 1)
        zero = (2**bits - 1) / 2 if zeros is None else zeros.double()[..., of_column]
        expected = scale * (codes.double() - zero)
        weights = int_format.dequantize(bank)
        assert weights.dtype == torch.float32 and weights.shape == (2, rows, cols)
        torch.testing.assert_close(weights.double(), expected, rtol=2e-7, atol=0)
        assert torch.equal(int_format.dequantize(bank, torch.bfloat16), weights.bfloat16())
        assert torch.equal(int_format.dequantize(bank, index=slice(1, 2)), weights[1:])
        assert torch.equal(int_format.dequantize(bank, index=torch.tensor([1, 0, 1])), weights[[1, 0, 1]])


# One matrix of 2 rows and 18 columns, groups of 0 or 32; its bytes are frozen with version 1 of the format.
GOLDEN_CODES = {
    2: [[0, 1, 2, 3, 3, 2, 1, 0, 0, 0, 1, 1, 2, 2, 3, 3, 2, 1], [3] * 18],
    3: [[0, 1, 2, 3, 4, 5, 6, 7, 7, 6, 5, 4, 3, 2, 1, 0, 5, 2], [7] * 18],
    4: [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 9, 6], [15] * 18],
    8: [[0, 1, 127, 128, 129, 254, 255, 3, 4, 5, 6, 7, 8, 9, 10, 11, 200, 100], [255] * 18],
}
GOLDEN_BYTES = {
    2: ["e41b50fa06000000", "ffffffff0f000000"],
    3: ["e4e41b1b09000000f00f0100", "ffffffff0f000000ffff0300"],
    4: ["1032547698badcfe6900000000000000", "ffffffffffffffffff00000000000000"],
    8: [
        "00017f8081feff030405060708090a0bc8640000000000000000000000000000",
        "ffffffffffffffffffffffffffffffffffff0000000000000000000000000000",
    ],
}
GOLDEN_ZEROS = {2: ["02", "03"], 3: ["05", "07"], 4: ["09", "0f"], 8: ["80", "ff"]}
GOLDEN_LAST = {2: -3.0, 3: -9.0, 4: -9.0, 8: -84.0}  # scale 1.5 * 2, column 17 of row 0


@pytest.mark.parametrize("bits", BITS)
def test_golden_bytes(bits):
    codes = torch.tensor([GOLDEN_CODES[bits]], dtype=torch.uint8)
    zeros = torch.tensor([[[int(row, 16)] for row in GOLDEN_ZEROS[bits]]], dtype=torch.uint8)
    row_scales = torch.tensor([[1.5, -0.25]], dtype=torch.bfloat16)
    bank = int_format.pack(codes, row_scales, torch.tensor([[[2], [255]]], dtype=torch.uint8), zeros, bits, 32)
    assert [bytes(row.tolist()).hex() for row in bank.codes[0]] == GOLDEN_BYTES[bits]
    assert [bytes(row.tolist()).hex() for row in bank.zeros[0]] == GOLDEN_ZEROS[bits]
    weights = int_format.dequantize(bank)[0]
    assert weights[0, 17].item() == GOLDEN_LAST[bits]
    assert weights[1].tolist() == [0.0] * 18


def test_golden_zeros_cross_bytes():
    zeros = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0, 1], dtype=torch.uint8)
    assert bytes(int_format.pack_zeros(zeros, 3).tolist()).hex() == "d1581f01"


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((768, 2048, 4, 128, True), 768 * (1024 + 2 + 16)),
        ((768, 2048, 3, 64, False), 768 * (768 + 2 + 32 + 12)),
        ((1, 1, 2, 0, False), 4 + 2 + 1),
        ((5, 257, 8, 0, True), 5 * (272 + 2)),
    ],
)
def test_price_by_hand(sizes, expected):
    rows, cols, *of_code = sizes
    assert Scheme(*of_code).price(rows, cols) == expected


def test_codes_that_do_not_fit_are_refused():
    codes, row_scales, scales, zeros = random_parts(2, 20, 3, 32, False)
    with pytest.raises(ValueError, match="codes must be below 4"):
        int_format.pack(codes, row_scales, scales, None, 2, 32)
    with pytest.raises(ValueError, match="zeros must be below 4"):
        int_format.pack(codes & 3, row_scales, scales, zeros, 2, 32)


@pytest.mark.parametrize(("name", "bits", "group"), [("bits", 5, 32), ("bits", 1, 32), ("group", 4, 48)])
def test_unknown_parameters_are_refused(name, bits, group):
    with pytest.raises(UserError, match=f"no {name} ="):
        Scheme(bits, group).tensors(1, 4, 4, torch.float32)


def damaged(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    """The tensor with another shape or dtype."""
    axis = chance.randrange(tensor.dim())
    change = chance.choice(["cut", "grow", "dtype", "flat", "axis"])
    if change == "cut":
        return tensor.narrow(axis, 0, tensor.shape[axis] - 1)
    if change == "grow":
        return torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis)
    if change == "dtype":
        return tensor.to(torch.int16 if tensor.dtype == torch.uint8 else torch.float16)
    return tensor.flatten() if change == "flat" else tensor.unsqueeze(0)


@pytest.mark.parametrize("seed", range(60))
def test_damaged_tensors_are_named(seed):
    chance = random.Random(seed)
    bits, group, symmetric = chance.choice(BITS), chance.choice(GROUPS), chance.random() < 0.5
    bank = random_bank(3, 300, bits, group, symmetric)
    name = chance.choice(sorted(bank.tensors()))
    broken = replace(bank, **{name: damaged(bank.tensors()[name], chance)})
    with pytest.raises(UserError) as error:
        int_format.check(broken)
    # Codes are the measure of the others: if they have the wrong number of matrices or rows, another is at odds.
    assert f"'{name}'" in str(error.value) or name == "codes"


def test_missing_and_unknown_tensors_are_refused():
    bank = random_bank(3, 40, 4, 32, False)
    tensors = bank.tensors()
    again = int_format.from_tensors(tensors, 4, 32, 40)
    assert torch.equal(int_format.dequantize(again), int_format.dequantize(bank))
    with pytest.raises(UserError, match="row_scales"):
        int_format.from_tensors({"codes": bank.codes}, 4, 32, 40)
    with pytest.raises(UserError, match="weight"):
        int_format.from_tensors({**tensors, "weight": bank.codes}, 4, 32, 40)
    with pytest.raises(UserError, match="'scales'"):
        int_format.from_tensors({name: tensors[name] for name in ("codes", "row_scales")}, 4, 32, 40)
    with pytest.raises(UserError, match="'codes'"):
        int_format.from_tensors(tensors, 4, 32, 41 + 8)
