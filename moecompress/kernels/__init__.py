"""Arithmetic on packed banks: ``grouped_matmul``, ``dequantize``, ``native_status``."""

from moecompress.kernels.ops import dequantize, grouped_matmul, native_status

__all__ = ["dequantize", "grouped_matmul", "native_status"]
