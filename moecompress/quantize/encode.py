"""One way to codes, for every scheme. Integers: fit a grid, round by GPTQ, then alternate scale refits and coordinate
descent. Nested integers, trellis, low rank and rows of two or three values: in their own files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from moecompress.pack import int_format
from moecompress.pack import low_rank as low_rank_format
from moecompress.pack import nested as nested_format
from moecompress.pack import outliers as outlier_format
from moecompress.pack import shared_basis as shared_format
from moecompress.pack import vector as vector_format
from moecompress.pack.dictionary import DictionaryBank
from moecompress.pack.int_format import IntBank, pack
from moecompress.pack.low_rank import LowRankBank
from moecompress.pack.nested import NestedBank
from moecompress.pack.outliers import OutlierBank
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
from moecompress.pack.shared_basis import SharedBasisBank
from moecompress.pack.ternary import SignBank, TernaryBank, pack_signs, pack_ternary
from moecompress.pack.trellis import TrellisBank
from moecompress.pack.vector import VectorBank
from moecompress.quantize import gptq, low_rank, nested, outliers, shared_basis, ternary, trellis, vector, words
from moecompress.quantize.grid import Grid, fit
from moecompress.quantize.hessian import damped, factor, lower_factors

Bank = (IntBank | NestedBank | OutlierBank | LowRankBank | SharedBasisBank | TrellisBank | VectorBank | TernaryBank | SignBank
        | DictionaryBank)  # fmt: skip

#: Nested codes need a copy of the weights for each width: so many weights, rows of all experts, are rounded at a time.
NESTED_SLAB = 1 << 22


@dataclass(frozen=True)
class Settings:
    """How to round. refine: rounds of scale refit and descent after GPTQ. order: activation (large inputs first) or natural.
    ternary: a kind of grid of quantize/ternary.py. seed: of the trellis's rotation."""

    method: str = "gptq"
    damping: float = 0.01
    order: str = "activation"
    refine: int = 2
    allow_fallback: bool = False
    ternary: str = "lloyd"
    seed: int = 0


@dataclass(frozen=True)
class Inputs:
    """What error feedback needs to know of the inputs of n matrices; gate and up of an expert share theirs.

    hessian [n, i, i]; order [n, i] of processing; upper [n, i, i] inverse Cholesky factor in that order; fallen [n] True
    where the factorisation failed and the matrix is rounded to nearest; turned: the same for the trellis, lower [n, i, i]: the
    Cholesky factor for vectors, if they are used.
    """

    hessian: torch.Tensor
    order: torch.Tensor
    upper: torch.Tensor
    fallen: torch.Tensor
    turned: trellis.Turned | None = None
    lower: torch.Tensor | None = None

    def take(self, positions: list[int]) -> Inputs:
        if len(positions) == len(self.hessian):
            return self
        turned = None if self.turned is None else self.turned.take(positions)
        lower = None if self.lower is None else self.lower[positions]
        return Inputs(self.hessian[positions], self.order[positions], self.upper[positions], self.fallen[positions], turned, lower)


@dataclass(frozen=True)
class Encoded:
    """Matrices [n, o, i] as codes; error: [n], tr((W − Ŵ) H (W − Ŵ)ᵀ) / tr(W H Wᵀ), of nested codes with all bits. archived_bits:
    of the dictionary code, what its words' trits take at their entropy (pack/rans.py), a weight."""

    bank: Bank
    error: torch.Tensor
    archived_bits: float | None = None


def study(hessian: torch.Tensor, names: list[str], settings: Settings, schemes: list[Scheme] | None = None) -> Inputs:
    """Order and factors of Hessians [n, i, i]; ``names`` for the error message when one cannot be factorised.

    ``schemes``: those that will be asked for (None: any but trellis and vectors); what none of them needs is left out. Rounding
    to nearest needs no factors but those of vectors.
    """
    codes = {scheme.code for scheme in schemes or [] if scheme.bits != 16}
    order = processing_order(hessian.diagonal(dim1=-2, dim2=-1), settings.order)
    feedback = settings.method != "rtn"
    if not feedback:  # an error in a column costs its diagonal entry, as if H had no others
        pivots = hessian.diagonal(dim1=-2, dim2=-1).gather(1, order).clamp_min(torch.finfo(torch.float32).tiny)
        upper, fallen = torch.diag_embed(pivots.rsqrt()), torch.zeros(len(names), dtype=torch.bool)
    elif codes and codes <= {TRELLIS, VECTOR}:
        upper, fallen = hessian, torch.zeros(len(names), dtype=torch.bool)
    else:
        upper, failed = factor(permuted(hessian, order), settings.damping, names, settings.allow_fallback)
        fallen = torch.tensor([name in failed for name in names])
    lower = None
    if VECTOR in codes:
        lower, unfactored = lower_factors(hessian, settings.damping, names, settings.allow_fallback)
        fallen = fallen | unfactored
    if fallen.any():  # only the diagonal is believed then: rounding to nearest
        diagonal = torch.diag_embed(hessian.diagonal(dim1=-2, dim2=-1))
        hessian = torch.where(fallen[:, None, None], diagonal, hessian)
    turned = None
    if TRELLIS in codes:
        turned, unfactored = trellis.study(hessian, names, settings.damping, settings.seed, settings.allow_fallback, feedback)
        fallen = fallen | unfactored
    return Inputs(hessian, order, upper, fallen, turned, lower)


def encode(weights: torch.Tensor, inputs: Inputs | None, scheme: Scheme, settings: Settings, book: torch.Tensor | None = None
           ) -> Encoded:  # fmt: skip
    """weights: float32 [n, o, i]; inputs None: plain rounding, all inputs alike. ``book``: of vectors, or at least
    so many `shared_basis.directions` as the rank of a shared basis (None: one for these alone)."""
    if settings.method == "rtn" and scheme.code not in (INT, NESTED):
        inputs = None  # rounding to nearest uses the inputs for the grids of integers alone
    if scheme.outliers:
        return _with_outliers(weights, inputs, scheme, settings)
    return ENCODERS[scheme.code](weights, inputs, scheme, settings, book)


def _hessian(weights: torch.Tensor, inputs: Inputs | None) -> torch.Tensor:
    return torch.eye(weights.shape[-1]).expand(len(weights), -1, -1) if inputs is None else inputs.hessian


def _encoded(bank: Bank, weights: torch.Tensor, hessian: torch.Tensor, values: torch.Tensor) -> Encoded:
    """``values`` [n, o, i]: what the bank decodes to."""
    lost = gptq.row_errors(weights, hessian, values).sum(-1)
    whole = gptq.row_errors(weights, hessian, torch.zeros(())).sum(-1)
    return Encoded(bank, lost / whole.clamp_min(torch.finfo(torch.float32).tiny))


def _as_integers(weights: torch.Tensor, inputs: Inputs | None, scheme: Scheme, settings: Settings, _: torch.Tensor | None) -> Encoded:
    hessian = _hessian(weights, inputs)
    if inputs is None or settings.method == "rtn":
        grid, codes = _to_nearest(weights, hessian.diagonal(dim1=-2, dim2=-1), scheme)
    else:
        grid, codes = _feedback(weights, inputs, scheme, settings)
    bank: Bank
    if scheme.code == NESTED:
        bank = nested_format.pack(codes, grid.row_scales, grid.multipliers, int(scheme.bits), scheme.group)
    else:
        bank = pack(codes, grid.row_scales, grid.multipliers, grid.zeros, int(scheme.bits), scheme.group)
    return _encoded(bank, weights, hessian, gptq.values(codes, grid))


def _as_trellis(weights: torch.Tensor, inputs: Inputs | None, scheme: Scheme, settings: Settings, _: torch.Tensor | None) -> Encoded:
    turned = trellis.alike(len(weights), weights.shape[-1]) if inputs is None else inputs.turned
    assert turned is not None, "study() was not told of the trellis"
    coded = trellis.encode(weights, turned, scheme.bits, settings.seed)
    return Encoded(coded.bank, coded.error)


def _as_words(weights: torch.Tensor, inputs: Inputs | None, scheme: Scheme, settings: Settings, _: torch.Tensor | None) -> Encoded:
    found = words.encode(weights, inputs, scheme.bits, settings.refine)
    return Encoded(found.bank, found.error, found.archived_bits)


def _as_trits(weights: torch.Tensor, inputs: Inputs | None, scheme: Scheme, settings: Settings, _: torch.Tensor | None) -> Encoded:
    coded = ternary.encode(weights, inputs, settings.ternary, settings.refine)
    return Encoded(pack_ternary(coded.trits, coded.levels), coded.error)


def _as_signs(weights: torch.Tensor, inputs: Inputs | None, scheme: Scheme, settings: Settings, _: torch.Tensor | None) -> Encoded:
    coded = ternary.encode(weights, inputs, "sign", settings.refine)
    return Encoded(pack_signs((coded.trits == 2).to(torch.uint8), coded.levels[..., 1]), coded.error)


def _as_vectors(weights: torch.Tensor, inputs: Inputs | None, scheme: Scheme, settings: Settings, book: torch.Tensor | None) -> Encoded:
    hessian = _hessian(weights, inputs)
    if book is None:
        some = vector.sample(weights, hessian.diagonal(dim1=-2, dim2=-1), scheme.bits, vector.size_of_sample(scheme.bits))
        book = vector.train(*some, scheme.bits)
    lower = None if inputs is None else inputs.lower
    bank = vector.encode(weights, damped(hessian, settings.damping), lower, book, scheme.bits, settings.refine if lower is not None else 0)
    return _encoded(bank, weights, hessian, vector_format.dequantize(bank))


def _low_rank(weights: torch.Tensor, inputs: Inputs | None, scheme: Scheme, settings: Settings, _: torch.Tensor | None) -> Encoded:
    hessian = _hessian(weights, inputs)
    bank = low_rank.encode(weights, hessian, scheme.shares, settings.damping)
    return _encoded(bank, weights, hessian, low_rank_format.dequantize(bank))


def _with_basis(weights: torch.Tensor, inputs: Inputs | None, scheme: Scheme, settings: Settings, directions: torch.Tensor | None) -> Encoded:
    """The coefficients of the basis, rounded as matrices of their own with the second moments of B x."""
    hessian, rank = _hessian(weights, inputs), scheme.rank(weights.shape[-1])
    if directions is None:
        directions = _own_directions(weights, hessian, rank, settings)
    basis = shared_basis.stored(shared_basis.basis(directions, rank))
    seen = int_format.dequantize(basis)[0]
    exact, _ = shared_basis.coefficients(weights, damped(hessian, settings.damping), seen)
    found = encode(exact, None if inputs is None else _of_reduced(hessian, seen, settings), scheme.coefficients, settings)
    assert isinstance(found.bank, IntBank)
    bank = SharedBasisBank(found.bank, basis)
    return _encoded(bank, weights, hessian, shared_format.dequantize(bank))


#: Code -> what encodes matrices in it; integers with outliers have their own.
ENCODERS: dict[str, Callable[[torch.Tensor, Inputs | None, Scheme, Settings, torch.Tensor | None], Encoded]] = {
    INT: _as_integers, NESTED: _as_integers, TRELLIS: _as_trellis, VECTOR: _as_vectors, DICTIONARY: _as_words, TERNARY: _as_trits,
    SIGN: _as_signs, LOW_RANK: _low_rank, SHARED_BASIS: _with_basis,
}  # fmt: skip


def _own_directions(weights: torch.Tensor, hessian: torch.Tensor, rank: int, settings: Settings) -> torch.Tensor:
    alike = torch.ones(weights.shape[:2])
    return shared_basis.directions(shared_basis.energy(weights, alike), hessian.double().mean(0), settings.damping, rank)


def _of_reduced(hessian: torch.Tensor, basis: torch.Tensor, settings: Settings) -> Inputs:
    """What error feedback needs to know of B x, for x with second moments [n, i, i] and B [q, i]."""
    moments = basis @ hessian @ basis.T
    return study(moments, len(moments) * [""], replace(settings, allow_fallback=True))


def _with_outliers(weights: torch.Tensor, inputs: Inputs | None, scheme: Scheme, settings: Settings) -> Encoded:
    hessian = _hessian(weights, inputs)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    index, exact, grid = _set_aside(weights, inputs, diagonal, scheme)
    if inputs is None or settings.method == "rtn":
        codes = gptq.rtn(weights, grid)
        values = (weights - gptq.values(codes, grid)).gather(-1, index).to(torch.bfloat16)
    else:
        steady = damped(hessian, settings.damping)
        codes = gptq.gptq(weights, inputs.upper, inputs.order, grid, exact)
        values = outliers.solve(weights - gptq.values(codes, grid), steady, index)
        for _ in range(settings.refine):
            wanted = outliers.without(weights, values, index)
            grid = gptq.refit(wanted @ steady, steady, codes, grid)
            codes = gptq.descend(wanted, steady, codes, grid)
            values = outliers.solve(weights - gptq.values(codes, grid), steady, index)
    dense = pack(codes, grid.row_scales, grid.multipliers, grid.zeros, int(scheme.bits), scheme.group)
    bank = outlier_format.pack(dense, values, index, scheme.outliers)
    return _encoded(bank, weights, hessian, outlier_format.dequantize(bank))


def _set_aside(weights: torch.Tensor, inputs: Inputs | None, diagonal: torch.Tensor, scheme: Scheme
               ) -> tuple[torch.Tensor, torch.Tensor, Grid]:  # fmt: skip
    """Columns of the outliers, the same as a mask, and the grid of the rest."""
    # What an error in one column costs once all the others have made up for it: 1 / [H⁻¹]_jj, with H⁻¹ = UᵀU.
    cost = diagonal if inputs is None else _in_columns(inputs.upper.square().sum(-2).reciprocal(), inputs.order)
    index = outliers.choose(weights, cost, scheme)
    exact = outliers.mask(weights, index)
    return index, exact, outliers.fit_rest(weights, diagonal, exact, scheme)


def _in_columns(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """[n, i] in the order of processing -> in that of the columns."""
    return torch.empty_like(values).scatter_(1, order, values)


def _to_nearest(weights: torch.Tensor, importance: torch.Tensor, scheme: Scheme) -> tuple[Grid, torch.Tensor]:
    if scheme.code == NESTED:
        grid = nested.fit(weights, importance, int(scheme.bits), scheme.group)
        return grid, nested.rtn(weights, grid)
    grid = fit(weights, importance, int(scheme.bits), scheme.group, scheme.symmetric)
    return grid, gptq.rtn(weights, grid)


def _feedback(weights: torch.Tensor, inputs: Inputs, scheme: Scheme, settings: Settings) -> tuple[Grid, torch.Tensor]:
    # The descent optimises the Hessian itself; damping keeps it from chasing directions that calibration never saw.
    steady = damped(inputs.hessian, settings.damping)
    if scheme.code != NESTED:
        return _rows_with_feedback(weights, inputs, steady, scheme, settings)
    slabs = weights.split(max(1, NESTED_SLAB // weights[:, 0].numel()), dim=1)
    parts = [_rows_with_feedback(slab, inputs, steady, scheme, settings) for slab in slabs]
    return nested.join([grid for grid, _ in parts]), torch.cat([codes for _, codes in parts], 1)


def _rows_with_feedback(weights: torch.Tensor, inputs: Inputs, steady: torch.Tensor, scheme: Scheme, settings: Settings
                        ) -> tuple[Grid, torch.Tensor]:  # fmt: skip
    diagonal = inputs.hessian.diagonal(dim1=-2, dim2=-1)
    if scheme.code == NESTED:
        grid = nested.fit(weights, diagonal, int(scheme.bits), scheme.group)
        codes = nested.gptq(weights, inputs.upper, inputs.order, grid)
        refit, descend = nested.refit, nested.descend
    else:
        grid = fit(weights, diagonal, int(scheme.bits), scheme.group, scheme.symmetric)
        codes = gptq.gptq(weights, inputs.upper, inputs.order, grid)
        refit, descend = gptq.refit, gptq.descend
    target = weights @ steady if settings.refine else weights
    for _ in range(settings.refine):
        grid = refit(target, steady, codes, grid)
        codes = descend(weights, steady, codes, grid)
    return grid, codes


def processing_order(diagonal: torch.Tensor, order: str) -> torch.Tensor:
    """[n, i] column order: channels with the most activation energy first, while there is room to make up for them."""
    if order == "natural":
        return torch.arange(diagonal.shape[-1]).expand(len(diagonal), -1)
    return torch.argsort(diagonal, dim=-1, descending=True, stable=True)


def permuted(hessian: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    size = hessian.shape[-1]
    rows = hessian.gather(1, order[:, :, None].expand(-1, -1, size))
    return rows.gather(2, order[:, None, :].expand(-1, size, -1))


def expected_error(weights: torch.Tensor, inputs: Inputs, row_weight: torch.Tensor, schemes: list[Scheme],
                   settings: Settings, directions: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """Expected output error [n, C] of each scheme under GPTQ or the trellis search, without running either.

    Error feedback turns tr(Δ H Δᵀ) into Σ_j D_j δ_j² with D the diagonal of the LDL factorisation of H in the order of
    processing and δ_j plain rounding errors of column j (they are nearly uniform on the grid cell, so those of the
    original weights stand for those of the updated ones). row_weight [n, o] converts rows to the expert's output. directions: of shared
    bases, as `encode` has them.
    """
    result = torch.zeros(len(weights), len(schemes), dtype=torch.float64)
    for code in {scheme.code for scheme in schemes if scheme.bits != 16}:
        chosen = [index for index, scheme in enumerate(schemes) if scheme.code == code and scheme.bits != 16]
        expect = EXPECTED.get(code, _expected_of_rounding)
        result[:, chosen] = expect(weights, inputs, row_weight, [schemes[index] for index in chosen], settings, directions).double()
    return result


def _expected_of_rounding(weights: torch.Tensor, inputs: Inputs, row_weight: torch.Tensor, schemes: list[Scheme], settings: Settings,
                          _: torch.Tensor | None) -> torch.Tensor:  # fmt: skip
    pivots = inputs.upper.diagonal(dim1=-2, dim2=-1).square().reciprocal()  # (n, i) in processing order
    column_cost = _in_columns(pivots, inputs.order)
    off = ((weights - _nearest(weights, inputs, scheme, settings)).square() for scheme in schemes)
    return torch.stack([torch.einsum("noi,no,ni->n", one, row_weight, column_cost) for one in off], 1)


def _expected_of_low_rank(weights: torch.Tensor, inputs: Inputs, row_weight: torch.Tensor, schemes: list[Scheme], settings: Settings,
                          _: torch.Tensor | None) -> torch.Tensor:  # fmt: skip
    return low_rank.expected_error(weights, inputs.hessian, row_weight, [scheme.shares for scheme in schemes], settings.damping)


def _expected_of_trellis(weights: torch.Tensor, inputs: Inputs, row_weight: torch.Tensor, schemes: list[Scheme], settings: Settings,
                         _: torch.Tensor | None) -> torch.Tensor:  # fmt: skip
    assert inputs.turned is not None
    return trellis.expected_error(weights, inputs.turned, row_weight, [scheme.bits for scheme in schemes])


def _expected_of_vectors(weights: torch.Tensor, inputs: Inputs, row_weight: torch.Tensor, schemes: list[Scheme], settings: Settings,
                         _: torch.Tensor | None) -> torch.Tensor:  # fmt: skip
    lower = inputs.lower
    assert lower is not None
    return torch.stack([vector.expected_error(weights, inputs.hessian, lower, row_weight, scheme.bits) for scheme in schemes], 1)


def _expected_with_bases(weights: torch.Tensor, inputs: Inputs, row_weight: torch.Tensor, schemes: list[Scheme], settings: Settings,
                         directions: torch.Tensor | None) -> torch.Tensor:  # fmt: skip
    """What the basis leaves, and what rounding the coefficients adds; ranks one after the other."""
    result = row_weight.new_zeros(len(weights), len(schemes), dtype=torch.float64)
    for share in {scheme.shares[0] for scheme in schemes}:
        same = [index for index, scheme in enumerate(schemes) if scheme.shares[0] == share]
        some, rank = [schemes[index].coefficients for index in same], schemes[same[0]].rank(weights.shape[-1])
        known = _own_directions(weights, inputs.hessian, rank, settings) if directions is None else directions
        basis = shared_basis.basis(known, rank)
        exact, left = shared_basis.coefficients(weights, damped(inputs.hessian, settings.damping), basis)
        rounded = expected_error(exact, _of_reduced(inputs.hessian, basis, settings), row_weight, some, settings)
        result[:, same] = rounded + (left * row_weight).sum(1, keepdim=True)
    return result


#: Code -> expected errors [n, C] of its schemes; the others are rounded.
EXPECTED: dict[str, Callable[[torch.Tensor, Inputs, torch.Tensor, list[Scheme], Settings, torch.Tensor | None], torch.Tensor]] = {
    TRELLIS: _expected_of_trellis, VECTOR: _expected_of_vectors, LOW_RANK: _expected_of_low_rank, SHARED_BASIS: _expected_with_bases,
}  # fmt: skip


def _nearest(weights: torch.Tensor, inputs: Inputs, scheme: Scheme, settings: Settings) -> torch.Tensor:
    if scheme.code == DICTIONARY:
        return words.nearest(weights, scheme.bits, settings.refine)
    if scheme.code in (TERNARY, SIGN):
        levels = ternary.fit(weights, "sign" if scheme.code == SIGN else settings.ternary)
        return ternary.values(ternary.rtn(weights, levels), levels)
    scheme, diagonal = scheme.fitted(weights.shape[-1]), inputs.hessian.diagonal(dim1=-2, dim2=-1)
    if scheme.outliers:
        _, exact, grid = _set_aside(weights, inputs, diagonal, scheme)
        return torch.where(exact, weights, gptq.values(gptq.rtn(weights, grid), grid))
    grid, codes = _to_nearest(weights, diagonal, scheme)
    return gptq.values(codes, grid)
