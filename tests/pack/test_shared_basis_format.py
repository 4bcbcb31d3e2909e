"""Shared bases against sums in Python, frozen bytes, sizes, and damage."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moecompress.errors import UserError
from moecompress.pack import int_format, shared_basis
from moecompress.pack.scheme import Scheme
from moecompress.pack.shared_basis import SharedBasisBank


def random_bank(rows: int, cols: int, rank: int, bits: int = 4, group: int = 32, seed: int = 0) -> SharedBasisBank:
    g = torch.Generator().manual_seed(seed)
    groups = int_format.groups(rank, group)
    codes = torch.randint(0, 2**bits, (3, rows, rank), dtype=torch.uint8, generator=g)
    scales = torch.randint(1, 255, (3, rows, groups), dtype=torch.uint8, generator=g) if group else None
    own = int_format.pack(codes, torch.rand(3, rows, generator=g).bfloat16(), scales, None, bits, group)
    basis = torch.randint(0, 256, (1, rank, cols), dtype=torch.uint8, generator=g)
    return SharedBasisBank(own, int_format.pack(basis, torch.rand(1, rank, generator=g).bfloat16(), None, None, 8, 0))


@pytest.mark.parametrize(("rows", "cols", "rank", "group"), [(1, 1, 1, 0), (3, 7, 2, 0), (4, 90, 45, 32)])
def test_a_bank_is_the_sum_that_the_specification_says(rows: int, cols: int, rank: int, group: int) -> None:
    bank = random_bank(rows, cols, rank, 4, group)
    found, tensors = shared_basis.dequantize(bank), bank.tensors()
    codes = tensors["codes"].long()
    for n, r, c in ((n, r, c) for n in range(3) for r in range(rows) for c in {0, cols // 2, cols - 1}):
        wanted = 0.0
        for j in range(rank):
            code = int(codes[n, r, j // 2] >> 4 * (j % 2)) & 15
            multiplier = float(tensors["scales"][n, r, j // group]) if group else 1.0
            basis = float(tensors["basis_row_scales"][j]) * (int(tensors["basis_codes"][j, c]) - 127.5)
            wanted += float(tensors["row_scales"][n, r]) * multiplier * (code - 7.5) * basis
        assert float(found[n, r, c]) == pytest.approx(wanted, rel=1e-4, abs=1e-2)


@pytest.mark.parametrize("name", ["sb1b2g0s", "sb500b4g64a", "sb333b3g32s", "sb999b8g128s"])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (64, 64), (33, 70), (768, 2048)])
def test_sizes_bytes_and_names(rows: int, cols: int, name: str) -> None:
    scheme = Scheme.parse(name).fitted(cols)
    assert Scheme.parse(scheme.name) == scheme and scheme.coefficients.name == scheme.name[len(name.split("b")[1]) + 2 :]
    rank = max(1, int(scheme.shares[0] * cols / 1000 + 0.5))
    assert scheme.rank(cols) == rank <= max(1, cols) and (scheme.group == 0 or scheme.group < rank)
    tensors = scheme.tensors(5, rows, cols, torch.float32)
    nbytes = {key: torch.empty(shape, dtype=kind).nbytes for key, (kind, shape) in tensors.items()}
    shared = nbytes["basis_codes"] + nbytes["basis_row_scales"]
    assert scheme.shared_bytes(cols) == shared == rank * (16 * -(-cols // 16) + 2)
    assert sum(nbytes.values()) == 5 * scheme.price(rows, cols) + shared
    assert scheme.price(rows, cols) == scheme.coefficients.price(rows, rank)


# 0.5 is 3f00, 2 is 4000, 1 is 3f80, little-endian. Rows of codes are filled up to 16. Frozen with the format.
GOLDEN = {"codes": "8f00000000000000" + "7000000000000000", "row_scales": "003f0040",
          "basis_codes": "80ff007f" + 12 * "00" + "7f8081" + 13 * "00", "basis_row_scales": "803f003f"}  # fmt: skip


def test_golden_bytes() -> None:
    own = int_format.pack(torch.tensor([[[15, 8], [0, 7]]], dtype=torch.uint8), torch.tensor([[0.5, 2]]).bfloat16(), None, None, 4, 0)
    rows = torch.tensor([[[128, 255, 0, 127], [127, 128, 129, 0]]], dtype=torch.uint8)
    basis = int_format.pack(rows, torch.tensor([[1, 0.5]]).bfloat16(), None, None, 8, 0)
    bank = SharedBasisBank(own, basis)
    assert {name: bytes(t.contiguous().view(torch.uint8).flatten().tolist()).hex() for name, t in bank.tensors().items()} == GOLDEN
    # Row 0 of A is 3.75 and 0.25, row 1 is −15 and −1; B is (0.5, 127.5, −127.5, −0.5), (−0.25, 0.25, 0.75, −63.75).
    assert shared_basis.dequantize(bank)[0].tolist() == [[1.8125, 478.1875, -477.9375, -17.8125], [-7.25, -1912.75, 1911.75, 71.25]]


def test_damage_is_refused() -> None:
    bank = random_bank(4, 20, 10, 4, 0)
    own, basis = bank.coefficients, bank.basis
    unsound = basis.row_scales.clone()
    unsound[0, 3] = torch.inf
    for name, broken in {
        "codes": replace(bank, coefficients=replace(own, codes=own.codes[..., 1:])),
        "row_scales": replace(bank, coefficients=replace(own, row_scales=own.row_scales.float())),
        "basis_codes": replace(bank, basis=replace(basis, codes=basis.codes[:, 1:])),
        "basis_row_scales": replace(bank, basis=replace(basis, row_scales=unsound)),
        "basis_row_scales' does": replace(bank, basis=replace(basis, row_scales=basis.row_scales[:, 1:])),
    }.items():
        with pytest.raises(UserError, match=f"'{name}"):
            shared_basis.dequantize(broken)
