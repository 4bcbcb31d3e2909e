"""Arithmetic on packed banks: ``grouped_matmul``, ``dequantize``, ``native_status``, ``gpu_status``."""

from moecompress.kernels.ops import dequantize, gpu_status, grouped_matmul, native_status

__all__ = ["dequantize", "gpu_status", "grouped_matmul", "native_status"]
