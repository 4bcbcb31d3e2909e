"""A scheme names how a matrix is stored: "b3g64s" (integers), "n4g64s" (nested ones), "t2_5" (trellis), "ternary", "sign", "b16" (as it was)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moecompress.errors import UserError
from moecompress.recipe import TRELLIS_RATES

INT, TRELLIS, TERNARY, SIGN, NESTED, DROP = "int", "trellis", "ternary", "sign", "nested", "dropped"


@dataclass(frozen=True, order=True)
class Scheme:
    """``bits`` a weight without scales. ``group``, ``symmetric``: of integers; columns that share a scale, 0 for one scale a
    row. ``code``: a format of SPEC.md. At 16 bits nothing is quantized."""

    bits: float
    group: int = 0
    symmetric: bool = True
    code: str = INT

    @property
    def name(self) -> str:
        """``b3g64s`` (symmetric), ``b3g64a`` (with zeros), ``n4g64s`` (nested), ``t2_5`` (2.5 bits; names of modules have no
        points), or ``b16``."""
        if self.code == TRELLIS:
            return f"t{self.bits:g}".replace(".", "_")
        if self.code == NESTED:
            return f"n{self.bits:g}g{self.group}s"
        if self.code != INT:
            return self.code
        return "b16" if self.bits == 16 else f"b{self.bits:g}g{self.group}{'s' if self.symmetric else 'a'}"

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """The scheme of that name; UserError if it is none."""
        if name in _PLAIN:
            return _PLAIN[name]
        match = re.fullmatch(r"b(2|3|4|8)g(0|32|64|128)([sa])", name) or re.fullmatch(r"n(3|4)g(0|32|64|128)(s)", name)
        if match is None:
            raise UserError(f"no storage scheme is called {name!r}",
                            expected="a name such as b3g64s, b4g128a, n4g64s, t2_5, ternary, sign or b16")  # fmt: skip
        return cls(int(match[1]), int(match[2]), match[3] == "s", NESTED if name[0] == "n" else INT)

    def fitted(self, cols: int) -> Scheme:
        """The same for a matrix of ``cols`` columns: a group that holds the whole row needs no multipliers."""
        return Scheme(self.bits, 0, self.symmetric, self.code) if self.group >= cols else self

    def price(self, rows: int, cols: int, weights_dtype_bytes: int = 2) -> int:
        """Exact stored bytes of a ``rows`` × ``cols`` matrix. At 16 bits it keeps the input's dtype."""
        if self.code == DROP:
            return 0
        if self.bits == 16:
            return rows * cols * weights_dtype_bytes
        # Here because they bring torch, and a plan from a file of factors needs none.
        from moecompress.pack import int_format, nested, ternary, trellis

        if self.code == TRELLIS:
            return trellis.stored_bytes(rows, cols, self.bits)
        if self.code == TERNARY:
            return ternary.ternary_bytes(rows, cols)
        if self.code == SIGN:
            return ternary.sign_bytes(rows, cols)
        if self.code == NESTED:
            return nested.stored_bytes(rows, cols, int(self.bits), self.fitted(cols).group)
        return int_format.stored_bytes(rows, cols, int(self.bits), self.fitted(cols).group, self.symmetric)


#: Of an expert that is left out: no bytes. Only in plans; a checkpoint has no such bank.
DROPPED = Scheme(0, code=DROP)
_PLAIN = {
    scheme.name: scheme
    for scheme in (Scheme(16), DROPPED, Scheme(1.6, code=TERNARY), Scheme(1, code=SIGN), *(Scheme(r, code=TRELLIS) for r in TRELLIS_RATES))
}
