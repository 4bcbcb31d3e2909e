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


def unit_id(layer: int, expert: int, projection: str) -> str:
    """``L07.E031.down``"""
    return f"L{layer:02d}.E{expert:03d}.{projection}"


def prices(units: Sequence[Unit], candidates: Sequence[Candidate]) -> np.ndarray:
    """int64 (u, c): stored bytes of every unit under every candidate."""
    shapes = sorted({(unit.rows, unit.cols, unit.weights_dtype_bytes) for unit in units})
    of_shape = {shape: [candidate.price(*shape) for candidate in candidates] for shape in shapes}
    rows = [of_shape[unit.rows, unit.cols, unit.weights_dtype_bytes] for unit in units]
    return np.array(rows, dtype=np.int64).reshape(len(units), len(candidates))
