"""Whatever the bytes of a packed file say: a refusal or numbers, never a crash and nothing read outside. Ten thousand damaged banks.

The same under AddressSanitizer, which sees every read outside (g++; about ten times as long):

    python tests/benchmarks/sanitize.py
"""

from __future__ import annotations

import pytest
import torch

from moecompress.errors import UserError
from moecompress.pack.scheme import Scheme
from moecompress.quantize.encode import Settings, encode
from moecompress.runtime.bank import PackedBank, make_bank

NAMES = ["b2g64a", "b3g32s", "b4g0s", "b8g64a", "b2g64a_o1", "b4g32s_o2", "n4g64s", "lr250s50", "sb500b4g64a", "sb250b3g0s", "t0_5", "t0_75", "t1", "t1_25",
         "t1_5", "t2", "t2_5", "t3", "t4", "v1", "v2", "v3", "ternary", "sign", "d0_7", "d1_2"]  # fmt: skip
ROUNDS = 10_000
COUNT, ROWS, COLS = 3, 33, 140


def sound(name: str) -> PackedBank:
    weights = torch.randn(COUNT, ROWS, COLS, generator=torch.Generator().manual_seed(0))
    scheme = Scheme.parse(name).fitted(COLS)
    bank = make_bank(scheme, COUNT, ROWS, COLS, torch.bfloat16)
    for key, value in encode(weights, None, scheme, Settings(method="rtn")).bank.tensors().items():
        setattr(bank, key, value)
    return bank


def damaged(tensor: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """One to eight bits flipped, a run of bytes at random, or the end cut off along some dimension."""

    def pick(high: int) -> int:
        return int(torch.randint(max(1, high), (1,), generator=random))

    data = tensor.clone().contiguous()
    bytes_ = data.view(-1).view(torch.uint8)
    kind = pick(4)
    if kind == 0:
        axis = pick(data.dim())
        return data.narrow(axis, 0, pick(data.shape[axis])).contiguous()
    if kind == 1:
        first = pick(len(bytes_))
        bytes_[first : first + 16] = torch.randint(0, 256, bytes_[first : first + 16].shape, generator=random, dtype=torch.uint8)
    else:
        for _ in range(1 + pick(8)):
            bytes_[pick(len(bytes_))] ^= 1 << pick(8)
    return data


@pytest.mark.parametrize("part", range(4))
def test_damaged_bytes_end_in_a_refusal_or_in_numbers(part: int) -> None:
    random = torch.Generator().manual_seed(part)
    banks = {name: sound(name) for name in NAMES}
    refused = computed = 0
    for number in range(ROUNDS // 4):
        name = NAMES[number % len(NAMES)]
        bank = banks[name]
        keys = [key for key, _ in bank.named_buffers()]
        key = keys[int(torch.randint(len(keys), (1,), generator=random))]
        kept = getattr(bank, key)
        rows = (1, 3, 70)[number % 3]
        x = torch.randn(rows, COLS, generator=random)
        slots = torch.randint(-1, COUNT + (number % 50 == 0), (rows,), generator=random, dtype=torch.int32)
        setattr(bank, key, damaged(kept, random))
        try:
            bank.check()
            assert len(bank.matmul(x, slots)) == rows  # loading has compared shapes already; here they may be wrong, too
            bank.dequantized(torch.float32)
            computed += 1
        except (UserError, ValueError, RuntimeError, IndexError):
            refused += 1
        finally:
            setattr(bank, key, kept)
    assert refused > 100 and computed > 100  # both are met
