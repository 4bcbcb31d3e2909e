"""Low rank and kept columns against sums in Python, frozen bytes, and damage."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from moecompress.errors import UserError
from moecompress.pack import low_rank
from moecompress.pack.low_rank import LowRankBank
from moecompress.pack.scheme import Scheme
from moecompress.runtime.bank import LowRank


def random_bank(rows: int, cols: int, rank: int, kept: int, seed: int = 0) -> LowRankBank:
    g = torch.Generator().manual_seed(seed)
    columns = torch.stack([torch.randperm(cols, generator=g)[:kept].sort().values for _ in range(3)])
    return low_rank.pack(torch.randn(3, rows, rank + kept, generator=g), torch.randn(3, rank, cols, generator=g), columns)


@pytest.mark.parametrize(("rows", "cols", "rank", "kept"), [(1, 1, 1, 0), (3, 7, 2, 1), (9, 5, 1, 4), (4, 300, 3, 299)])
def test_a_bank_is_the_sum_that_the_specification_says(rows: int, cols: int, rank: int, kept: int) -> None:
    bank = random_bank(rows, cols, rank, kept)
    found = low_rank.dequantize(bank)
    for n in range(3):
        left, right = bank.left[n].double().tolist(), bank.right[n].double().tolist()
        numbers = [] if bank.kept is None else bank.kept[n].tolist()
        for r in range(rows):
            for c in random.Random(0).sample(range(cols), min(cols, 20)):
                wanted = sum(left[r][j] * right[j][c] for j in range(rank)) + sum(left[r][rank + j] for j, at in enumerate(numbers) if at == c)
                assert float(found[n, r, c]) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("shares", [(1, 0), (250, 50), (125, 0), (333, 333), (499, 1)])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (64, 64), (33, 70), (70, 33), (768, 2048)])
def test_sizes_bytes_and_names(rows: int, cols: int, shares: tuple[int, int]) -> None:
    rank, kept = low_rank.sizes(rows, cols, shares)
    assert rank == max(1, int(shares[0] * min(rows, cols) / 1000 + 0.5)) and kept == int(shares[1] * cols / 1000)
    assert 1 <= rank <= min(rows, cols - kept)
    scheme = Scheme.parse(f"lr{shares[0]}s{shares[1]}")
    tensors = scheme.tensors(2, rows, cols, torch.float32)
    assert 2 * scheme.price(rows, cols) == sum(torch.empty(shape, dtype=kind).nbytes for kind, shape in tensors.values())
    assert ("kept" in tensors) == bool(kept) and scheme.fitted(cols) == scheme
    if min(rows, cols) > 1:  # never more than bits say but for rounding the rank up and the numbers of columns
        assert 8 * scheme.price(rows, cols) <= scheme.bits * rows * cols + 8 * (rows + cols) * 2 + 16 * kept


# 1.5 is 3fc0, −2 is c000, 0.5 is 3f00, 3 is 4040, little-endian; column 300 is 012c. Frozen with the format.
GOLDEN = {"left": "c03f00c0003f4040", "right": "c03f" + 300 * "0000" + "4040", "kept": "2c01"}


def test_golden_bytes() -> None:
    right = torch.zeros(1, 1, 302)
    right[0, 0, 0], right[0, 0, 301] = 1.5, 3
    bank = low_rank.pack(torch.tensor([[[1.5, -2], [0.5, 3]]]), right, torch.tensor([[300]]))
    assert {name: bytes(t.view(torch.uint8).flatten().tolist()).hex() for name, t in bank.tensors().items()} == GOLDEN
    dense = low_rank.dequantize(bank)[0]
    assert dense[:, [0, 1, 300, 301]].tolist() == [[2.25, 0, -2, 4.5], [0.75, 0, 3, 1.5]]


def test_damage_is_refused() -> None:
    bank = random_bank(4, 9, 2, 3)
    assert bank.kept is not None
    for name, broken in {
        "left": replace(bank, left=bank.left[..., 1:]),
        "right": replace(bank, right=bank.right.float()),
        "kept": replace(bank, kept=torch.tensor([[0, 1, 9]] * 3).to(torch.uint16)),
    }.items():
        with pytest.raises(UserError, match=f"'{name}'"):
            low_rank.check(broken)
    for columns in ([2, 1, 3], [1, 1, 3], [0, 1, 65535]):
        damaged = bank.kept.clone().view(torch.int16)
        damaged[2] = torch.tensor(columns).to(torch.uint16).view(torch.int16)
        with pytest.raises(UserError, match="rising numbers of columns below 9"):
            low_rank.dequantize(replace(bank, kept=damaged.view(torch.uint16)))
    with pytest.raises(UserError, match="too wide for kept columns"):
        Scheme.parse("lr5s5").price(4, 2**16 + 1)
    Scheme.parse("lr5s0").price(4, 2**16 + 1)


def test_fuzz() -> None:
    """A flipped bit in any tensor is refused, or is a bank whose product is that of its matrices."""
    draw, scheme, outcomes = random.Random(0), Scheme.parse("lr250s250"), {"refused": 0, "read": 0}
    for trial in range(150):
        bank = random_bank(6, 12, *low_rank.sizes(6, 12, scheme.shares), seed=trial)
        tensors = {name: t.clone() for name, t in bank.tensors().items()}
        name = draw.choice(["kept", "kept", "left", "right"])
        raw = tensors[name].view(torch.uint8).view(-1)
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        module = LowRank(scheme, 3, 6, 12, torch.float32)
        for key, tensor in tensors.items():
            setattr(module, key, tensor)
        try:
            module.check()
        except UserError:
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        x, slots = torch.randn(4, 12), torch.tensor([0, 2, -1, 1], dtype=torch.int32)
        dense = module.dequantized(torch.float32)
        wanted = torch.stack([dense[s] @ v if s >= 0 else torch.zeros(6) for s, v in zip(slots, x, strict=True)])
        if torch.isfinite(dense).all() and dense.abs().max() < 1e30:
            assert torch.allclose(module.matmul(x, slots), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert min(outcomes.values()) > 20, outcomes
