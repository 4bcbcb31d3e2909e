"""The kernels, compiled and reference, against float64 arithmetic on the numbers before they were packed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch

from moecompress import kernels
from moecompress.errors import UserError
from moecompress.kernels import native, ops, reference
from moecompress.pack import int_format
from moecompress.pack.int_format import BITS, GROUPS, IntBank

BEST = native.status()
SETS = [name for name in ("avx512_vnni", "avx512", "avx2", "neon", "scalar") if native.choose(name)]
if SETS:
    native.choose(BEST)

KERNELS = ["reference", *SETS]
CROWD = max(ops.CROWD.values())  # so many rows of x for one matrix are a dense product


@pytest.fixture(params=KERNELS)
def kernel(request) -> Iterator[str]:
    """The name of a kernel; a compiled one is in use during the test."""
    if request.param == "reference":
        yield "reference"
    else:
        assert native.choose(request.param)
        yield request.param
        native.choose(BEST)


def multiply(kernel: str, x: torch.Tensor, slots: torch.Tensor, bank: IntBank) -> torch.Tensor:
    if kernel != "reference":
        return native.grouped_matmul(x, slots, bank)
    return reference.grouped_matmul(x, slots, *tensors_of(bank), bank.bits, bank.group)


def unpack(bank: IntBank, dtype: torch.dtype, index: torch.Tensor, first: int, last: int) -> torch.Tensor:
    out = torch.full((index.shape[0], last - first, bank.cols), 7.0, dtype=dtype)
    native.dequantize(bank, index, first, last, out)
    return out


def tensors_of(bank: IntBank):
    return bank.codes, bank.row_scales, bank.scales, bank.zeros


def bank_and_weights(rows: int, cols: int, bits: int, group: int, symmetric: bool, count: int = 3):
    """A random bank, and its weights in float64 (count, rows, cols) computed from the numbers before packing."""
    generator = torch.Generator().manual_seed(1000 * rows + cols + bits)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator, dtype=torch.uint8)

    n_groups = int_format.groups(cols, group)
    codes = integers(2**bits, count, rows, cols)
    row_scales = (torch.rand(count, rows, generator=generator) - 0.3).bfloat16()
    scales = integers(256, count, rows, n_groups) if group else None
    zeros = None if symmetric else integers(2**bits, count, rows, n_groups)
    of_column = torch.arange(cols) // group if group else torch.zeros(cols, dtype=torch.long)
    scale = row_scales.double()[..., None] * (1 if scales is None else scales.double()[..., of_column])
    zero = (2**bits - 1) / 2 if zeros is None else zeros.double()[..., of_column]
    return int_format.pack(codes, row_scales, scales, zeros, bits, group), scale * (codes.double() - zero)


def assert_product(
    y: torch.Tensor, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, weight_error: float = 3e-6
) -> None:
    """y is W x up to the rounding of float32 weights and sums, and of the output's own type."""
    exact = torch.zeros(x.shape[0], weights.shape[1], dtype=torch.float64)
    bound = torch.zeros_like(exact)
    for slot in range(weights.shape[0]):
        exact[slots == slot] = x[slots == slot].double() @ weights[slot].T
        bound[slots == slot] = x[slots == slot].double().abs() @ weights[slot].T.abs() * weight_error
        if x.dtype == torch.bfloat16:  # avx512_vnni: small x beside large ones are rounded to 2^-15 of those
            largest = x[slots == slot].double().abs().amax(dim=1, keepdim=True)
            bound[slots == slot] += weights[slot].abs().sum(dim=1) * largest / 2**15
    if y.dtype != torch.float32:
        bound = bound + exact.abs() * torch.finfo(y.dtype).eps
    assert y.dtype == x.dtype and y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), list(product(BITS, GROUPS)))
def test_products_match_float64(kernel, bits, group, symmetric):
    batches = iter(list(range(1, 18)) * 2)  # every batch from 1 to 17
    for rows, cols in product((1, 31, 33, 257), (1, 31, 33, 257)):
        bank, weights = bank_and_weights(rows, cols, bits, group, symmetric)
        batch = next(batches)
        generator = torch.Generator().manual_seed(batch)
        slots = torch.randint(-1, 3, (batch,), generator=generator, dtype=torch.int32)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(batch, cols, generator=generator).to(dtype)
            assert_product(multiply(kernel, x, slots, bank), x, slots, weights)


@pytest.mark.parametrize("tokens", range(1, 18))
def test_many_rows_of_x_for_one_matrix(kernel, tokens):
    # Wide enough for the compiled kernel to take the columns in several steps, at every number of shared vectors.
    bits, group, symmetric = (2, 32, False) if tokens % 2 else (3, 128, True)
    bank, weights = bank_and_weights(9, 4500, bits, group, symmetric, count=2)
    x = torch.randn(tokens + 1, 4500, generator=torch.Generator().manual_seed(tokens))
    slots = torch.tensor([1] * tokens + [0], dtype=torch.int32)
    assert_product(multiply(kernel, x, slots, bank), x, slots, weights)


@pytest.mark.parametrize("bits", BITS)
def test_large_matrices_on_all_threads(kernel, bits):
    bank, weights = bank_and_weights(700, 1100, bits, 64, False, count=4)
    x = torch.randn(80, 1100, generator=torch.Generator().manual_seed(1))
    slots = torch.arange(80, dtype=torch.int32) % 5 - 1
    assert_product(multiply(kernel, x, slots, bank), x, slots, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dequantize_is_bit_for_bit_the_format(kernel, symmetric, dtype):
    if kernel == "reference":
        pytest.skip("the format's own function is the reference")
    for bits, group, cols in product(BITS, GROUPS, (1, 33, 257, 1025)):
        bank = bank_and_weights(5, cols, bits, group, symmetric)[0]
        expected = int_format.dequantize(bank, dtype)
        index = torch.tensor([2, 0, 2])
        for first, last in ((0, 5), (2, 4)):
            assert torch.equal(unpack(bank, dtype, index, first, last), expected[index, first:last])


@pytest.mark.parametrize("bits", BITS)
def test_bfloat16_within_a_factor_of_64_is_exact(kernel, bits):
    bank, weights = bank_and_weights(33, 300, bits, 32, False)
    generator = torch.Generator().manual_seed(bits)
    x = (torch.rand(5, 300, generator=generator) * 4.5 - 2.2).exp2()
    x = (x * (torch.randint(0, 2, x.shape, generator=generator) * 2 - 1) * 2.0**20).bfloat16()
    slots = torch.tensor([0, 1, 2, 1, 2], dtype=torch.int32)
    y = multiply(kernel, x, slots, bank)
    exact = torch.einsum("src,sc->sr", weights[slots.long()], x.double())
    scale = torch.einsum("src,sc->sr", weights[slots.long()].abs(), x.double().abs())
    assert bool(((y.double() - exact).abs() <= exact.abs() * 2**-8 + scale * 1e-6).all())


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e38, 1e-38, 0.0])
def test_extreme_activations(kernel, value):
    bank, weights = bank_and_weights(4, 70, 4, 32, False)
    x = torch.zeros(1, 70, dtype=torch.bfloat16)
    x[0, 33] = value
    y = multiply(kernel, x, torch.tensor([1], dtype=torch.int32), bank)[0].double()
    if x.isfinite().all():
        assert bool(((y - weights[1, :, 33] * x[0, 33].double()).abs() <= y.abs() / 128 + 1e-30).all())
    else:
        assert not y[weights[1, :, 33] != 0].isfinite().any()


def test_not_a_number_stays_one(kernel):
    bank = bank_and_weights(2, 40, 4, 32, True)[0]
    bad = bank.row_scales.clone()
    bad[0, 0], bad[0, 1] = float("nan"), float("inf")
    bank = replace(bank, row_scales=bad)
    for dtype in (torch.float32, torch.bfloat16):
        y = multiply(kernel, torch.ones(1, 40, dtype=dtype), torch.zeros(1, dtype=torch.int32), bank)
        assert y[0, 0].isnan() and not y[0, 1].isfinite()
    if kernel != "reference":
        assert unpack(bank, torch.bfloat16, torch.tensor([0]), 0, 1).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [0, 5, 3 * CROWD])
def test_operator_at_every_size(batch, dtype):
    # At the largest batch one matrix is unpacked for a dense product while the others are not.
    bank, weights = bank_and_weights(257, 130, 3, 64, False)
    generator = torch.Generator().manual_seed(batch)
    slots = torch.randint(-1, 2, (batch,), generator=generator, dtype=torch.int32)
    slots[: batch // 2] = 2
    x = (torch.randn(batch, 130, generator=generator) / 256).to(dtype)  # small: float16 ends at 65504
    # bfloat16 rows of x in a dense product meet bfloat16 weights, as in a model that is not packed.
    dense = dtype == torch.bfloat16 and batch > CROWD
    assert_product(kernels.grouped_matmul(x, slots, bank), x, slots, weights, 2**-9 if dense else 3e-6)


def test_operator_takes_views():
    bank, weights = bank_and_weights(20, 70, 4, 32, False, count=4)
    half = replace(bank, **{name: tensor[::2] for name, tensor in bank.tensors().items()})
    x = torch.randn(6, 140, generator=torch.Generator().manual_seed(0))[:, ::2]
    slots = torch.tensor([0, 9, 1, 9, -1, 9, 1, 9, 0, 9, 0, 9], dtype=torch.int32)[::2]
    assert_product(kernels.grouped_matmul(x, slots, half), x, slots, weights[::2])
    assert torch.equal(kernels.dequantize(half), int_format.dequantize(bank)[::2])


@pytest.mark.parametrize("bad", [-2, 3, 2**31 - 1, -(2**31)])
def test_slots_outside_the_bank_are_refused(bad):
    bank = bank_and_weights(5, 40, 4, 32, True)[0]
    slots = torch.tensor([0, bad, 1], dtype=torch.int32)
    with pytest.raises(UserError, match="outside the bank of 3"):
        kernels.grouped_matmul(torch.ones(3, 40), slots, bank)
    with pytest.raises(UserError, match="outside the bank of 3"):
        kernels.dequantize(bank, index=slots.long())
    many = torch.zeros(4 * CROWD, dtype=torch.int32)
    many[7] = bad
    with pytest.raises(UserError, match="outside the bank of 3"):
        kernels.grouped_matmul(torch.ones(4 * CROWD, 40), many, bank)


def test_wrong_activations_are_refused():
    bank = bank_and_weights(5, 40, 4, 32, True)[0]
    slots = torch.zeros(3, dtype=torch.int32)
    for x, s in [
        (torch.ones(3, 56), slots),  # would need wider codes
        (torch.ones(3, 40).double(), slots),
        (torch.ones(40), slots),
        (torch.ones(2, 40), slots),
        (torch.ones(3, 40), slots.long()),
    ]:
        with pytest.raises(UserError):
            kernels.grouped_matmul(x, s, bank)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_banks_are_refused(kernel, seed):
    """Sizes that contradict each other never reach memory: not through the operator, not through the library."""
    chance = random.Random(seed)
    bits, group, symmetric = chance.choice(BITS), chance.choice(GROUPS), chance.random() < 0.5
    bank = bank_and_weights(7, chance.choice((33, 100, 300)), bits, group, symmetric)[0]
    x, slots = torch.ones(2, bank.cols), torch.tensor([0, 2], dtype=torch.int32)
    broken = damaged(bank, chance)
    with pytest.raises(UserError):
        torch.ops.moecompress.grouped_matmul(x, slots, *tensors_of(broken), broken.bits, broken.group)
    with pytest.raises(UserError):
        torch.ops.moecompress.dequantize(*tensors_of(broken), broken.bits, broken.group, broken.cols, torch.float32)
    if kernel != "reference":
        with pytest.raises(UserError):
            native.grouped_matmul(x, slots, broken)
        with pytest.raises(UserError):
            unpack(broken, torch.float32, torch.tensor([2]), 0, broken.rows)


def damaged(bank: IntBank, chance: random.Random) -> IntBank:
    """The bank with one tensor, or one parameter, that no longer fits the others."""
    name = chance.choice([*bank.tensors(), "bits", "group"])
    if name == "bits":
        return replace(bank, bits=chance.choice([b for b in (0, 1, 2, 3, 4, 5, 8, 16, -4) if b != bank.bits]))
    if name == "group":  # another number of groups, or none
        return replace(bank, group=chance.choice([g for g in (0, 1, 16, 32, 256, -32) if g != bank.group]), scales=None)
    tensor = bank.tensors()[name]
    axis = chance.randrange(tensor.dim())
    cut = tensor.narrow(axis, 0, chance.randrange(tensor.shape[axis])).contiguous()
    grown = torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis)
    return replace(bank, **{name: chance.choice([cut, grown])})


def test_both_operators_compile_whole():
    bank, weights = bank_and_weights(33, 70, 4, 32, False)
    x = torch.randn(4, 70, generator=torch.Generator().manual_seed(0))
    slots = torch.tensor([2, -1, 0, 2], dtype=torch.int32)

    def both(x, slots, codes, row_scales, scales, zeros):
        arguments = (codes, row_scales, scales, zeros, 4, 32)
        y = torch.ops.moecompress.grouped_matmul(x, slots, *arguments)
        return 2 * y, torch.ops.moecompress.dequantize(*arguments, 70, torch.bfloat16, slots[:1].long()) + 1

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    y, w = compiled(x, slots, *tensors_of(bank))
    assert_product(y / 2, x, slots, weights)
    assert torch.equal(w, int_format.dequantize(bank, torch.bfloat16)[2:] + 1)

    through_bank = torch.compile(lambda x: kernels.grouped_matmul(x, slots, bank), fullgraph=True, backend="aot_eager")
    assert torch.equal(through_bank(x), kernels.grouped_matmul(x, slots, bank))


def test_operators_pass_torchs_own_check():
    bank = bank_and_weights(5, 40, 4, 32, False)[0]
    x, slots = torch.randn(3, 40), torch.tensor([0, -1, 2], dtype=torch.int32)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (*tensors_of(bank), 4, 32)
    torch.library.opcheck(torch.ops.moecompress.grouped_matmul.default, (x, slots, *arguments), test_utils=checks)
    arguments = (*arguments, 40, torch.float32, torch.tensor([1]))
    torch.library.opcheck(torch.ops.moecompress.dequantize.default, arguments, test_utils=checks)


def test_without_the_library_the_user_hears_of_it_once(monkeypatch, capsys):
    bank, weights = bank_and_weights(5, 40, 4, 32, True)
    x, slots = torch.randn(2, 40), torch.tensor([0, 2], dtype=torch.int32)
    monkeypatch.setattr(native, "_load", lambda: "reference: no compiler here")
    ops._native_ready.cache_clear()
    try:
        assert kernels.native_status() == "reference: no compiler here"
        for _ in range(2):
            assert_product(kernels.grouped_matmul(x, slots, bank), x, slots, weights)
    finally:
        ops._native_ready.cache_clear()
    assert capsys.readouterr().err.count("no compiler here") == 1
