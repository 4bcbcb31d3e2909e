"""What can be decided (units), what can be chosen for each (candidates), and what a choice costs in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moecompress.pack.scheme import Scheme as Candidate

__all__ = ["Candidate", "Unit", "prices", "unit_id"]


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

    def shape(self, width: int) -> tuple[int, int]:
        """Rows and columns if the expert is left with ``width`` neurons; 0: with all."""
        if not width:
            return self.rows, self.cols
        return (self.rows, width) if self.projection == "down" else (width, self.cols)


def unit_id(layer: int, expert: int, projection: str) -> str:
    """``L07.E031.down``"""
    return f"L{layer:02d}.E{expert:03d}.{projection}"


def prices(units: Sequence[Unit], candidates: Sequence[Candidate]) -> np.ndarray:
    """int64 (u, c): stored bytes of every unit under every candidate."""
    def key(unit: Unit) -> tuple[int, int, bool, int]:
        return unit.rows, unit.cols, unit.projection == "down", unit.weights_dtype_bytes

    of_shape = {key(unit): [c.price(*unit.shape(c.width), unit.weights_dtype_bytes) for c in candidates]
                for unit in {key(unit): unit for unit in units}.values()}  # fmt: skip
    return np.array([of_shape[key(unit)] for unit in units], dtype=np.int64).reshape(len(units), len(candidates))
