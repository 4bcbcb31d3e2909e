"""The compiled CPU library (cpu/int_matmul.cpp)."""

from __future__ import annotations


def status() -> str:
    return "reference: the library is not written yet"
