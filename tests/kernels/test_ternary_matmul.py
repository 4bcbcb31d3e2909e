"""Products with matrices of trits, compiled and plain, against float64 arithmetic on the trits before they were packed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch

from moecompress.errors import UserError
from moecompress.kernels import ternary_matmul
from moecompress.pack import dictionary, ternary

BEST = ternary_matmul.status()
KERNELS = ["reference", *(name for name in ("avx512_vnni", "portable") if ternary_matmul.choose(name))]
ternary_matmul.choose(BEST)
FORMATS = ["ternary", "sign", "dictionary"]
PRICES = dictionary.prices(0.885)
COUNT = 3


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch) -> Iterator[str]:
    """The name of a kernel that is in use during the test."""
    if request.param == "reference":
        monkeypatch.setattr(ternary_matmul, "_native_ready", lambda: False)
    else:
        assert ternary_matmul.choose(request.param)
    yield request.param
    ternary_matmul.choose(BEST)


def bank_and_weights(form: str, rows: int, cols: int, zero_rate: float = 0.885):
    """A random bank, and its weights in float64 (COUNT, rows, cols) from the trits."""
    generator = torch.Generator().manual_seed(1000 * rows + cols)
    u = torch.rand(COUNT, rows, cols, generator=generator)
    edge = 0.5 if form == "sign" else (1 - zero_rate) / 2
    trits = (u >= edge).to(torch.uint8) + (u >= 1 - edge)
    levels = torch.randn(COUNT, rows, 2, generator=generator).bfloat16()
    if form == "sign":
        levels[..., 0] = -levels[..., 1]
    low, high = levels.double().split(1, -1)
    weights = low * (trits == 0) + high * (trits == 2)
    if form == "ternary":
        return ternary.pack_ternary(trits, levels), weights
    if form == "sign":
        return ternary.pack_signs(trits // 2, levels[..., 1].contiguous()), weights
    return dictionary.pack(trits, levels, PRICES), weights


def random_x(count: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, cols, generator=torch.Generator().manual_seed(count)).to(dtype)


def assert_product(y: torch.Tensor, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, weight_error: float = 1e-6):
    """y is W x up to the rounding of sums, of the output's own type, and of x beside much larger x."""
    exact = torch.zeros(x.shape[0], weights.shape[1], dtype=torch.float64)
    bound = torch.zeros_like(exact)
    x_error = 2**-13 if x.dtype == torch.bfloat16 else 2**-20
    for slot in range(weights.shape[0]):
        mine = x[slots == slot].double()
        exact[slots == slot] = mine @ weights[slot].T
        # Both levels' sums of x are rounded, and errors of single x are as likely up as down.
        level, root = weights[slot].abs().amax(-1), weights.shape[-1] ** 0.5
        bound[slots == slot] = mine.abs() @ weights[slot].T.abs() * weight_error
        bound[slots == slot] += level * mine.abs().amax(-1, keepdim=True) * x_error * root
    if y.dtype != torch.float32:
        bound = bound + exact.abs() * torch.finfo(y.dtype).eps
    assert y.dtype == x.dtype and y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("form", FORMATS)
def test_products_match_float64(kernel, form):
    batches = iter([*range(1, 21), 40] * 2)
    for rows, cols in product((1, 31, 33, 257), (1, 4, 5, 31, 100, 2048)):
        if kernel == "reference" and rows * cols > 10**5:
            continue
        bank, weights = bank_and_weights(form, rows, cols)
        batch = next(batches)
        slots = torch.randint(-1, COUNT, (batch,), generator=torch.Generator().manual_seed(batch), dtype=torch.int32)
        for dtype in (torch.float32, torch.bfloat16):
            x = random_x(batch, cols, dtype)
            assert_product(ternary_matmul.matmul(x, slots, bank), x, slots, weights)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", [*range(1, 17), 33, 90])
def test_many_rows_of_x_for_one_matrix(form, tokens):
    # 1400 columns: more than one span of scales. From CROWD rows on the matrix is unpacked for a dense product.
    bank, weights = bank_and_weights(form, 11, 1400, zero_rate=0.4)
    slots = torch.tensor([1] * tokens + [0, -1], dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        x = random_x(tokens + 2, 1400, dtype)
        assert_product(ternary_matmul.matmul(x, slots, bank), x, slots, weights)


@pytest.mark.parametrize("form", FORMATS)
def test_large_matrices_on_all_threads(kernel, form):
    bank, weights = bank_and_weights(form, 700, 1100)
    slots = torch.arange(20, dtype=torch.int32) % 4 - 1
    x = random_x(20, 1100, torch.bfloat16)
    assert_product(ternary_matmul.matmul(x, slots, bank), x, slots, weights)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize_is_bit_for_bit_the_format(kernel, form, dtype):
    for cols in (1, 2, 4, 5, 31, 33, 100, 1025):
        bank, _ = bank_and_weights(form, 7, cols)
        expected = (dictionary if form == "dictionary" else ternary).dequantize(bank, dtype)
        assert torch.equal(ternary_matmul.dequantize(bank, dtype), expected)
        index = torch.tensor([2, 0, 2])
        assert torch.equal(ternary_matmul.dequantize(bank, dtype, index), expected[index])
        assert ternary_matmul.dequantize(bank, dtype, index[:0]).shape == (0, 7, cols)


@pytest.mark.parametrize("form", FORMATS)
def test_small_integers_are_exact(kernel, form):
    """Levels ±1 and integers up to 31: every sum is an integer, and the result is the one number."""
    bank, weights = bank_and_weights(form, 33, 643, zero_rate=0.3)
    weights, bank = weights.sign(), with_levels(bank, weights)
    x = torch.randint(-31, 32, (5, 643), generator=torch.Generator().manual_seed(0)).float()
    slots = torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32)
    exact = torch.einsum("src,sc->sr", weights[slots.long()], x.double())
    assert torch.equal(ternary_matmul.matmul(x, slots, bank).double(), exact)
    assert torch.equal(ternary_matmul.matmul(x.bfloat16(), slots, bank), exact.bfloat16())


def with_levels(bank, weights):
    """The bank with the signs of its levels."""
    if hasattr(bank, "scales"):
        return replace(bank, scales=bank.scales.sign())
    return replace(bank, levels=bank.levels.sign())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e38, 1e-38, 0.0])
def test_extreme_activations(kernel, form, value):
    bank, weights = bank_and_weights(form, 4, 70, zero_rate=0.3)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(1, 70, dtype=dtype)
        x[0, 33] = value
        y = ternary_matmul.matmul(x, torch.tensor([1], dtype=torch.int32), bank)[0].double()
        if x.isfinite().all():
            assert bool(((y - weights[1, :, 33] * x[0, 33].double()).abs() <= y.abs() / 128 + 1e-28).all())
        else:
            assert not y[weights[1, :, 33] != 0].isfinite().any()


@pytest.mark.parametrize("form", FORMATS)
def test_an_unused_level_and_a_large_neighbour_add_nothing(kernel, form):
    """What a row does not use is not there, not even as rounding: neither a level, nor another lane's largest x."""
    if form == "sign":
        pytest.skip("signs use both")
    trits = torch.ones(1, 3, 320, dtype=torch.uint8)
    trits[0, 1, 5] = 2
    levels = torch.tensor([[[-1e30, 1e30], [-1e30, 0.5], [1e30, -1e30]]]).bfloat16()
    bank = ternary.pack_ternary(trits, levels) if form == "ternary" else dictionary.pack(trits, levels, PRICES)
    x = random_x(2, 320)
    x[:, 200] = 1e6
    y = ternary_matmul.matmul(x, torch.zeros(2, dtype=torch.int32), bank)
    assert not y[:, [0, 2]].any()
    assert torch.allclose(y[:, 1], 0.5 * x[:, 5], rtol=1e-5)


@pytest.mark.parametrize("form", FORMATS)
def test_views_and_half_precision(form):
    bank, weights = bank_and_weights(form, 20, 70)
    x = random_x(6, 140)[:, ::2]
    slots = torch.tensor([0, 9, 1, 9, -1, 9, 2, 9, 0, 9, 0, 9], dtype=torch.int32)[::2]
    assert_product(ternary_matmul.matmul(x, slots, bank), x, slots, weights)
    assert_product(ternary_matmul.matmul(x.half(), slots, bank), x.half(), slots, weights)
    bank = replace(bank, **{name: tensor[::2] for name, tensor in bank.tensors().items()})
    slots = torch.tensor([0, 1, -1, 1, 1, 0], dtype=torch.int32)
    assert_product(ternary_matmul.matmul(x, slots, bank), x, slots, weights[::2])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bad", [-2, COUNT, 2**31 - 1, -(2**31)])
def test_slots_outside_the_bank_are_refused(kernel, form, bad):
    bank, _ = bank_and_weights(form, 5, 40)
    slots = torch.tensor([0, bad, 1], dtype=torch.int32)
    with pytest.raises(UserError, match="outside the bank of 3"):
        ternary_matmul.matmul(torch.ones(3, 40), slots, bank)
    with pytest.raises(UserError, match="outside the bank of 3"):
        ternary_matmul.dequantize(bank, index=slots.long())
    many = torch.zeros(200, dtype=torch.int32)
    many[7] = bad
    with pytest.raises(UserError, match="outside the bank of 3"):
        ternary_matmul.matmul(torch.ones(200, 40), many, bank)


@pytest.mark.parametrize("form", FORMATS)
def test_wrong_activations_are_refused(form):
    bank, _ = bank_and_weights(form, 5, 40)
    slots = torch.zeros(3, dtype=torch.int32)
    for x, s in [(torch.ones(3, 56), slots), (torch.ones(3, 40).double(), slots), (torch.ones(40), slots),
                 (torch.ones(2, 40), slots), (torch.ones(3, 40), slots.long())]:  # fmt: skip
        with pytest.raises(UserError):
            ternary_matmul.matmul(x, s, bank)


def test_bytes_that_are_no_trits_are_refused(kernel):
    """In every column of bytes; and only in rows that are read."""
    bank, _ = bank_and_weights("ternary", 9, 2048)
    x, slots = torch.ones(2, 2048), torch.tensor([1, 1], dtype=torch.int32)
    for row, byte, value in [(0, 0, 243), (8, 409, 255), (3, 63, 243), (4, 64, 250), (7, 384, 244)]:
        bad = replace(bank, codes=bank.codes.clone())
        bad.codes[1, row, byte] = value
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.raises(UserError, match="codes"):
                ternary_matmul.matmul(x.to(dtype), slots, bad)
        with pytest.raises(UserError, match="codes"):
            ternary_matmul.dequantize(bad)
        ternary_matmul.matmul(x, slots - 1, bad)


def test_words_and_ends_that_do_not_fit_are_refused(kernel):
    bank, _ = bank_and_weights("dictionary", 9, 257)
    x, slots = torch.ones(3, 257), torch.tensor([0, 1, 2], dtype=torch.int32)
    for bad in (
        replace(bank, words=bank.words[1:]), replace(bank, words=torch.cat([bank.words, bank.words[:1]])),
        replace(bank, words=bank.words[0]), replace(bank, words=bank.words[:, :9]), replace(bank, words=bank.words[:0]),
        replace(bank, ends=-bank.ends), replace(bank, ends=bank.ends.flip(1)), replace(bank, ends=bank.ends + 1),
        replace(bank, ends=bank.ends.long()), replace(bank, ends=bank.ends[0]), replace(bank, levels=bank.levels[:1]),
        replace(bank, words=bank.words.to(torch.int32)), replace(bank, prices=(0, 5)), replace(bank, prices=(5,)),
        replace(bank, words=torch.zeros_like(bank.words)),
    ):  # fmt: skip
        with pytest.raises(UserError):
            ternary_matmul.matmul(x, slots, bad)
        with pytest.raises(UserError):
            ternary_matmul.dequantize(bad)
    with pytest.raises(UserError):
        ternary_matmul.matmul(torch.ones(3, 259), slots, bank)


@pytest.mark.parametrize("form", FORMATS)
def test_damage_is_refused_or_harmless(kernel, form):
    """Flipped bits and cut tensors, past the checks in Python: the library refuses them or computes something."""
    if kernel == "reference":
        pytest.skip("tests/pack is about damage that torch meets")
    dice, refused = random.Random(form), 0
    for cols in (31, 257, 700):
        bank, _ = bank_and_weights(form, 9, cols, zero_rate=0.7)
        x, slots = random_x(3, cols, torch.bfloat16), torch.tensor([0, 2, 2], dtype=torch.int32)
        for _ in range(600):
            bad = damaged(bank, dice)
            try:
                y = ternary_matmul._multiply(x, slots, bad, COUNT, 9)
                assert y.shape == (3, 9)
                out = ternary_matmul._unpack(bad, torch.float32, torch.tensor([2]))
                assert out.shape == (1, 9, cols)
            except UserError:
                refused += 1
    assert refused > 300


def damaged(bank, dice: random.Random):
    name = dice.choice([name for name in bank.tensors() if name not in ("levels", "scales")])
    tensor = bank.tensors()[name]
    if dice.random() < 0.3:  # cut or repeat
        axis = dice.randrange(tensor.dim())
        part = tensor.narrow(axis, 0, dice.randrange(tensor.shape[axis])).clone()
        return replace(bank, **{name: part if dice.random() < 0.5 else torch.cat([tensor, part], axis)})
    raw = tensor.clone().flatten().view(torch.uint8)
    for _ in range(dice.choice((1, 1, 2, 30))):
        raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
    return replace(bank, **{name: raw.view(tensor.dtype).view(tensor.shape)})


@pytest.mark.parametrize("form", FORMATS)
def test_both_operators_compile_whole(form):
    bank, weights = bank_and_weights(form, 33, 70)
    x, slots = random_x(4, 70), torch.tensor([2, -1, 0, 2], dtype=torch.int32)

    def both(x):
        return 2 * ternary_matmul.matmul(x, slots, bank), ternary_matmul.dequantize(bank, torch.bfloat16, slots[:1].long()) + 1

    y, w = torch.compile(both, fullgraph=True, backend="aot_eager")(x)
    assert_product(y / 2, x, slots, weights)
    assert torch.equal(w, weights[2:].bfloat16() + 1)


@pytest.mark.parametrize("form", FORMATS)
def test_operators_pass_torchs_own_check(form):
    bank, _ = bank_and_weights(form, 5, 40)
    x, slots = random_x(3, 40), torch.tensor([0, -1, 2], dtype=torch.int32)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    parts = ternary_matmul._parts(bank)
    torch.library.opcheck(torch.ops.moecompress.ternary_matmul.default, (x, slots, *parts), test_utils=checks)
    arguments = (*parts, 40, torch.float32, torch.tensor([1]))
    torch.library.opcheck(torch.ops.moecompress.ternary_dequantize.default, arguments, test_utils=checks)


def test_without_the_library_the_user_hears_of_it_once(monkeypatch, capsys):
    bank, weights = bank_and_weights("ternary", 5, 40)
    x, slots = random_x(2, 40), torch.tensor([0, 2], dtype=torch.int32)
    monkeypatch.setattr(ternary_matmul, "_load", lambda: None)
    ternary_matmul._native_ready.cache_clear()
    try:
        assert ternary_matmul.status() == "reference"
        for _ in range(2):
            assert_product(ternary_matmul.matmul(x, slots, bank), x, slots, weights)
    finally:
        ternary_matmul._native_ready.cache_clear()
    assert capsys.readouterr().err.count("no compiled ternary kernels") == 1
