"""What can be decided (units), what can be chosen for each (candidates), and what a choice costs in bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moecompress.errors import UserError


@dataclass(frozen=True)
class Candidate:
    """One way to store a matrix (pack/SPEC.md). ``group`` 0: one scale per row; at 16 bits nothing is quantized."""

    bits: int
    group: int = 0
    symmetric: bool = True

    @property
    def name(self) -> str:
        """``b3g64s`` (symmetric), ``b3g64a`` (with zeros) or ``b16``."""
        return "b16" if self.bits == 16 else f"b{self.bits}g{self.group}{'s' if self.symmetric else 'a'}"

    @classmethod
    def parse(cls, name: str) -> Candidate:
        """The candidate of that name; UserError if it is none."""
        if name == "b16":
            return cls(16)
        match = re.fullmatch(r"b(2|3|4|8)g(0|32|64|128)([sa])", name)
        if match is None:
            raise UserError(f"no candidate is called {name!r}", expected="a name such as b3g64s, b4g128a or b16")
        return cls(int(match[1]), int(match[2]), match[3] == "s")

    def price(self, rows: int, cols: int, weights_dtype_bytes: int = 2) -> int:
        """Exact stored bytes of a ``rows`` × ``cols`` matrix. At 16 bits it keeps the input's dtype."""
        if self.bits == 16:
            return rows * cols * weights_dtype_bytes
        # Here because it brings torch, and a plan from a file of factors needs none.
        from moecompress.pack.int_format import stored_bytes

        return stored_bytes(rows, cols, self.bits, self.group, self.symmetric)


@dataclass(frozen=True)
class Unit:
    """One expert matrix. ``id`` is ``unit_id(layer, expert, projection)``; ``projection`` is gate, up or down."""

    id: str
    layer: int
    expert: int
    projection: str
    rows: int
    cols: int
    weights_dtype_bytes: int = 2

    @property
    def weights(self) -> int:
        return self.rows * self.cols


def unit_id(layer: int, expert: int, projection: str) -> str:
    """``L07.E031.down``"""
    return f"L{layer:02d}.E{expert:03d}.{projection}"


def prices(units: Sequence[Unit], candidates: Sequence[Candidate]) -> np.ndarray:
    """int64 (u, c): stored bytes of every unit under every candidate."""
    shapes = sorted({(unit.rows, unit.cols, unit.weights_dtype_bytes) for unit in units})
    of_shape = {shape: [candidate.price(*shape) for candidate in candidates] for shape in shapes}
    rows = [of_shape[unit.rows, unit.cols, unit.weights_dtype_bytes] for unit in units]
    return np.array(rows, dtype=np.int64).reshape(len(units), len(candidates))
