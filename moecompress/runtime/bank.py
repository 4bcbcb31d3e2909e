"""Banks: n matrices of one shape and one scheme as a module, whose buffers are exactly the tensors of SPEC.md."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from moecompress.kernels import dequantize as kernel_dequantize
from moecompress.kernels import grouped_matmul, ternary_matmul, trellis_matmul, vector_matmul
from moecompress.kernels import outliers as outlier_matmul
from moecompress.kernels.crowd import by_matrix
from moecompress.kernels.trellis_matmul import rotate, unrotate
from moecompress.pack import dictionary, int_format, low_rank, nested, outliers, shared_basis, ternary, trellis, vector
from moecompress.pack.int_format import IntBank, dequantize
from moecompress.pack.rotation import signs
from moecompress.pack.scheme import (
    DICTIONARY,
    INT,
    LOW_RANK,
    NESTED,
    SHARED_BASIS,
    SIGN,
    TERNARY,
    TRELLIS,
    VECTOR,
    Scheme,
)

#: Matrices that a backward pass unpacks at a time hold at most so many weights, or are one.
UNPACKED = 1 << 24


class PackedBank(nn.Module):
    """n matrices (rows × cols). Subclasses know a format; `make_bank` chooses. ``turns``: x and y of `matmul` are rotated.
    ``shared``: tensors that all matrices have in common, without a dimension for them."""

    turns = False

    def __init__(self, scheme: Scheme, count: int, rows: int, cols: int, dtype: torch.dtype, seed: int = 0):
        super().__init__()
        self.scheme, self.rows, self.cols, self.seed = scheme, rows, cols, seed
        self.shared = tuple(scheme.shared_tensors(cols))
        for name, (kind, shape) in scheme.tensors(count, rows, cols, dtype).items():
            self.register_buffer(name, torch.empty(shape, dtype=kind))

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """[n, rows, cols]"""
        raise NotImplementedError

    def matmul(self, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """x [S, cols], slots [S] (which matrix, −1 for none) -> [S, rows], zero rows for −1."""
        raise NotImplementedError

    def product(self, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """`matmul`, with a gradient for x where one is asked for: the weights are constants."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, slots, self)
        return self.matmul(x, slots)

    def unpacked(self, slots: torch.Tensor) -> torch.Tensor:
        """The matrices ``slots`` [s] as `matmul` multiplies with them, float32 [s, rows, cols]."""
        return self.dequantized(torch.float32)[slots]

    def check(self) -> None:
        """UserError if a tensor of a file says what the format cannot; shapes are right already."""


class IntegerBank(PackedBank):
    def bank(self) -> IntBank:
        return IntBank(self.codes, self.row_scales, getattr(self, "scales", None), getattr(self, "zeros", None),
                       int(self.scheme.bits), self.scheme.group, self.cols)  # fmt: skip

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        return dequantize(self.bank(), dtype)

    def matmul(self, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return grouped_matmul(x, slots, self.bank())

    def unpacked(self, slots: torch.Tensor) -> torch.Tensor:
        return kernel_dequantize(self.bank(), torch.float32, slots)


class IntegersWithOutliers(IntegerBank):
    def with_outliers(self) -> outliers.OutlierBank:
        return outliers.OutlierBank(self.bank(), self.outlier_values, self.outlier_columns, self.scheme.outliers)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        return outlier_matmul.dequantize(self.with_outliers(), dtype)

    def matmul(self, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return outlier_matmul.matmul(x, slots, self.with_outliers())

    def unpacked(self, slots: torch.Tensor) -> torch.Tensor:
        return PackedBank.unpacked(self, slots)  # that of plain integers would leave the outliers out

    def check(self) -> None:
        outliers.check(self.with_outliers())


class NestedIntegers(IntegerBank):
    """Nested integers as they lie in the file, at ``bits`` bits; the tensors that these do not need are not there.

    For walks that bring weights in and out. What stays in memory is `settled`.
    """

    def __init__(self, scheme: Scheme, count: int, rows: int, cols: int, dtype: torch.dtype, bits: int):
        super().__init__(scheme, count, rows, cols, dtype)
        self.bits, self.few = bits, False
        for name in unused_planes(scheme, bits):
            delattr(self, name)
        self._merged = WeakTensorKeyDictionary()  # by the codes: what was made of them goes when they go

    def bank(self) -> IntBank:
        planes = {} if self.few else {name: getattr(self, name) for name in nested.plane_names(self.bits)}
        stored = nested.NestedBank(self.codes, planes, self.row_scales, getattr(self, "scales", None), int(self.scheme.bits),
                                   self.scheme.group, self.cols)  # fmt: skip
        if not planes:
            return nested.as_integers(stored)
        if self.codes not in self._merged:
            self._merged[self.codes] = nested.as_integers(stored)
        return self._merged[self.codes]

    def settled(self) -> IntegerBank:
        """The same matrices as a bank of ordinary integers."""
        whole = self.bank()
        bank = IntegerBank(Scheme(whole.bits, whole.group, width=self.scheme.width), 0, self.rows, self.cols, torch.uint8)
        for name, tensor in whole.tensors().items():
            setattr(bank, name, tensor)
        return bank


class SplitIntegers(IntegerBank):
    """Nested integers in memory as the two highest bits and the rest, for calls that read only the former.

    A code c of b bits is 2^(b−2) · c₂ + r, and its value scale · (c − (2^b − 1) / 2) is the sum of those of two codes of two
    bits: c₂ at 2^(b−2) times the scale, and r (plus 1 where it has one bit) at the scale. While ``few`` is set, `matmul` reads
    the first alone. Four bits take the memory of four; three take that of four.
    """

    def __init__(self, whole: IntegerBank):
        bits = int(whole.scheme.bits)
        super().__init__(whole.scheme, 0, whole.rows, whole.cols, torch.uint8)
        for name, tensor in whole.bank().tensors().items():
            setattr(self, name, tensor)
        codes = int_format.unpack_codes(whole.codes, bits, self.cols)
        self.codes: torch.Tensor = int_format.pack_codes(codes >> (bits - nested.BASE), nested.BASE)
        rest = (codes & (2 ** (bits - nested.BASE) - 1)) + int(bits == 3)
        self.register_buffer("rest", int_format.pack_codes(rest, nested.BASE))
        self.few = False

    def base(self) -> IntBank:
        return replace(self._part(self.codes), row_scales=self.row_scales * 2 ** (int(self.scheme.bits) - nested.BASE))

    def _part(self, codes: torch.Tensor) -> IntBank:
        return IntBank(codes, self.row_scales, getattr(self, "scales", None), None, nested.BASE, self.scheme.group, self.cols)

    def bank(self) -> IntBank:
        bits = int(self.scheme.bits)
        high, low = (int_format.unpack_codes(part, nested.BASE, self.cols) for part in (self.codes, self.rest))
        whole = int_format.pack_codes((high << (bits - nested.BASE)) + low - int(bits == 3), bits)
        return replace(self._part(whole), bits=bits)

    def matmul(self, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        y = grouped_matmul(x, slots, self.base())
        return y if self.few else y + grouped_matmul(x, slots, self._part(self.rest))

    def joined(self) -> IntegerBank:
        """The bank of ordinary integers that this one was made of."""
        whole = self.bank()
        bank = IntegerBank(self.scheme, 0, self.rows, self.cols, torch.uint8)
        for name, tensor in whole.tensors().items():
            setattr(bank, name, tensor)
        return bank


class DenseBank(PackedBank):
    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.to(dtype)

    def matmul(self, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return grouped_dense(x, slots, self.weight)

    def unpacked(self, slots: torch.Tensor) -> torch.Tensor:
        return self.weight[slots].float()


class LowRank(PackedBank):
    def bank(self) -> low_rank.LowRankBank:
        return low_rank.LowRankBank(self.left, self.right, getattr(self, "kept", None))

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        return low_rank.dequantize(self.bank(), dtype)

    def matmul(self, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        inner = grouped_dense(x, slots, self.right)
        kept = self.bank().kept
        if kept is not None:
            columns = kept.long()[slots.long().clamp_min(0)]  # (S, k); the product below leaves slots −1 at zero
            inner = torch.cat([inner, x.gather(1, columns)], 1)
        return grouped_dense(inner, slots, self.left)

    def check(self) -> None:
        low_rank.check(self.bank())


class TrellisBank(PackedBank):
    turns = True

    def bank(self) -> trellis.TrellisBank:
        return trellis.TrellisBank(self.stream, self.scales, self.scheme.bits, self.rows, self.cols)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        turned = trellis_matmul.dequantized(self.bank())
        back = turn_back(turned.transpose(1, 2), self.seed).transpose(1, 2)
        return turn_back(back, self.seed).to(dtype)

    def matmul(self, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return trellis_matmul.matmul(x, slots, self.bank())

    def unpacked(self, slots: torch.Tensor) -> torch.Tensor:
        return trellis_matmul.dequantized(self.bank(), torch.float32, slots)


class FewValues(PackedBank):
    """Rows of three values or two."""

    def bank(self) -> ternary.TernaryBank | ternary.SignBank | dictionary.DictionaryBank:
        if self.scheme.code == DICTIONARY:
            return dictionary.DictionaryBank(self.words, self.ends, self.levels, dictionary.rate_prices(self.scheme.bits), self.cols)
        if self.scheme.code == SIGN:
            return ternary.SignBank(self.codes, self.scales, self.cols)
        return ternary.TernaryBank(self.codes, self.levels, self.cols)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        return ternary_matmul.dequantize(self.bank(), dtype)

    def matmul(self, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return ternary_matmul.matmul(x, slots, self.bank())

    def unpacked(self, slots: torch.Tensor) -> torch.Tensor:
        return ternary_matmul.dequantize(self.bank(), torch.float32, slots)


class Vectors(PackedBank):
    def bank(self) -> vector.VectorBank:
        return vector.VectorBank(self.codes, self.row_scales, self.book, self.scheme.bits, self.cols)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        return vector.dequantize(self.bank(), dtype)

    def matmul(self, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return vector_matmul.matmul(x, slots, self.bank())


class SharedBasis(PackedBank):
    def bank(self) -> shared_basis.SharedBasisBank:
        own = IntBank(self.codes, self.row_scales, getattr(self, "scales", None), getattr(self, "zeros", None),
                      int(self.scheme.bits), self.scheme.group, len(self.basis_codes))  # fmt: skip
        return shared_basis.SharedBasisBank(own, shared_basis.basis_bank(self.basis_codes, self.basis_row_scales, self.cols))

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        return shared_basis.dequantize(self.bank(), dtype)

    def reduced(self, x: torch.Tensor) -> torch.Tensor:
        """B x, the same for all matrices: x [S, cols] -> [S, q]."""
        return grouped_matmul(x, torch.zeros(len(x), dtype=torch.int32, device=x.device), self.bank().basis)

    def of_reduced(self, reduced: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """What `matmul` gives, of B x."""
        return grouped_matmul(reduced, slots, self.bank().coefficients)

    def matmul(self, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        mine = slots.clamp(max=0)  # rows of other banks stay at −1
        return self.of_reduced(grouped_matmul(x, mine, self.bank().basis), slots)

    def unpacked(self, slots: torch.Tensor) -> torch.Tensor:
        bank = self.bank()
        return kernel_dequantize(bank.coefficients, torch.float32, slots) @ kernel_dequantize(bank.basis, torch.float32)

    def check(self) -> None:
        shared_basis.check(self.bank())


#: What holds the matrices of a code in memory; nested integers have a number of bits to load besides.
BANKS: dict[str, type[PackedBank]] = {INT: IntegerBank, TRELLIS: TrellisBank, VECTOR: Vectors, TERNARY: FewValues, SIGN: FewValues,
                                      DICTIONARY: FewValues, LOW_RANK: LowRank, SHARED_BASIS: SharedBasis}  # fmt: skip


def make_bank(scheme: Scheme, count: int, rows: int, cols: int, dtype: torch.dtype, seed: int = 0, load_bits: int | None = None
              ) -> PackedBank:  # fmt: skip
    """An empty bank; ``dtype``: of matrices that stay at 16 bits; ``seed``: of the rotation; ``load_bits``: at most so many
    bits of nested integers (None: all)."""
    if scheme.code == NESTED:
        bits = int(scheme.bits) if load_bits is None else min(load_bits, int(scheme.bits))
        return NestedIntegers(scheme, count, rows, cols, dtype, bits)
    kind = DenseBank if scheme.bits == 16 else IntegersWithOutliers if scheme.outliers else BANKS[scheme.code]
    return kind(scheme, count, rows, cols, dtype, seed)


def unused_planes(scheme: Scheme, load_bits: int) -> list[str]:
    """Tensors of a bank of nested integers that are not needed at ``load_bits`` bits."""
    return [name for name in nested.plane_names(int(scheme.bits)) if name not in nested.plane_names(load_bits)]


def turn(x: torch.Tensor, seed: int) -> torch.Tensor:
    """What banks that ``turn`` take: the last dimension of x rotated, float32."""
    sign = _signs(x.shape[-1], seed, x.device)
    return _Turn.apply(x, sign, False) if torch.is_grad_enabled() and x.requires_grad else rotate(x, sign)


def turn_back(y: torch.Tensor, seed: int) -> torch.Tensor:
    """The inverse, for what they give."""
    sign = _signs(y.shape[-1], seed, y.device)
    return _Turn.apply(y, sign, True) if torch.is_grad_enabled() and y.requires_grad else unrotate(y, sign)


class _Product(torch.autograd.Function):
    """Backward: what row s of x gets is its row of the gradient times the matrix of its slot, a few matrices at a time."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slots: torch.Tensor, bank: PackedBank) -> torch.Tensor:
        ctx.save_for_backward(slots)
        ctx.bank, ctx.dtype = bank, x.dtype
        return bank.matmul(x, slots)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (slots,), bank = ctx.saved_tensors, ctx.bank
        result = gradient.new_zeros(len(slots), bank.cols, dtype=ctx.dtype)
        used = slots[slots >= 0].unique()
        for some in used.split(max(1, UNPACKED // (bank.rows * bank.cols))):
            for slot, matrix in zip(some, bank.unpacked(some.long()), strict=True):
                rows = (slots == slot).nonzero().squeeze(1)
                result[rows] = (gradient[rows].float() @ matrix).to(ctx.dtype)
        return result, None, None


class _Turn(torch.autograd.Function):
    """Rotations are orthogonal: backward is the inverse."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sign: torch.Tensor, undo: bool) -> torch.Tensor:
        ctx.save_for_backward(sign)
        ctx.undo, ctx.dtype = undo, x.dtype
        return unrotate(x, sign) if undo else rotate(x, sign)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (sign,) = ctx.saved_tensors
        back = rotate(gradient, sign) if ctx.undo else unrotate(gradient, sign)
        return back.to(ctx.dtype), None, None


@cache
def _signs(size: int, seed: int, device: torch.device) -> torch.Tensor:
    return signs(size, seed).to(device)


@torch.library.custom_op("moecompress::grouped_dense", mutates_args=())
def grouped_dense(x: torch.Tensor, slots: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same for matrices that are not packed: x [S, cols], slots [S], weight [n, rows, cols] -> [S, rows]."""
    return by_matrix(x, slots, slots.unique().tolist(), weight.shape[1], x.dtype, lambda slot: weight[slot].to(x.dtype))


@grouped_dense.register_fake
def _(x: torch.Tensor, slots: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])
