"""A scheme names how a matrix is stored: "b3g64s" (integers), "b2g64a_o1" (with 1 % outliers), "n4g64s" (nested ones), "t2_5"
(trellis), "v2" (vectors), "d0_8" (dictionary), "lr250s50" (low rank), "sb500b4g64a" (shared bases), "ternary", "sign", "b16" (as it was).
"t2w192": of an expert that is left with 192 of its neurons."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from moecompress.errors import UserError
from moecompress.recipe import DICTIONARY_RATES, TRELLIS_RATES, VECTOR_RATES, low_rank_bits

if TYPE_CHECKING:
    import torch

    from moecompress.pack.fields import Tensors

INT, TRELLIS, TERNARY, SIGN, NESTED, DICTIONARY, VECTOR = "int", "trellis", "ternary", "sign", "nested", "dictionary", "vector"
LOW_RANK, SHARED_BASIS, DROP = "low-rank", "shared-basis", "dropped"

#: Code -> the module of this package that knows its tensors: ``stored`` has those of a matrix, ``shared`` those that all matrices
#: of a bank have in common, if there are any.
FORMATS = {INT: "int_format", NESTED: "nested", TRELLIS: "trellis", VECTOR: "vector", TERNARY: "ternary", SIGN: "ternary",
           DICTIONARY: "dictionary", LOW_RANK: "low_rank", SHARED_BASIS: "shared_basis"}  # fmt: skip


@dataclass(frozen=True, order=True)
class Scheme:
    """``bits`` a weight without scales. ``group``, ``symmetric``: of integers; columns that share a scale, 0 for one scale a
    row. ``code``: a format of SPEC.md. ``outliers``: of integers; share of the weights that keep 16 bits beside their codes.
    ``shares``: of low rank; the rank and the kept columns, in thousandths of the most there can be; ``bits`` are those of a square
    matrix then. Of shared bases: the rank and 0; ``bits``, ``group`` and ``symmetric`` are those of the coefficients. ``width``: of
    an expert that is left with so many neurons (rows of gate and up, columns of down); 0: with all. At 16 bits nothing is quantized."""

    bits: float
    group: int = 0
    symmetric: bool = True
    code: str = INT
    outliers: float = 0.0
    shares: tuple[int, int] = (0, 0)
    width: int = 0

    @property
    def name(self) -> str:
        """That of the code, and behind it ``w192`` for 192 neurons."""
        return f"{self._code_name}w{self.width}" if self.width else self._code_name

    @property
    def _code_name(self) -> str:
        return "b16" if self.bits == 16 else NAMES.get(self.code, lambda scheme: scheme.code)(self)

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """The scheme of that name; UserError if it is none."""
        narrow = re.fullmatch(r"(.+)w([1-9]\d{0,5})", name)
        if narrow is not None and "w" not in narrow[1] and (whole := cls.parse(narrow[1])) != DROPPED:
            return replace(whole, width=int(narrow[2]))
        if name in _PLAIN:
            return _PLAIN[name]
        for pattern, make in PATTERNS.items():
            if (match := re.fullmatch(pattern, name)) is not None and (scheme := make(*match.groups())).bits < 16:
                return scheme
        raise UserError(f"no storage scheme is called {name!r}",
                        expected="a name such as b3g64s, b4g128a, b2g64a_o1, n4g64s, t2_5, v2, d0_8, lr250s50, sb500b4g64a, ternary, "
                                 "sign, b16 or t2w192")  # fmt: skip

    def fitted(self, cols: int) -> Scheme:
        """The same for a matrix of ``cols`` columns: a group that holds the whole row needs no multipliers."""
        return replace(self, group=0) if self.group >= self.rank(cols) else self

    def rank(self, cols: int) -> int:
        """Columns that have codes: of shared bases, as many as the basis of a matrix of ``cols`` columns has rows."""
        if self.code != SHARED_BASIS:
            return cols
        from moecompress.pack import shared_basis

        return shared_basis.rank(cols, self.shares[0])

    @property
    def coefficients(self) -> Scheme:
        """Of shared bases: how the matrices that they are multiplied by are stored."""
        return Scheme(self.bits, self.group, self.symmetric)

    def price(self, rows: int, cols: int, weights_dtype_bytes: int = 2) -> int:
        """Exact stored bytes of a ``rows`` × ``cols`` matrix (of a thinner expert: its own rows and columns), without `shared_bytes`.
        At 16 bits it keeps the input's dtype."""
        if self.bits == 16:
            return rows * cols * weights_dtype_bytes
        return 0 if self.code == DROP else _bytes(self._format().stored(self.fitted(cols), rows, cols))

    def shared_bytes(self, cols: int) -> int:
        """Exact stored bytes that all matrices of a bank, of ``cols`` columns, have in common, however many they are."""
        return _bytes(self.shared_tensors(cols))

    def tensors(self, count: int, rows: int, cols: int, dtype: torch.dtype) -> Tensors:
        """Those of a bank of ``count`` matrices in the file. ``dtype``: of matrices that stay at 16 bits."""
        if self.bits == 16:
            return {"weight": (dtype, (count, rows, cols))}
        own = self._format().stored(self, rows, cols)
        return {name: (kind, (count, *shape)) for name, (kind, shape) in own.items()} | self.shared_tensors(cols)

    def shared_tensors(self, cols: int) -> Tensors:
        """Those that all matrices of a bank have in common, without a dimension for them."""
        if self.bits == 16 or self.code == DROP:
            return {}
        shared: Callable[[Scheme, int], Tensors] | None = getattr(self._format(), "shared", None)
        return {} if shared is None else shared(self, cols)

    def _format(self) -> Any:
        # Imported here because formats bring torch, and a plan from a file of factors needs none.
        return import_module(f"moecompress.pack.{'outliers' if self.outliers else FORMATS[self.code]}")


def _bytes(tensors: Tensors) -> int:
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in tensors.values())


def _rate(scheme: Scheme) -> str:
    """``t2_5``: names of modules have no points."""
    return f"{scheme.code[0]}{_number(scheme.bits)}"


def _number(value: float) -> str:
    return f"{value:g}".replace(".", "_")


def _integers(scheme: Scheme) -> str:
    kept = f"_o{_number(100 * scheme.outliers)}" if scheme.outliers else ""
    return f"b{scheme.bits:g}g{scheme.group}{'s' if scheme.symmetric else 'a'}{kept}"


#: Code -> how its schemes are called; the others are called as their code.
NAMES: dict[str, Callable[[Scheme], str]] = {
    INT: _integers,
    TRELLIS: _rate,
    VECTOR: _rate,
    DICTIONARY: _rate,
    NESTED: lambda scheme: f"n{scheme.bits:g}g{scheme.group}s",
    LOW_RANK: lambda scheme: f"lr{scheme.shares[0]}s{scheme.shares[1]}",
    SHARED_BASIS: lambda scheme: f"sb{scheme.shares[0]}{scheme.coefficients.name}",
}
_GRID = r"b(2|3|4|8)g(0|32|64|128)([sa])"
#: Names that have numbers in them -> what makes a scheme of these.
PATTERNS: dict[str, Callable[..., Scheme]] = {
    _GRID: lambda bits, group, kind: Scheme(int(bits), int(group), kind == "s"),
    r"b([234])g(0|32|64|128)([sa])_o(0_5|1|2)": lambda bits, group, kind, kept: Scheme(
        int(bits), int(group), kind == "s", outliers=float(kept.replace("_", ".")) / 100),
    r"n(3|4)g(0|32|64|128)s": lambda bits, group: Scheme(int(bits), int(group), code=NESTED),
    r"lr([1-9]\d{0,2})s(0|[1-9]\d{0,2})": lambda rank, kept: Scheme(
        low_rank_bits((int(rank), int(kept))), code=LOW_RANK, shares=(int(rank), int(kept))),
    rf"sb([1-9]\d{{0,2}}){_GRID}": lambda rank, bits, group, kind: Scheme(
        int(bits), int(group), kind == "s", SHARED_BASIS, shares=(int(rank), 0)),
}  # fmt: skip
#: Of an expert that is left out: no bytes. Only in plans; a checkpoint has no such bank.
DROPPED = Scheme(0, code=DROP)
_PLAIN = {
    scheme.name: scheme
    for scheme in (Scheme(16), DROPPED, Scheme(1.6, code=TERNARY), Scheme(1, code=SIGN), *(Scheme(r, code=TRELLIS) for r in TRELLIS_RATES),
                   *(Scheme(r, code=DICTIONARY) for r in DICTIONARY_RATES), *(Scheme(r, code=VECTOR) for r in VECTOR_RATES))
}
