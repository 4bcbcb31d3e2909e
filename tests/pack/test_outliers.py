"""Integers with outliers against a plain reading of the specification, and frozen bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moecompress.errors import UserError
from moecompress.pack import int_format, outliers
from moecompress.pack.outliers import OutlierBank
from moecompress.pack.scheme import Scheme

SHAPES = [(1, 1), (5, 70), (4, 256), (3, 257), (2, 300), (3, 1000), (2, 2048)]  # rows, cols


def a_bank(rows: int, cols: int, bits: int = 2, group: int = 64, share: float = 0.01, seed: int = 0) -> OutlierBank:
    """Two matrices with random codes, and outliers in random columns of their segments."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, rows, cols), generator=generator, dtype=torch.uint8)
    row_scales = (torch.rand(2, rows, generator=generator) + 0.1).bfloat16()
    scales = torch.randint(1, 256, (2, rows, int_format.groups(cols, group)), generator=generator, dtype=torch.uint8) if group else None
    dense = int_format.pack(codes, row_scales, scales, None, bits, group)
    first = outliers.starts(cols, share)
    wide = (cols - first).clamp_max(256)
    index = first + (torch.rand(2, rows, len(first), generator=generator) * wide).long()
    return outliers.pack(dense, torch.randn(2, rows, len(first), generator=generator).bfloat16(), index, share)


@pytest.mark.parametrize("share", [0.005, 0.01, 0.02])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_outliers_lie_where_the_specification_says(rows, cols, share):
    bank = a_bank(rows, cols, share=share, seed=cols)
    p = {0.005: 5, 0.01: 10, 0.02: 20}[share]
    k = max(1, (p * cols + 500) // 1000)
    assert bank.values.shape == bank.columns.shape == (2, k, rows)
    dense = outliers.dequantize(bank).double()
    for matrix in range(2):
        expected = int_format.dequantize(bank.dense)[matrix].double()
        for row in range(rows):
            for i in range(k):
                segment = next(s for s in range(8) if i < (2 * k * min(256 * (s + 1), cols) + cols) // (2 * cols))
                expected[row, 256 * segment + int(bank.columns[matrix, i, row])] += float(bank.values[matrix, i, row])
        assert torch.allclose(dense[matrix], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["b2g64a_o1", "b3g0s_o2", "b4g128s_o0_5"])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_price_is_what_is_stored(name, rows, cols):
    scheme = Scheme.parse(name).fitted(cols)
    plain = replace(scheme, outliers=0.0)
    bank = a_bank(rows, cols, int(scheme.bits), scheme.group, scheme.outliers)
    stored = sum(tensor.nbytes for tensor in (bank.values, bank.columns))
    assert 2 * (scheme.price(rows, cols) - plain.price(rows, cols)) == stored


# Frozen with the format: segments of 256 and 244 columns, with two outliers and one.
GOLDEN = {"outlier_values": "803f0040003f80be00c00000", "outlier_columns": "00010cff002b"}


def test_golden_bytes():
    dense = int_format.pack(torch.ones(1, 2, 500, dtype=torch.uint8), torch.ones(1, 2).bfloat16(), None, torch.ones(1, 2, 1, dtype=torch.uint8), 2, 0)
    values = torch.tensor([[[1.0, 0.5, -2.0], [2.0, -0.25, 0.0]]]).bfloat16()
    bank = outliers.pack(dense, values, torch.tensor([[[0, 12, 256], [1, 255, 299]]]), 0.005)
    written = {name: bytes(tensor.view(torch.uint8).flatten().tolist()).hex() for name, tensor in bank.tensors().items() if name in GOLDEN}
    assert written == GOLDEN
    found = outliers.dequantize(bank)[0]
    assert {(r, c): found[r, c].item() for r, c in found.nonzero().tolist()} == {
        (0, 0): 1.0, (0, 12): 0.5, (0, 256): -2.0, (1, 1): 2.0, (1, 255): -0.25}  # fmt: skip


def test_what_does_not_fit_is_refused():
    bank = a_bank(4, 600)
    beyond = bank.columns.clone()
    beyond[1, -1, 2] = 88
    for name, broken in {
        "outlier_values": replace(bank, values=bank.values[:, :, 1:]),
        "outlier_columns": replace(bank, columns=bank.columns.short()),
        "codes": replace(bank, dense=replace(bank.dense, codes=bank.dense.codes[..., 1:])),
    }.items():
        with pytest.raises(UserError, match=f"'{name}'"):
            outliers.check(broken)
    with pytest.raises(UserError, match="column 600"):
        outliers.check(replace(bank, columns=beyond))
    with pytest.raises(UserError, match="no such outliers"):
        outliers.check(replace(bank, share=0.3))
    with pytest.raises(ValueError, match="segment"):
        outliers.pack(bank.dense, bank.values.transpose(1, 2), torch.zeros(2, 4, 6).long(), 0.01)
