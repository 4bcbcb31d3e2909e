"""A scheme names how a matrix is stored: bits, group size, symmetric or not. "b3g64s", "b4g128a", "b16"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moecompress.errors import UserError
from moecompress.pack.int_format import stored_bytes


@dataclass(frozen=True, order=True)
class Scheme:
    bits: int
    group: int = 0  # columns a scale; 0 = one scale a row
    symmetric: bool = True

    @property
    def name(self) -> str:
        return "b16" if self.bits == 16 else f"b{self.bits}g{self.group}{'s' if self.symmetric else 'a'}"

    @staticmethod
    def parse(name: str) -> Scheme:
        if name == "b16":
            return Scheme(16)
        found = re.fullmatch(r"b(\d+)g(\d+)([sa])", name)
        if not found:
            raise UserError(f"Unknown storage scheme {name!r}", expected="b16, or like b3g64s (3 bits, group 64, symmetric)")
        return Scheme(int(found[1]), int(found[2]), found[3] == "s")

    def nbytes(self, rows: int, cols: int, dtype_bytes: int = 2) -> int:
        """Bytes of one stored matrix."""
        if self.bits == 16:
            return rows * cols * dtype_bytes
        return stored_bytes(rows, cols, self.bits, self.group, self.symmetric)
