"""Vectors against a plain reading of the specification, and frozen bytes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from moecompress.errors import UserError
from moecompress.kernels import vector_matmul
from moecompress.pack import vector
from moecompress.pack.scheme import Scheme
from moecompress.pack.vector import VectorBank

RATES = {1: (8, 8), 1.5: (8, 12), 2: (4, 8), 3: (4, 12)}
SHAPES = [(1, 1), (3, 31), (2, 33), (5, 64)]


def a_bank(bits: float, rows: int, cols: int, seed: int = 0) -> tuple[VectorBank, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    d, number = RATES[bits]
    index = torch.randint(0, 2**number, (3, rows, -(-cols // d)), generator=generator)
    book = torch.randn(2**number, d, generator=generator).bfloat16()
    return vector.pack(index, (torch.rand(3, rows, generator=generator) + 0.1).bfloat16(), book, bits, cols), index


@pytest.mark.parametrize("bits", RATES)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_weights_are_what_the_specification_says(bits, rows, cols):
    bank, index = a_bank(bits, rows, cols)
    d, number = RATES[bits]
    stored = vector.dequantize(bank)
    for matrix, row, column in {(m, rows - 1, c) for m in range(3) for c in (0, cols // 2, cols - 1)}:
        data, m, count = bank.codes[matrix, row].tolist(), column // d, -(-cols // d)
        entry = data[m] + ((data[count + m // 2] >> (4 * (m % 2)) & 15) << 8 if number == 12 else 0)
        assert entry == index[matrix, row, m]
        assert stored[matrix, row, column] == bank.row_scales[matrix, row].float() * bank.book[entry, column % d].float()
    scheme = Scheme.parse({1: "v1", 1.5: "v1_5", 2: "v2", 3: "v3"}[bits])
    assert sum(t.nbytes for t in bank.tensors().values()) == 3 * scheme.price(rows, cols) + scheme.shared_bytes(cols)
    assert scheme.shared_bytes(cols) == bank.book.nbytes and Scheme(2, 64).shared_bytes(cols) == 0


# Its bytes are frozen with the format.


def test_golden_bytes():
    book = torch.zeros(4096, 4).bfloat16()
    book[0xB02], book[0xACD] = torch.tensor([1, -2, 0.5, 3]).bfloat16(), torch.tensor([4, 5, 6, 7]).bfloat16()
    bank = vector.pack(torch.tensor([[[0x001, 0xB02], [0x0EF, 0xACD]]]), torch.tensor([[1.0, 2.0]]).bfloat16(), book, 3, 7)
    assert bytes(bank.codes.flatten().tolist()).hex() == "0102b0efcda0"
    assert bank.row_scales.view(torch.uint8).flatten().tolist() == [0x80, 0x3F, 0x00, 0x40]
    assert vector.dequantize(bank)[0].tolist() == [[0, 0, 0, 0, 1, -2, 0.5], [0, 0, 0, 0, 8, 10, 12]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", RATES)
def test_product(bits, dtype):
    bank, _ = a_bank(bits, 20, 70)
    x, slots = torch.randn(6, 70).to(dtype), torch.tensor([2, -1, 0, 2, 1, -1], dtype=torch.int32)
    wanted = torch.einsum("soi,si->so", vector.dequantize(bank).double()[slots.long().clamp_min(0)], x.double()) * (slots >= 0)[:, None]
    y = vector_matmul.matmul(x, slots, bank)
    assert y.dtype == dtype and torch.allclose(y.double(), wanted, atol=(1e-5 if dtype == torch.float32 else 2**-8) * float(wanted.abs().max()))
    assert vector_matmul.matmul(x[:0], slots[:0], bank).shape == (0, 20)


def test_what_does_not_fit_is_refused():
    bank, index = a_bank(3, 4, 40)
    for bad in (-2, 3, 2**31 - 1):
        with pytest.raises(UserError, match="outside the bank of 3"):
            vector_matmul.matmul(torch.ones(1, 40), torch.tensor([bad], dtype=torch.int32), bank)
    for x, slots in ((torch.ones(2, 48), torch.zeros(2).int()), (torch.ones(2, 40), torch.zeros(2).long()), (torch.ones(40), torch.zeros(1).int())):
        with pytest.raises(UserError):
            vector_matmul.matmul(x, slots, bank)
    for bad in (index + 4096, index - 4096):
        with pytest.raises(ValueError, match="outside the book"):
            vector.pack(bad, bank.row_scales, bank.book, 3, 40)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_banks_are_refused(seed):
    """Sizes that contradict each other are a UserError, never a wrong product."""
    chance = random.Random(seed)
    bank, _ = a_bank(chance.choice(list(RATES)), 7, chance.choice((9, 33, 64)))
    broken = damaged(bank, chance)
    with pytest.raises(UserError):
        vector.dequantize(broken)
    with pytest.raises(UserError):
        vector_matmul.matmul(torch.ones(2, bank.cols), torch.tensor([0, 2], dtype=torch.int32), broken)


@pytest.mark.parametrize("bits", RATES)
def test_any_codes_are_entries(bits):
    bank, _ = a_bank(bits, 9, 70)
    wild = replace(bank, codes=torch.randint(0, 256, bank.codes.shape, dtype=torch.uint8))
    assert torch.isfinite(vector.dequantize(wild)).all()


def damaged(bank: VectorBank, chance: random.Random) -> VectorBank:
    name = chance.choice([*bank.tensors(), "bits"])
    if name == "bits":
        return replace(bank, bits=chance.choice([bits for bits in (0, 2.5, -1, 16, *RATES) if bits != bank.bits]))
    tensor = bank.tensors()[name]
    axis = chance.randrange(tensor.dim())
    cut = tensor.narrow(axis, 0, chance.randrange(tensor.shape[axis])).contiguous()
    return replace(bank, **{name: chance.choice([cut, torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis), tensor.float()])})


def test_the_operator_passes_torchs_own_check():
    bank, _ = a_bank(2, 9, 40)
    x, slots = torch.randn(3, 40), torch.tensor([0, -1, 2], dtype=torch.int32)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.moecompress.vector_matmul.default, (x, slots, *bank.tensors().values(), 2.0), test_utils=checks)
