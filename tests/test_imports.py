"""Imports only run downhill: from a later room to an earlier one. And what must stay light stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "moecompress"
#: The way of the data. A room may import rooms above it; pack's manifest describes checkpoints, so model comes first.
ORDER = ["errors", "progress", "recipe", "model", "pack", "kernels", "runtime", "allocate", "quantize", "calibrate", "rounding", "compress",
         "transform", "evaluate", "job", "plans", "route", "distill", "prune", "pipeline", "convert", "report", "export", "cli"]  # fmt: skip


def imports():
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name and name.startswith("moecompress."):
                    yield path, room, name.split(".")[1]


def test_every_room_has_its_place():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert rooms == set(ORDER)


def test_imports_run_downhill():
    uphill = [
        f"{path.relative_to(PACKAGE)} imports {target}"
        for path, room, target in imports()
        if room != "__init__" and target in ORDER and ORDER.index(target) > ORDER.index(room)
    ]
    assert not uphill


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import moecompress", ["torch", "transformers"]),
        ("import moecompress.cli", ["torch", "transformers", "scipy", "matplotlib"]),
        ("import moecompress.runtime.loading", [f"moecompress.{room}" for room in ("allocate", "quantize", "calibrate", "pipeline")]),
    ],
)
def test_what_is_light_stays_light(code, absent):
    check = f"{code}; import sys; loaded = [m for m in {absent} if m in sys.modules]; assert not loaded, loaded"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ruff_and_mypy():
    root = PACKAGE.parent
    for command in (["ruff", "check", "moecompress", "tests"], ["mypy"]):
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, cwd=root)
        assert done.returncode == 0, done.stdout + done.stderr
