"""A scheme names how a matrix is stored: "b3g64s" (integers), "b2g64a_o1" (with 1 % outliers), "n4g64s" (nested ones), "t2_5"
(trellis), "v2" (vectors), "d0_8" (dictionary), "lr250s50" (low rank), "sb500b4g64a" (shared bases), "ternary", "sign", "b16" (as it was).
"t2w192": of an expert that is left with 192 of its neurons."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from moecompress.errors import UserError
from moecompress.recipe import DICTIONARY_RATES, TRELLIS_RATES, VECTOR_RATES, low_rank_bits

INT, TRELLIS, TERNARY, SIGN, NESTED, DICTIONARY, VECTOR = "int", "trellis", "ternary", "sign", "nested", "dictionary", "vector"
LOW_RANK, SHARED_BASIS, DROP = "low-rank", "shared-basis", "dropped"


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
        """``b3g64s`` (symmetric), ``b3g64a`` (with zeros), ``b2g64a_o1`` (1 % outliers), ``n4g64s`` (nested), ``t2_5`` (2.5 bits;
        names of modules have no points), ``v2`` (vectors), ``d0_8`` (dictionary), ``lr250s50`` (a quarter of the rank, 5 % of the
        columns), ``sb500b4g64a`` (half of the rank, coefficients as b4g64a) or ``b16``."""
        if self.code in (TRELLIS, VECTOR, DICTIONARY):
            return f"{self.code[0]}{self.bits:g}".replace(".", "_")
        if self.code == NESTED:
            return f"n{self.bits:g}g{self.group}s"
        if self.code == LOW_RANK:
            return f"lr{self.shares[0]}s{self.shares[1]}"
        if self.code == SHARED_BASIS:
            return f"sb{self.shares[0]}{self.coefficients.name}"
        if self.code != INT:
            return self.code
        kept = f"_o{100 * self.outliers:g}".replace(".", "_") if self.outliers else ""
        return "b16" if self.bits == 16 else f"b{self.bits:g}g{self.group}{'s' if self.symmetric else 'a'}{kept}"

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """The scheme of that name; UserError if it is none."""
        narrow = re.fullmatch(r"(.+)w([1-9]\d{0,5})", name)
        if narrow is not None and "w" not in narrow[1] and (whole := cls.parse(narrow[1])) != DROPPED:
            return replace(whole, width=int(narrow[2]))
        if name in _PLAIN:
            return _PLAIN[name]
        thin = re.fullmatch(r"lr([1-9]\d{0,2})s(0|[1-9]\d{0,2})", name)
        if thin is not None and (bits := low_rank_bits(shares := (int(thin[1]), int(thin[2])))) < 16:
            return cls(bits, code=LOW_RANK, shares=shares)
        based = re.fullmatch(r"sb([1-9]\d{0,2})b(2|3|4|8)g(0|32|64|128)([sa])", name)
        if based is not None:
            return cls(int(based[2]), int(based[3]), based[4] == "s", SHARED_BASIS, shares=(int(based[1]), 0))
        match = re.fullmatch(r"b(2|3|4|8)g(0|32|64|128)([sa])", name) or re.fullmatch(r"n(3|4)g(0|32|64|128)(s)", name)
        kept = re.fullmatch(r"b([234])g(0|32|64|128)([sa])_o(0_5|1|2)", name)
        if kept is not None:
            return cls(int(kept[1]), int(kept[2]), kept[3] == "s", outliers=float(kept[4].replace("_", ".")) / 100)
        if match is None:
            raise UserError(f"no storage scheme is called {name!r}",
                            expected="a name such as b3g64s, b4g128a, b2g64a_o1, n4g64s, t2_5, v2, d0_8, lr250s50, sb500b4g64a, ternary, "
                                     "sign, b16 or t2w192")  # fmt: skip
        return cls(int(match[1]), int(match[2]), match[3] == "s", NESTED if name[0] == "n" else INT)

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
        if self.code == DROP:
            return 0
        if self.bits == 16:
            return rows * cols * weights_dtype_bytes
        # Here because they bring torch, and a plan from a file of factors needs none.
        from moecompress.pack import dictionary, int_format, low_rank, nested, outliers, ternary, trellis, vector

        if self.code == TRELLIS:
            return trellis.stored_bytes(rows, cols, self.bits)
        if self.code == VECTOR:
            return vector.stored_bytes(rows, cols, self.bits)
        if self.code == TERNARY:
            return ternary.ternary_bytes(rows, cols)
        if self.code == SIGN:
            return ternary.sign_bytes(rows, cols)
        if self.code == DICTIONARY:
            return dictionary.stored_bytes(rows, cols, self.bits)
        if self.code == LOW_RANK:
            return low_rank.stored_bytes(rows, cols, self.shares)
        if self.code == SHARED_BASIS:
            return self.coefficients.price(rows, self.rank(cols))
        if self.code == NESTED:
            return nested.stored_bytes(rows, cols, int(self.bits), self.fitted(cols).group)
        if self.outliers:
            return outliers.stored_bytes(rows, cols, int(self.bits), self.fitted(cols).group, self.symmetric, self.outliers)
        return int_format.stored_bytes(rows, cols, int(self.bits), self.fitted(cols).group, self.symmetric)

    def shared_bytes(self, cols: int) -> int:
        """Exact stored bytes that all matrices of a bank, of ``cols`` columns, have in common, however many they are."""
        from moecompress.pack import shared_basis, vector

        if self.code == SHARED_BASIS:
            return shared_basis.basis_bytes(cols, self.shares[0])
        return vector.book_bytes(self.bits) if self.code == VECTOR else 0


#: Of an expert that is left out: no bytes. Only in plans; a checkpoint has no such bank.
DROPPED = Scheme(0, code=DROP)
_PLAIN = {
    scheme.name: scheme
    for scheme in (Scheme(16), DROPPED, Scheme(1.6, code=TERNARY), Scheme(1, code=SIGN), *(Scheme(r, code=TRELLIS) for r in TRELLIS_RATES),
                   *(Scheme(r, code=DICTIONARY) for r in DICTIONARY_RATES), *(Scheme(r, code=VECTOR) for r in VECTOR_RATES))
}
