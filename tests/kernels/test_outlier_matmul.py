"""Products with outliers against float64, on the compiled library and without it; what is damaged never reaches memory."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from moecompress.errors import UserError
from moecompress.kernels import library, ops
from moecompress.kernels import outliers as kernel
from moecompress.pack import int_format, outliers
from moecompress.pack.outliers import OutlierBank


def a_bank(rows: int, cols: int, bits: int = 2, group: int = 64, share: float = 0.01, count: int = 3, seed: int = 0) -> OutlierBank:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (count, rows, cols), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (count, rows, int_format.groups(cols, group)), generator=generator, dtype=torch.uint8)
    row_scales = (torch.rand(count, rows, generator=generator) / 64 + 0.1).bfloat16()
    scales = torch.randint(1, 9, (count, rows, int_format.groups(cols, group)), generator=generator, dtype=torch.uint8)
    dense = int_format.pack(codes, row_scales, scales if group else None, zeros, bits, group)
    first = outliers.starts(cols, share)
    index = first + (torch.rand(count, rows, len(first), generator=generator) * (cols - first).clamp_max(256)).long()
    return outliers.pack(dense, (8 * torch.randn(count, rows, len(first), generator=generator)).bfloat16(), index, share)


@pytest.fixture(params=["library", "torch"])
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(kernel, "_ready", lambda: False)
    elif kernel._load() is None:
        pytest.skip("the compiled library is not there")
    return request.param


def expected(bank: OutlierBank, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    weights = outliers.dequantize(bank).double()
    y = torch.einsum("soi,si->so", weights[slots.long().clamp_min(0)], x.double())
    return y * (slots >= 0)[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (7, 300), (300, 257), (64, 1024)])
@pytest.mark.parametrize("batch", [0, 1, 6, 3 * max(ops.CROWD.values())])
def test_product(way, rows, cols, dtype, batch):
    """At the largest batch one matrix is unpacked for a dense product while the others are not."""
    bank = a_bank(rows, cols)
    generator = torch.Generator().manual_seed(batch)
    x = (torch.randn(batch, cols, generator=generator) / 8).to(dtype)
    slots = torch.randint(-1, 2, (batch,), generator=generator, dtype=torch.int32)
    slots[: batch // 2] = 2
    y = kernel.matmul(x, slots, bank)
    wanted = expected(bank, x, slots)
    assert y.dtype == dtype and y.shape == (batch, rows)
    close = 2e-5 if dtype == torch.float32 else 2**-6
    assert torch.allclose(y.double(), wanted, atol=close * float(wanted.abs().max()) if batch else 0.0)


def test_the_library_adds_what_torch_adds():
    if kernel._load() is None:
        pytest.skip("the compiled library is not there")
    bank = a_bank(600, 700, share=0.02)
    x, slots = torch.randn(5, 700), torch.tensor([2, -1, 0, 1, 2], dtype=torch.int32)
    only = expected(bank, x, slots) - torch.einsum("soi,si->so", int_format.dequantize(bank.dense).double()[slots.long().clamp_min(0)], x.double()) * (
        slots >= 0)[:, None]  # fmt: skip
    assert torch.allclose(kernel.added(x, slots, bank).double(), only, atol=1e-4)


def test_dequantize_some_in_any_order():
    bank = a_bank(20, 300, bits=4, group=32)
    whole = outliers.dequantize(bank)
    assert torch.equal(kernel.dequantize(bank), whole)
    index = torch.tensor([2, 0, 2])
    assert torch.equal(kernel.dequantize(bank, torch.bfloat16, index), whole[index].bfloat16())


@pytest.mark.parametrize("bad", [-2, 3, 2**31 - 1])
def test_slots_outside_the_bank_are_refused(way, bad):
    bank = a_bank(5, 40)
    for batch in (3, 4 * max(ops.CROWD.values())):
        slots = torch.zeros(batch, dtype=torch.int32)
        slots[1] = bad
        with pytest.raises(UserError, match="outside the bank of 3"):
            kernel.matmul(torch.ones(batch, 40), slots, bank)
    with pytest.raises(UserError, match="outside the bank of 3"):
        kernel.dequantize(bank, index=torch.tensor([0, bad]))
    if way == "library":
        with pytest.raises(ValueError, match="status 3"):
            kernel.added(torch.ones(1, 40), torch.tensor([bad], dtype=torch.int32), bank)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_banks_are_refused(way, seed):
    """Sizes that contradict each other are a UserError, with either operator."""
    chance = random.Random(seed)
    bank = a_bank(7, chance.choice((33, 300, 600)), chance.choice((2, 3, 4)), chance.choice((0, 32, 64)), chance.choice((0.005, 0.01, 0.02)))
    broken = damaged(bank, chance)
    with pytest.raises(UserError):
        kernel.matmul(torch.ones(2, bank.dense.cols), torch.tensor([0, 2], dtype=torch.int32), broken)
    with pytest.raises(UserError):
        kernel.dequantize(broken)


@pytest.mark.parametrize("seed", range(10))
def test_any_bytes_stay_inside(way, seed):
    """Columns, values and codes of any bytes whatever: a product is computed, and no column is read that is not there."""
    generator = torch.Generator().manual_seed(seed)
    bank = a_bank(40, (100, 600)[seed % 2])
    wild = replace(bank, columns=torch.randint(0, 256, bank.columns.shape, generator=generator, dtype=torch.uint8),
                   values=torch.randint(-(2**15), 2**15, bank.values.shape, generator=generator, dtype=torch.int16).view(torch.bfloat16))  # fmt: skip
    bank = replace(bank, columns=wild.columns.clamp_max(87))
    assert kernel.matmul(torch.ones(2, bank.dense.cols), torch.tensor([0, 2], dtype=torch.int32), bank).shape == (2, 40)
    if way == "library":
        kernel.matmul(torch.ones(2, bank.dense.cols), torch.tensor([0, 2], dtype=torch.int32), wild)
    with pytest.raises(UserError, match="outlier_columns"):
        kernel.dequantize(wild)


def damaged(bank: OutlierBank, chance: random.Random) -> OutlierBank:
    name = chance.choice([*bank.tensors(), "share"])
    if name == "share":
        return replace(bank, share=chance.choice([0.0, -0.01, 0.3, 8.0]))
    tensor = bank.tensors()[name]
    axis = chance.randrange(tensor.dim())
    cut = tensor.narrow(axis, 0, chance.randrange(tensor.shape[axis])).contiguous()
    changed = chance.choice([cut, torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis), tensor.float()])
    if name.startswith("outlier_"):
        return replace(bank, **{name.removeprefix("outlier_"): changed})
    return replace(bank, dense=replace(bank.dense, **{name: changed}))


def test_both_operators_pass_torchs_own_check_and_compile_whole():
    bank = a_bank(9, 300)
    x, slots = torch.randn(3, 300), torch.tensor([0, -1, 2], dtype=torch.int32)
    settings = (*kernel._tensors(bank), 2, 64, 0.01)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.moecompress.outlier_matmul.default, (x, slots, *settings), test_utils=checks)
    torch.library.opcheck(torch.ops.moecompress.outlier_dequantize.default, (*settings, 300, torch.float32, torch.tensor([1])), test_utils=checks)
    compiled = torch.compile(lambda x: kernel.matmul(x, slots, bank), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), kernel.matmul(x, slots, bank))


def test_without_the_library_the_user_hears_of_it(monkeypatch, capsys):
    bank = a_bank(5, 40)
    monkeypatch.setattr(library, "load", lambda name, interface: None)
    kernel._ready.cache_clear()
    try:
        for _ in range(2):
            kernel.matmul(torch.ones(1, 40), torch.tensor([0], dtype=torch.int32), bank)
    finally:
        kernel._ready.cache_clear()
    assert capsys.readouterr().err.count("no compiled kernels for outliers") == 1
