"""Formats that other tools read. Adding one is one file and one line here."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from moecompress.errors import UserError

#: format name -> module with `export(model, output, dtype, load_bits) -> record`
FORMATS = {"dense": "moecompress.export.dense"}


def export(model: Path, output: Path, name: str, dtype: str, load_bits: int | None = None) -> dict[str, Any]:
    if name not in FORMATS:
        raise UserError(f"Unknown export format {name!r}", expected=", ".join(FORMATS))
    return import_module(FORMATS[name]).export(model, output, dtype, load_bits)
