"""The GPU kernels against the reference: in Triton's interpreter, on the CPU, or on a GPU. Run by test_triton.py in a process
of its own, since Triton must know from its first import whether it is to interpret."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
import triton
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moecompress import kernels
from moecompress.errors import UserError
from moecompress.kernels import ops, ternary_matmul, trellis_matmul
from moecompress.kernels import triton as gpu
from moecompress.kernels.triton import dictionary as dictionary_kernel
from moecompress.kernels.triton import few_values, integers, launch, rotation
from moecompress.kernels.triton import trellis as trellis_kernel
from moecompress.model.experts import layout_of
from moecompress.pack import dictionary, int_format, ternary, trellis
from moecompress.pack import rotation as pack_rotation
from moecompress.pack.scheme import Scheme
from moecompress.runtime import dispatch, packed
from moecompress.runtime.bank import TrellisBank, make_bank, turn
from moecompress.runtime.packed import PackedExperts

DEVICE = torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")
ERROR = 2**-16 + 1e-6  # the first term: of an x that is taken as two bfloat16 numbers
CODES = [f"b{bits}g{group}{kind}" for bits, group, kind in product(int_format.BITS, int_format.GROUPS, "sa")]
CODES += ["ternary", "sign", *(Scheme(rate, code="trellis").name for rate in trellis.RATES)]
FAMILIES = ["b2g32a", "b3g64a", "b8g0s", "ternary", "sign", "t0_5", "t1_25", "t3"]


def filled(code: str, count: int, rows: int, cols: int):
    """A bank of numbers that its format allows, and its matrices by the reference."""
    generator = torch.Generator().manual_seed(1000 * rows + cols)
    module = make_bank(Scheme.parse(code).fitted(cols), count, rows, cols, torch.bfloat16)
    for name, tensor in module.named_buffers():
        if tensor.dtype == torch.uint8:
            top = 243 if (code, name) == ("ternary", "codes") else 256
            tensor.copy_(torch.randint(0, top, tensor.shape, generator=generator))
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    if isinstance(module, TrellisBank):
        return module.bank(), trellis.dequantize(module.bank())
    unpack = int_format.dequantize if code.startswith("b") else ternary.dequantize
    return module.bank(), unpack(module.bank())


def multiply(x: torch.Tensor, slots: torch.Tensor, bank) -> torch.Tensor:
    """The product by the kernels; everything comes from the CPU and goes back there."""
    kernels_of = {int_format.IntBank: integers, trellis.TrellisBank: trellis_kernel, dictionary.DictionaryBank: dictionary_kernel}
    book = [ternary_matmul.book(bank.prices)] if isinstance(bank, dictionary.DictionaryBank) else []
    return kernels_of.get(type(bank), few_values).matmul(x.to(DEVICE), slots.to(DEVICE), there(bank), *book).cpu()


def there(bank):
    return replace(bank, **{name: tensor.to(DEVICE) for name, tensor in bank.tensors().items()})


def assert_product(y, x, slots, weights, error):
    """y is W x; ``error``: in parts of the sum of the products' sizes."""
    assert y.dtype == x.dtype and y.shape == (len(x), weights.shape[1])
    chosen = weights.double()[slots.long().clamp(min=0)] * (slots >= 0)[:, None, None]
    exact, bound = torch.einsum("src,sc->sr", chosen, x.double()), torch.einsum("src,sc->sr", chosen.abs(), x.double().abs())
    assert bool(((y.double() - exact).abs() <= error * bound).all())


@pytest.mark.parametrize("code", CODES)
def test_decoding_is_bit_for_bit_the_format(code):
    # Rows of the identity: products with 1, sums with zeros. Columns in which groups, units and blocks end.
    bank, weights = filled(code, 1, 33, 131)
    cols = torch.cat([torch.arange(16, 48), torch.arange(100, 131)])
    y = multiply(torch.eye(131)[cols], torch.zeros(len(cols), dtype=torch.int32), bank)
    assert torch.equal(y.T, weights[0][:, cols])


@pytest.mark.parametrize(("code", "shape"), [*product(FAMILIES, [(1, 257), (31, 33), (33, 1)]), *product(FAMILIES[1::3], [(257, 31)])])
def test_products_at_awkward_shapes(code, shape):
    bank, weights = filled(code, 2, *shape)
    generator = torch.Generator().manual_seed(1)
    for chosen in ([1] if shape[0] > 99 else [1, -1], [0, 1, 1, -1, 1, 0, -1]):  # one by one, in blocks
        slots = torch.tensor(chosen, dtype=torch.int32)
        x = torch.randn(len(slots), shape[1], generator=generator)
        assert_product(multiply(x, slots, bank), x, slots, weights, ERROR)


@pytest.mark.parametrize("code", ["b4g64s", "b3g32a", "ternary", "sign"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_precision(code, dtype):
    bank, weights = filled(code, 2, 20, 70)
    x = (torch.randn(9, 70, generator=torch.Generator().manual_seed(2)) / 256).to(dtype)  # small: float16 ends at 65504
    slots = torch.tensor([0, 0, 1, 1, 1, 1, -1, 0, 1], dtype=torch.int32)
    for size in (3, 9):
        assert_product(multiply(x[:size], slots[:size], bank), x[:size], slots[:size], weights, 2**-7 if dtype == torch.bfloat16 else 2**-10)


@pytest.mark.parametrize("code", ["b4g64s", "ternary", "t2"])
def test_no_rows_no_matrices(code):
    bank, _ = filled(code, 2, 5, 40)
    assert multiply(torch.ones(0, 40), torch.zeros(0, dtype=torch.int32), bank).shape == (0, 5)
    assert not multiply(torch.ones(9, 40), torch.full((9,), -1, dtype=torch.int32), bank).any()
    empty, _ = filled(code, 0, 5, 40)
    assert not multiply(torch.ones(3, 40), torch.full((3,), -1, dtype=torch.int32), empty).any()


@pytest.mark.parametrize("code", ["b2g32a", "sign", "t1_5"])
@pytest.mark.parametrize("size", [4, 9])
def test_slots_outside_the_bank_read_nothing(code, size):
    bank, weights = filled(code, 2, 5, 40)
    slots = torch.tensor([0, 2, -2, 1, 2**31 - 1, -(2**31), -1, 1, 0][:size], dtype=torch.int32)
    x = torch.ones(size, 40)
    y = multiply(x, slots, bank)
    bad = (slots < -1) | (slots > 1)
    assert y[bad].isnan().all()
    assert_product(y[~bad], x[~bad], slots[~bad], weights, ERROR)


@pytest.mark.parametrize("size", [2, 9])
def test_a_byte_that_is_no_five_trits_is_seen(size):
    bank, _ = filled("ternary", 2, 7, 43)
    bank.codes[1, 3, 8] = 243  # its last trits are padding
    y = multiply(torch.ones(size, 43), torch.tensor([0, 1] + [0] * (size - 2), dtype=torch.int32), bank)
    assert y[1, 3].isnan() and int(y.isnan().sum()) == 1


def words(rows: int, cols: int):
    """A dictionary bank of two matrices, and what it stands for."""
    generator = torch.Generator().manual_seed(cols)
    trits = torch.multinomial(torch.tensor([0.05, 0.85, 0.1]), 2 * rows * cols, True, generator=generator).to(torch.uint8)
    bank = dictionary.pack(trits.view(2, rows, cols), torch.randn(2, rows, 2, generator=generator).bfloat16(), (960, 15000))
    return bank, dictionary.dequantize(bank)


@pytest.mark.parametrize("cols", [1, 99])
def test_words(cols):
    bank, weights = words(3, cols)
    codes = dictionary_kernel.as_ternary(there(bank), ternary_matmul.book(bank.prices)).codes.cpu()
    assert torch.equal(ternary.dequantize(ternary.TernaryBank(codes, bank.levels, cols)), weights)
    x, slots = torch.randn(3, cols, generator=torch.Generator().manual_seed(6)), torch.tensor([1, -1, 7], dtype=torch.int32)
    y = multiply(x, slots, bank)
    assert y[2].isnan().all()
    assert_product(y[:2], x[:2], slots[:2], weights, ERROR)


@pytest.mark.parametrize("size", [2, 5])
def test_words_are_read_inside_the_bank_alone(size):
    bank, weights = words(4, 33)
    bank.ends[0, 2], bank.ends[1, 1] = 2**31 - 1, -(2**31)
    y = multiply(torch.ones(size, 33), torch.tensor([0, 1, 0, 0, 0][:size], dtype=torch.int32), bank)
    bad = torch.tensor([[False, False, True, True], [False, True, True, False]])
    assert torch.equal(y[:2].isnan(), bad)
    assert torch.allclose(y[:2][~bad], weights.sum(2)[~bad], atol=1e-4)


def test_many_blocks_and_every_row_once():
    slots = torch.randint(-3, 9, (500,), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    order, blocks = launch.assign(slots.to(DEVICE), 6, 16)
    order, (slot, first, last) = order.cpu(), blocks.cpu()
    assert len(slot) == 500 // 16 + 6 and ((last - first >= 0) & (last - first <= 16)).all()
    for number in range(6):
        own = [order[a:b] for s, a, b in zip(slot, first, last, strict=True) if s == number]
        assert torch.equal(torch.cat(own), torch.nonzero(slots == number).squeeze(1))  # in order, which makes sums repeatable
    assert torch.equal(last[slot == 6], first[slot == 6])


def test_views_of_banks():
    bank, weights = filled("b4g32a", 4, 20, 70)
    half = int_format.IntBank(bank.codes[1::2], bank.row_scales[1::2], bank.scales[1::2], bank.zeros[1::2], 4, 32, 70)
    x = torch.randn(3, 140, generator=torch.Generator().manual_seed(4))[:, ::2]
    slots = torch.tensor([1, 9, 0, 9, -1, 9], dtype=torch.int32)[::2]
    assert_product(multiply(x, slots, half), x, slots, weights[1::2], 2e-6)


@pytest.mark.parametrize("size", [1, 37, 128, 300])
def test_rotation(size):
    x, sign = torch.randn(3, size, generator=torch.Generator().manual_seed(5)), pack_rotation.signs(size)
    turned = rotation.rotate(x.to(DEVICE), sign.to(DEVICE), False)
    assert torch.allclose(turned.cpu(), pack_rotation.rotate(x, sign), atol=2e-6)
    assert torch.allclose(rotation.rotate(turned, sign.to(DEVICE), True).cpu(), x, atol=4e-6)
    assert rotation.rotate(turned[:0], sign.to(DEVICE), True).shape == (0, size)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    if DEVICE.type == "cpu":
        monkeypatch.setattr(gpu, "ready", lambda device: True)
        for module, name in ((ops, "_native_ready"), (ternary_matmul, "_native_ready"), (trellis_matmul, "_ready")):
            monkeypatch.setattr(module, name, lambda: False)


def test_a_layer_of_mixed_codes(monkeypatch, request):
    config = Qwen3MoeConfig(hidden_size=16, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    module = Qwen3MoeExperts(config)
    contents = {name: {"b3g0a": 1, "t2": 2, "ternary": 1} for name in ("gate", "up", "down")}
    layer = PackedExperts(layout_of(module), contents, torch.bfloat16)
    for projection in contents:
        for code, bank in layer.banks(projection).items():
            made, _ = filled(code, len(bank.experts), bank.rows, bank.cols)
            for name, tensor in made.tensors().items():
                getattr(bank, name).copy_(tensor * 0.1 if tensor.is_floating_point() else tensor)
            bank.experts.copy_(torch.tensor({"b3g0a": [1], "t2": [0, 2], "ternary": [3]}[code]))
    torch.manual_seed(0)
    hidden, chosen, weights = torch.randn(2, 16) / 10, torch.tensor([[0, 1], [3, 1]]), torch.rand(2, 2)
    expected = layer.forward_for(module, hidden, chosen, weights)
    request.getfixturevalue("as_on_a_gpu")
    monkeypatch.setattr(dispatch, "CROWDED", 0)  # on a GPU experts are taken together, however many tokens there are
    monkeypatch.setattr(packed, "by_expert", None)
    found = layer.to(DEVICE).forward_for(module, hidden.to(DEVICE), chosen.to(DEVICE), weights.to(DEVICE)).cpu()
    assert float((found - expected).norm() / expected.norm()) < 1e-3


def test_the_operators_run_these_kernels(as_on_a_gpu):
    slots, x = torch.tensor([5, 1], dtype=torch.int32, device=DEVICE), torch.ones(2, 40, device=DEVICE)
    for code, run in (("b4g64s", kernels.grouped_matmul), ("ternary", ternary_matmul.matmul), ("t2", trellis_matmul.matmul)):
        bank, weights = filled(code, 2, 5, 40)
        y = run(x, slots, there(bank)).cpu()
        assert y[0].isnan().all()  # which the reference refuses
        assert torch.allclose(y[1], weights[1].sum(1), rtol=1e-4, atol=1e-5)
        with pytest.raises(UserError):
            run(x, slots.long(), there(bank))
    assert torch.equal(turn(x, 0), rotation.rotate(x, pack_rotation.signs(40).to(DEVICE), False))
