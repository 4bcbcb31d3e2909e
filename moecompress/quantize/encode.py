"""One way to codes, for every scheme. Integers: fit a grid, round by GPTQ, then alternate scale refits and coordinate
descent. Nested integers, trellis, low rank and rows of two or three values: in their own files."""

from __future__ import annotations

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

    bank: (IntBank | NestedBank | OutlierBank | LowRankBank | SharedBasisBank | TrellisBank | VectorBank | TernaryBank | SignBank
           | DictionaryBank)  # fmt: skip
    error: torch.Tensor
    archived_bits: float | None = None


def study(hessian: torch.Tensor, names: list[str], settings: Settings, schemes: list[Scheme] | None = None) -> Inputs:
    """Order and factors of Hessians [n, i, i]; ``names`` for the error message when one cannot be factorised.

    ``schemes``: those that will be asked for (None: any but trellis and vectors); what none of them needs is left out.
    """
    codes = {scheme.code for scheme in schemes or [] if scheme.bits != 16}
    order = processing_order(hessian.diagonal(dim1=-2, dim2=-1), settings.order)
    if codes and codes <= {TRELLIS, VECTOR}:
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
        turned, unfactored = trellis.study(hessian, names, settings.damping, settings.seed, settings.allow_fallback)
        fallen = fallen | unfactored
    return Inputs(hessian, order, upper, fallen, turned, lower)


def encode(weights: torch.Tensor, inputs: Inputs | None, scheme: Scheme, settings: Settings, book: torch.Tensor | None = None
           ) -> Encoded:  # fmt: skip
    """weights: float32 [n, o, i]; inputs None: plain rounding, all inputs alike. ``book``: of vectors, or at least
    so many `shared_basis.directions` as the rank of a shared basis (None: one for these alone)."""
    experts, _, cols = weights.shape
    if settings.method == "rtn" and scheme.code not in (INT, NESTED):
        inputs = None  # rounding to nearest uses the inputs for the grids of integers alone
    if scheme.code == TRELLIS:
        turned = _turned(inputs, experts, cols)
        coded = trellis.encode(weights, turned, scheme.bits, settings.seed)
        return Encoded(coded.bank, coded.error)
    if scheme.code == VECTOR:
        return _as_vectors(weights, inputs, scheme, settings, book)
    if scheme.code in (TERNARY, SIGN, DICTIONARY):
        return _few_values(weights, inputs, scheme, settings)
    if scheme.code == LOW_RANK:
        return _low_rank(weights, inputs, scheme, settings)
    if scheme.code == SHARED_BASIS:
        return _with_basis(weights, inputs, scheme, settings, book)
    if scheme.outliers:
        return _with_outliers(weights, inputs, scheme, settings)
    bits = int(scheme.bits)
    if inputs is None or settings.method == "rtn":
        hessian = torch.eye(cols).expand(experts, -1, -1) if inputs is None else inputs.hessian
        grid, codes = _to_nearest(weights, hessian.diagonal(dim1=-2, dim2=-1), scheme)
    else:
        hessian = inputs.hessian
        grid, codes = _feedback(weights, inputs, scheme, settings)
    lost = gptq.row_errors(weights, hessian, gptq.values(codes, grid)).sum(-1)
    whole = gptq.row_errors(weights, hessian, torch.zeros(())).sum(-1)
    bank: IntBank | NestedBank
    if scheme.code == NESTED:
        bank = nested_format.pack(codes, grid.row_scales, grid.multipliers, bits, scheme.group)
    else:
        bank = pack(codes, grid.row_scales, grid.multipliers, grid.zeros, bits, scheme.group)
    return Encoded(bank, lost / whole.clamp_min(torch.finfo(torch.float32).tiny))


def _turned(inputs: Inputs | None, experts: int, cols: int) -> trellis.Turned:
    if inputs is None:
        return trellis.alike(experts, cols)
    assert inputs.turned is not None, "study() was not told of the trellis"
    return inputs.turned


def _few_values(weights: torch.Tensor, inputs: Inputs | None, scheme: Scheme, settings: Settings) -> Encoded:
    if scheme.code == DICTIONARY:
        found = words.encode(weights, inputs, scheme.bits, settings.refine)
        return Encoded(found.bank, found.error, found.archived_bits)
    coded = ternary.encode(weights, inputs, "sign" if scheme.code == SIGN else settings.ternary, settings.refine)
    if scheme.code == SIGN:
        return Encoded(pack_signs((coded.trits == 2).to(torch.uint8), coded.levels[..., 1]), coded.error)
    return Encoded(pack_ternary(coded.trits, coded.levels), coded.error)


def _as_vectors(weights: torch.Tensor, inputs: Inputs | None, scheme: Scheme, settings: Settings, book: torch.Tensor | None) -> Encoded:
    experts, _, cols = weights.shape
    hessian = torch.eye(cols).expand(experts, -1, -1) if inputs is None else inputs.hessian
    if book is None:
        some = vector.sample(weights, hessian.diagonal(dim1=-2, dim2=-1), scheme.bits, vector.size_of_sample(scheme.bits))
        book = vector.train(*some, scheme.bits)
    lower = None if inputs is None else inputs.lower
    bank = vector.encode(weights, damped(hessian, settings.damping), lower, book, scheme.bits, settings.refine if lower is not None else 0)
    lost = gptq.row_errors(weights, hessian, vector_format.dequantize(bank)).sum(-1)
    whole = gptq.row_errors(weights, hessian, torch.zeros(())).sum(-1)
    return Encoded(bank, lost / whole.clamp_min(torch.finfo(torch.float32).tiny))


def _low_rank(weights: torch.Tensor, inputs: Inputs | None, scheme: Scheme, settings: Settings) -> Encoded:
    hessian = torch.eye(weights.shape[-1]).expand(len(weights), -1, -1) if inputs is None else inputs.hessian
    bank = low_rank.encode(weights, hessian, scheme.shares, settings.damping)
    lost = gptq.row_errors(weights, hessian, low_rank_format.dequantize(bank)).sum(-1)
    whole = gptq.row_errors(weights, hessian, torch.zeros(())).sum(-1)
    return Encoded(bank, lost / whole.clamp_min(torch.finfo(torch.float32).tiny))


def _with_basis(weights: torch.Tensor, inputs: Inputs | None, scheme: Scheme, settings: Settings, directions: torch.Tensor | None) -> Encoded:
    """The coefficients of the basis, rounded as matrices of their own with the second moments of B x."""
    experts, _, cols = weights.shape
    hessian = torch.eye(cols).expand(experts, -1, -1) if inputs is None else inputs.hessian
    if directions is None:
        directions = _own_directions(weights, hessian, scheme.rank(cols), settings)
    basis = shared_basis.stored(shared_basis.basis(directions, scheme.rank(cols)))
    seen = int_format.dequantize(basis)[0]
    exact, _ = shared_basis.coefficients(weights, damped(hessian, settings.damping), seen)
    found = encode(exact, None if inputs is None else _of_reduced(hessian, seen, settings), scheme.coefficients, settings)
    assert isinstance(found.bank, IntBank)
    bank = SharedBasisBank(found.bank, basis)
    lost = gptq.row_errors(weights, hessian, shared_format.dequantize(bank)).sum(-1)
    whole = gptq.row_errors(weights, hessian, torch.zeros(())).sum(-1)
    return Encoded(bank, lost / whole.clamp_min(torch.finfo(torch.float32).tiny))


def _own_directions(weights: torch.Tensor, hessian: torch.Tensor, rank: int, settings: Settings) -> torch.Tensor:
    alike = torch.ones(weights.shape[:2])
    return shared_basis.directions(shared_basis.energy(weights, alike), hessian.double().mean(0), settings.damping, rank)


def _of_reduced(hessian: torch.Tensor, basis: torch.Tensor, settings: Settings) -> Inputs:
    """What error feedback needs to know of B x, for x with second moments [n, i, i] and B [q, i]."""
    moments = basis @ hessian @ basis.T
    return study(moments, len(moments) * [""], replace(settings, allow_fallback=True))


def _with_outliers(weights: torch.Tensor, inputs: Inputs | None, scheme: Scheme, settings: Settings) -> Encoded:
    experts, _, cols = weights.shape
    hessian = torch.eye(cols).expand(experts, -1, -1) if inputs is None else inputs.hessian
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
    wanted = outliers.without(weights, values, index)
    lost = gptq.row_errors(wanted, hessian, gptq.values(codes, grid)).sum(-1)
    whole = gptq.row_errors(weights, hessian, torch.zeros(())).sum(-1)
    dense = pack(codes, grid.row_scales, grid.multipliers, grid.zeros, int(scheme.bits), scheme.group)
    return Encoded(outlier_format.pack(dense, values, index, scheme.outliers), lost / whole.clamp_min(torch.finfo(torch.float32).tiny))


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
    rounded = [index for index, scheme in enumerate(schemes) if scheme.bits != 16 and scheme.code not in (TRELLIS, VECTOR, LOW_RANK, SHARED_BASIS)]
    if rounded:
        pivots = inputs.upper.diagonal(dim1=-2, dim2=-1).square().reciprocal()  # (n, i) in processing order
        column_cost = _in_columns(pivots, inputs.order)
    for index in rounded:
        off = (weights - _nearest(weights, inputs, schemes[index], settings)).square()
        result[:, index] = torch.einsum("noi,no,ni->n", off, row_weight, column_cost).double()
    thin = [index for index, scheme in enumerate(schemes) if scheme.code == LOW_RANK]
    if thin:
        shares = [schemes[index].shares for index in thin]
        result[:, thin] = low_rank.expected_error(weights, inputs.hessian, row_weight, shares, settings.damping)
    for share in sorted({scheme.shares[0] for scheme in schemes if scheme.code == SHARED_BASIS}):
        based = [index for index, scheme in enumerate(schemes) if scheme.code == SHARED_BASIS and scheme.shares[0] == share]
        result[:, based] = _expected_with_basis(weights, inputs, row_weight, [schemes[index] for index in based], settings, directions)
    searched = [index for index, scheme in enumerate(schemes) if scheme.code == TRELLIS]
    if searched:
        assert inputs.turned is not None
        rates = [schemes[index].bits for index in searched]
        result[:, searched] = trellis.expected_error(weights, inputs.turned, row_weight, rates)
    for index, scheme in enumerate(schemes):
        if scheme.code == VECTOR:
            assert inputs.lower is not None
            result[:, index] = vector.expected_error(weights, inputs.hessian, inputs.lower, row_weight, scheme.bits)
    return result


def _expected_with_basis(weights: torch.Tensor, inputs: Inputs, row_weight: torch.Tensor, schemes: list[Scheme], settings: Settings,
                         directions: torch.Tensor | None) -> torch.Tensor:  # fmt: skip
    """Of schemes with the same rank: what the basis leaves, and what rounding the coefficients adds."""
    rank = schemes[0].rank(weights.shape[-1])
    if directions is None:
        directions = _own_directions(weights, inputs.hessian, rank, settings)
    basis = shared_basis.basis(directions, rank)
    exact, left = shared_basis.coefficients(weights, damped(inputs.hessian, settings.damping), basis)
    rounded = expected_error(exact, _of_reduced(inputs.hessian, basis, settings), row_weight, [s.coefficients for s in schemes], settings)
    return rounded + (left * row_weight).sum(1, keepdim=True)


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
