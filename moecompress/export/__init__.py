"""Formats that other tools read. Adding one is one file and one line here."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from moecompress.errors import UserError

#: format name -> module and its function (model, output, dtype, load_bits) -> record
FORMATS = {"dense": ("moecompress.export.dense", "export"), "archive": ("moecompress.export.archive", "export"),
           "packed": ("moecompress.export.archive", "restore")}  # fmt: skip


def export(model: Path, output: Path, name: str, dtype: str, load_bits: int | None = None) -> dict[str, Any]:
    if name not in FORMATS:
        raise UserError(f"Unknown export format {name!r}", expected=", ".join(FORMATS))
    module, function = FORMATS[name]
    return getattr(import_module(module), function)(model, output, dtype, load_bits)
