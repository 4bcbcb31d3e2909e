"""A scheme names how a matrix is stored: bits, group size, symmetric or not. "b3g64s", "b4g128a", "b16"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moecompress.errors import UserError


@dataclass(frozen=True, order=True)
class Scheme:
    """``group``: columns that share a scale, 0 for one scale a row. At 16 bits nothing is quantized."""

    bits: int
    group: int = 0
    symmetric: bool = True

    @property
    def name(self) -> str:
        """``b3g64s`` (symmetric), ``b3g64a`` (with zeros) or ``b16``."""
        return "b16" if self.bits == 16 else f"b{self.bits}g{self.group}{'s' if self.symmetric else 'a'}"

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """The scheme of that name; UserError if it is none."""
        if name == "b16":
            return cls(16)
        match = re.fullmatch(r"b(2|3|4|8)g(0|32|64|128)([sa])", name)
        if match is None:
            raise UserError(f"no storage scheme is called {name!r}", expected="a name such as b3g64s, b4g128a or b16")
        return cls(int(match[1]), int(match[2]), match[3] == "s")

    def fitted(self, cols: int) -> Scheme:
        """The same for a matrix of ``cols`` columns: a group that holds the whole row needs no multipliers."""
        return Scheme(self.bits, 0, self.symmetric) if self.group >= cols else self

    def price(self, rows: int, cols: int, weights_dtype_bytes: int = 2) -> int:
        """Exact stored bytes of a ``rows`` × ``cols`` matrix. At 16 bits it keeps the input's dtype."""
        if self.bits == 16:
            return rows * cols * weights_dtype_bytes
        # Here because it brings torch, and a plan from a file of factors needs none.
        from moecompress.pack.int_format import stored_bytes

        return stored_bytes(rows, cols, self.bits, self.fitted(cols).group, self.symmetric)
