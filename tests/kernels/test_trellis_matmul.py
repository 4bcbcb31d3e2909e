"""Products with trellis banks and the rotation, on every code path, against float64 and the plain-torch format."""

from __future__ import annotations

import ctypes
import mmap
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch

from moecompress.errors import UserError
from moecompress.kernels import trellis_matmul as kernels
from moecompress.pack import rotation, trellis
from moecompress.pack.trellis import RATES, TrellisBank

BEST = kernels.status()
FIXED = ("amx", "avx512_vbmi")  # x in fixed point
WAYS = [name for name in ("amx", "avx512_vbmi", "portable") if kernels.choose(name)]
if WAYS:
    kernels.choose(BEST)

SHAPES = [*product((1, 31, 33, 257), (1, 31, 33, 257)), (17, 2048), (48, 2049)]


@pytest.fixture(params=["reference", *WAYS])
def way(request, monkeypatch) -> Iterator[str]:
    """The name of a code path, which the operators take during the test."""
    if request.param == "reference":
        monkeypatch.setattr(kernels, "_load", lambda: None)
        monkeypatch.setattr(kernels, "_ready", lambda: False)
        yield "reference"
    else:
        assert kernels.choose(request.param)
        yield request.param
        kernels.choose(BEST)


def random_bank(rows: int, cols: int, rate: float, count: int = 3) -> TrellisBank:
    """Every bit pattern is a valid stream, so random bits are as good a test as an encoder's."""
    generator = torch.Generator().manual_seed(1000 * rows + cols)
    down, across = trellis.tiles(rows, cols, rate)
    stream = torch.randint(0, 256, (count, down * across, int(32 * rate)), generator=generator, dtype=torch.uint8)
    return TrellisBank(stream, torch.rand(count, generator=generator) - 0.3, rate, rows, cols)


@cache
def decoded(rows: int, cols: int, rate: float) -> torch.Tensor:
    """T of `random_bank`, by the format's own function."""
    return trellis.dequantize(random_bank(rows, cols, rate))


def assert_product(way: str, y: torch.Tensor, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, exact_x: bool = False) -> None:
    """y is T x up to what float32 sums and the fixed-point x of some must lose.

    Plain sums have at least 4 lanes, so that none adds more than cols / 4 products, each rounding once (2^-24 of a sum that is
    at most Σ |w x|); 16 more for the scales, the lanes and the segments. Fixed-point x are off by half a step at most, and the
    largest of a row is 16319 steps. Their sums are exact integers until the end, so columns do not count.
    """
    exact = torch.zeros(len(x), weights.shape[1], dtype=torch.float64)
    bound = torch.zeros_like(exact)
    for slot, matrix in enumerate(weights.double()):
        mine, one = slots == slot, x[slots == slot].double()
        exact[mine] = one @ matrix.T
        roundings = 16 + (0 if way in FIXED else x.shape[1] / 4)
        bound[mine] = one.abs() @ matrix.T.abs() * roundings * 2**-24
        if way in FIXED and not exact_x:
            bound[mine] += matrix.abs().sum(-1) * one.abs().amax(1, keepdim=True) * (0.5 / 16319) * (1 + 1e-6)
    assert y.dtype == torch.float32 and y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("rate", RATES)
def test_products_match_float64(way, rate):
    batches = iter(list(range(1, 41)) * 2)
    for rows, cols in SHAPES:
        bank = random_bank(rows, cols, rate)
        weights, batch = decoded(rows, cols, rate), next(batches)
        generator = torch.Generator().manual_seed(batch)
        slots = torch.randint(-1, 3, (batch,), generator=generator, dtype=torch.int32)
        x = torch.randn(batch, cols, generator=generator)
        assert_product(way, kernels.matmul(x, slots, bank), x, slots, weights)


@pytest.mark.parametrize("batch", [*range(1, 41), 47, 48, 49, 63, 64, 65, 130])
def test_every_batch_for_one_matrix(way, batch):
    rate = list(RATES)[batch % len(RATES)]
    bank = random_bank(33, 2100, rate)  # columns in two segments
    generator = torch.Generator().manual_seed(batch)
    x, slots = torch.randn(batch + 1, 2100, generator=generator), torch.tensor([1] * batch + [2], dtype=torch.int32)
    assert_product(way, kernels.matmul(x, slots, bank), x, slots, decoded(33, 2100, rate))


@pytest.mark.parametrize("rate", RATES)
def test_integers_are_multiplied_exactly(way, rate):
    """Whole numbers up to 16319 are fixed-point numbers: nothing but the last rounding may be off."""
    bank = random_bank(40, 2500, rate)
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-16319, 16320, (12, 2500), generator=generator).float()
    x[:, 7] = 16319
    slots = torch.tensor([0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1], dtype=torch.int32)
    assert_product(way, kernels.matmul(x, slots, bank), x, slots, decoded(40, 2500, rate), exact_x=True)


def test_sums_of_the_largest_numbers_do_not_overflow(way):
    bank = random_bank(16, 40_000, 0.75, count=1)
    bank = replace(bank, stream=torch.zeros_like(bank.stream))  # one window everywhere: all products have the same sign
    weights = trellis.dequantize(bank)
    x = weights[0, :1].sign() * 7
    for batch in (1, 2, 5):
        rows, slots = x.expand(batch, -1), torch.zeros(batch, dtype=torch.int32)
        assert_product(way, kernels.matmul(rows, slots, bank), rows, slots, weights)


@pytest.mark.parametrize("dense", [False, True])
def test_large_matrices_and_crowds(way, dense, monkeypatch):
    monkeypatch.setattr(kernels, "CROWD", dict.fromkeys(WAYS, 8) if dense else {})
    bank = random_bank(700, 500, 2, count=4)
    x = torch.randn(80, 500, generator=torch.Generator().manual_seed(1))
    slots = torch.arange(80, dtype=torch.int32) % 5 - 1
    slots[-40:] = 3
    # A dense product takes x as it is; rows of x that few want do not.
    assert_product(way, kernels.matmul(x, slots, bank), x, slots, trellis.dequantize(bank))


def test_several_threads_compute_the_same(way):
    bank, before = random_bank(700, 500, 1.5, count=4), torch.get_num_threads()
    x, slots = torch.randn(20, 500), torch.arange(20, dtype=torch.int32) % 5 - 1
    big, sign = torch.randn(600, 500), rotation.signs(500, 0)
    alone = kernels.matmul(x, slots, bank), kernels.dequantized(bank), kernels.rotate(big, sign)
    torch.set_num_threads(3)
    try:
        together = kernels.matmul(x, slots, bank), kernels.dequantized(bank), kernels.rotate(big, sign)
    finally:
        torch.set_num_threads(before)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-4) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", RATES)
def test_dequantized_is_bit_for_bit_the_format(way, rate, dtype):
    for rows, cols in SHAPES:
        bank = random_bank(rows, cols, rate)
        expected = decoded(rows, cols, rate).to(dtype)
        assert torch.equal(kernels.dequantized(bank, dtype), expected)
        assert torch.equal(kernels.dequantized(bank, dtype, torch.tensor([2, 0, 2])), expected[[2, 0, 2]])
    if way != "reference":
        out = torch.full((2, 17, 70), 7.0, dtype=dtype)
        kernels.unpacked(random_bank(150, 70, rate), torch.tensor([1, 0]), 128, 145, out)
        assert torch.equal(out, decoded(150, 70, rate).to(dtype)[[1, 0], 128:145])


def test_other_types_and_views(way):
    bank = random_bank(20, 70, 2, count=4)
    half = replace(bank, stream=bank.stream[::2], scales=bank.scales[::2])
    x = torch.randn(6, 140, generator=torch.Generator().manual_seed(0))[:, ::2]
    slots = torch.tensor([0, 9, 1, 9, -1, 9, 1, 9, 0, 9, 0, 9], dtype=torch.int32)[::2]
    assert_product(way, kernels.matmul(x, slots, half), x, slots, trellis.dequantize(bank)[::2])
    assert torch.equal(kernels.dequantized(half, torch.float16), trellis.dequantize(bank)[::2].half())
    assert kernels.matmul(x[:0], slots[:0], bank).shape == (0, 20)
    assert torch.equal(kernels.matmul(x[:1], slots[:1] * 0 - 1, bank), torch.zeros(1, 20))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e38, 1e-25, 1e-38, 0.0])
def test_extreme_activations(way, value):
    bank = random_bank(20, 70, 2)
    weights = trellis.dequantize(bank)
    x = torch.zeros(1, 70)
    x[0, 33] = value
    y = kernels.matmul(x, torch.tensor([1], dtype=torch.int32), bank)[0]
    if x.isfinite().all():  # below 2^-100 a fixed-point x is zero
        assert bool(((y - weights[1, :, 33] * value).abs() <= y.abs() * 1e-5 + 2.0**-95).all())
    else:
        assert not y[weights[1, :, 33] != 0].isfinite().any()


@pytest.mark.parametrize("bad", [-2, 3, 2**31 - 1, -(2**31)])
def test_slots_outside_the_bank_are_refused(way, bad):
    bank = random_bank(5, 40, 2)
    for batch in (3, 100):
        slots = torch.zeros(batch, dtype=torch.int32)
        slots[1] = bad
        with pytest.raises(UserError, match="outside the bank of 3"):
            kernels.matmul(torch.ones(batch, 40), slots, bank)
    with pytest.raises(UserError, match="outside the bank of 3"):
        kernels.dequantized(bank, index=torch.tensor([0, bad]))


def test_wrong_activations_are_refused(way):
    bank, slots = random_bank(5, 40, 2), torch.zeros(3, dtype=torch.int32)
    for x, s in [
        (torch.ones(3, 56), slots),  # would need more tiles
        (torch.ones(3, 0), slots),
        (torch.ones(3, 40).double(), slots),
        (torch.ones(40), slots),
        (torch.ones(2, 40), slots),
        (torch.ones(3, 40), slots.long()),
    ]:
        with pytest.raises(UserError):
            kernels.matmul(x, s, bank)
    for x, sign in [(torch.ones(3, 40), torch.ones(39)), (torch.ones(3, 40), torch.ones(40).double()), (torch.ones(()), torch.ones(1)),
                    (torch.ones(3, 0), torch.ones(0)), (torch.ones(3, 40).int(), torch.ones(40))]:  # fmt: skip
        with pytest.raises(UserError):
            kernels.rotate(x, sign)


def damaged(bank: TrellisBank, chance: random.Random) -> TrellisBank:
    """The bank with one tensor, or one number, that no longer fits the others."""
    name = chance.choice(["stream", "scales", "rate", "rows", "cols"])
    if name == "rate":
        return replace(bank, rate=chance.choice([rate for rate in (*RATES, 0, -1, 7, 1e30, float("nan")) if rate != bank.rate]))
    if name in ("rows", "cols"):
        return replace(bank, **{name: chance.choice([-(2**62), -5, 0, getattr(bank, name) + 64, 2**31, 2**62])})
    tensor = getattr(bank, name)
    axis = chance.randrange(tensor.dim())
    cut = tensor.narrow(axis, 0, chance.randrange(tensor.shape[axis])).contiguous()
    grown = torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis)
    return replace(bank, **{name: chance.choice([cut, grown])})


@pytest.mark.parametrize("seed", range(60))
def test_damaged_banks_are_refused(way, seed):
    """Sizes that contradict each other never reach memory: not through the operators, not through the library."""
    chance = random.Random(seed)
    bank = random_bank(chance.choice((7, 40)), chance.choice((33, 100, 300)), chance.choice(list(RATES)))
    broken = damaged(bank, chance)
    x, slots = torch.ones(2, 1 if broken.cols > 10**6 else max(broken.cols, 0)), torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(UserError):
        kernels.matmul(x, slots, broken)
    with pytest.raises(UserError):
        kernels.dequantized(broken)
    if way != "reference" and broken.rows < 10**6:
        with pytest.raises((UserError, ValueError)):
            kernels.multiply(x, slots, broken)
        with pytest.raises((UserError, ValueError)):
            kernels.unpacked(broken, torch.tensor([2]), 0, 7, torch.empty(1, 7, bank.cols))


@pytest.mark.skipif(not WAYS, reason="no compiled library")
def test_the_library_itself_refuses_wrong_buffers():
    bank, x, slots = random_bank(40, 100, 2), torch.ones(2, 100), torch.zeros(2, dtype=torch.int32)
    for wrong in (x[:, :99].contiguous(), x[:1]):
        with pytest.raises(ValueError):
            kernels.multiply(wrong, torch.zeros(wrong.shape[0] + (wrong.shape[1] == 100), dtype=torch.int32), bank)
    with pytest.raises(UserError, match="outside the bank"):
        kernels.multiply(x, slots + 3, bank)
    for first, last, out in [(0, 40, torch.empty(1, 39, 100)), (8, 24, torch.empty(1, 16, 100)), (0, 41, torch.empty(1, 41, 100)),
                             (32, 16, torch.empty(0)), (-16, 16, torch.empty(1, 32, 100))]:  # fmt: skip
        with pytest.raises(ValueError):
            kernels.unpacked(bank, torch.tensor([0]), first, last, out)
    for index in (-1, 3):
        with pytest.raises(UserError, match="outside the bank"):
            kernels.unpacked(bank, torch.tensor([index]), 0, 40, torch.empty(1, 40, 100))


def guarded(count: int) -> tuple[torch.Tensor, object]:
    """uint8 [count] that ends where readable memory ends; and what keeps it alive."""
    page = mmap.PAGESIZE
    pages = -(-count // page) + 1
    area = mmap.mmap(-1, pages * page)
    whole = torch.frombuffer(area, dtype=torch.uint8)
    end = (pages - 1) * page
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(whole.data_ptr() + end), ctypes.c_size_t(page), 0) == 0
    return whole[end - count : end], area


@pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="needs mprotect")
@pytest.mark.parametrize("rate", RATES)
def test_nothing_behind_the_stream_or_x_is_read(way, rate):
    bank = random_bank(20, 49, rate, count=2)
    stream, stream_area = guarded(bank.stream.nbytes)
    stream.copy_(bank.stream.flatten())
    edge = replace(bank, stream=stream.view_as(bank.stream))
    for batch in (1, 2, 5):
        x, x_area = guarded(batch * 49 * 4)
        x = x.view(torch.float32).view(batch, 49)
        x.copy_(torch.randn(batch, 49))
        slots = torch.ones(batch, dtype=torch.int32)
        assert torch.equal(kernels.matmul(x, slots, edge), kernels.matmul(x.clone(), slots, bank))
        assert torch.equal(kernels.rotate(x, torch.ones(49)), kernels.rotate(x.clone(), torch.ones(49)))
    assert torch.equal(kernels.dequantized(edge), kernels.dequantized(bank))
    del stream_area, x_area


@pytest.mark.skipif(not WAYS, reason="no compiled library")
def test_fuzz():
    """Thousands of flipped bits and truncations: a refusal, or the numbers that the plain decoder makes of the same bits."""
    chance, generator = random.Random(0), torch.Generator().manual_seed(0)
    for turn in range(3000):
        assert kernels.choose(WAYS[turn % len(WAYS)])
        rate = chance.choice(list(RATES))
        bank = random_bank(chance.choice((3, 16, 35)), chance.choice((5, 32, 70)), rate, count=2)
        x = torch.randn(chance.choice((1, 2, 3)), bank.cols, generator=generator)
        slots = torch.randint(-1, 2, (len(x),), generator=generator, dtype=torch.int32)
        kind = chance.choice(["stream", "scales", "cut"])
        if kind == "cut":
            flat = bank.stream.flatten()[: chance.randrange(bank.stream.numel())]
            with pytest.raises(UserError):
                kernels.multiply(x, slots, replace(bank, stream=flat))
            continue
        raw = (bank.stream if kind == "stream" else bank.scales).view(torch.uint8).flatten().clone()
        for _ in range(chance.randrange(1, 9)):
            raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        if kind == "stream":
            bank = replace(bank, stream=raw.view_as(bank.stream))
        else:
            bank = replace(bank, scales=raw.view(torch.float32))
        y = kernels.matmul(x, slots, bank)
        for s, slot in enumerate(slots.tolist()):
            if slot < 0 or abs(float(bank.scales[slot])) < 1e30:
                assert y[s].isfinite().all()
        if turn % 10 == 0:
            assert torch.equal(kernels.dequantized(bank).nan_to_num(7), trellis.dequantize(bank).nan_to_num(7))
    kernels.choose(BEST)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 31, 33, 64, 127, 128, 200, 257, 576, 2048])
def test_rotation_matches_float64(way, size):
    sign = rotation.signs(size, 3)
    x = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(size))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = x.to(dtype)
        # A number passes 7 additions, a factor and two products by signs: each rounds sums that grow to at most |x| of a block.
        limit = 10 * 2**-24 * given.double().norm(dim=-1, keepdim=True) * 128**0.5 + 1e-12
        for ours, exact in [(kernels.rotate(given, sign), rotation.rotate(given.double(), sign.double())),
                            (kernels.unrotate(given, sign), rotation.unrotate(given.double(), sign.double()))]:  # fmt: skip
            assert ours.dtype == torch.float32 and ours.shape == x.shape
            assert bool(((ours.double() - exact).abs() <= limit).all())
    assert torch.allclose(kernels.unrotate(kernels.rotate(x, sign), sign), x, atol=1e-5)


def test_rotation_matches_a_matrix_built_another_way(way):
    from scipy.linalg import block_diag, hadamard

    dense = torch.tensor(block_diag(*(hadamard(n) / n**0.5 for n in (128, 64, 8, 2, 1))))  # 203 = 128 + 64 + 8 + 2 + 1
    sign = rotation.signs(203, 1)
    x = torch.randn(4, 203)
    assert torch.allclose(kernels.rotate(x, sign).double(), x.double() * sign @ dense, atol=1e-5)


def test_many_rows_are_rotated_alike(way):
    sign, x = rotation.signs(300, 0), torch.randn(1000, 300)
    assert torch.allclose(kernels.rotate(x, sign), torch.cat([kernels.rotate(part, sign) for part in x.split(7)]), atol=1e-6)


def test_operators_compile_whole(way):
    bank = random_bank(33, 70, 2)
    x, slots = torch.randn(4, 70), torch.tensor([2, -1, 0, 2], dtype=torch.int32)
    in_sign, out_sign = rotation.signs(70, 0), rotation.signs(33, 1)

    def layer(x, slots):
        y = kernels.matmul(kernels.rotate(x, in_sign), slots, bank)
        return 2 * kernels.unrotate(y, out_sign), kernels.dequantized(bank, torch.bfloat16, slots[:1].long()) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for ours, plain in zip(compiled(x, slots), layer(x, slots), strict=True):
        assert torch.equal(ours, plain)


def test_operators_pass_torchs_own_check():
    bank = random_bank(5, 40, 2)
    x, slots = torch.randn(3, 40), torch.tensor([0, -1, 2], dtype=torch.int32)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    ops = torch.ops.moecompress
    torch.library.opcheck(ops.trellis_matmul.default, (x, slots, bank.stream, bank.scales, 2.0, 5), test_utils=checks)
    arguments = (bank.stream, bank.scales, 2.0, 5, 40, torch.float32, torch.tensor([1]))
    torch.library.opcheck(ops.trellis_dequantize.default, arguments, test_utils=checks)
    torch.library.opcheck(ops.rotate.default, (x, rotation.signs(40, 0), True), test_utils=checks)


def test_without_the_library_the_user_hears_of_it_once(monkeypatch, capsys):
    bank, x, slots = random_bank(5, 40, 2), torch.randn(2, 40), torch.tensor([0, 2], dtype=torch.int32)
    monkeypatch.setattr(kernels, "_load", lambda: None)
    kernels._ready.cache_clear()
    try:
        assert kernels.status() == "reference"
        for _ in range(2):
            assert_product("reference", kernels.matmul(x, slots, bank), x, slots, trellis.dequantize(bank))
            kernels.rotate(x, rotation.signs(40, 0))
    finally:
        kernels._ready.cache_clear()
    assert capsys.readouterr().err.count("no compiled trellis kernels") == 1
