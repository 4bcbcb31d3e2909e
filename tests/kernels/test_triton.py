"""The GPU kernels where there is no GPU: in Triton's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moecompress import kernels

HERE = Path(__file__).parent


@pytest.mark.parametrize(("file", "interpreted"), [("interpreted_triton.py", "1"), ("compiled_triton.py", "0")])
def test_kernels_without_a_gpu(file, interpreted):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": interpreted}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_status_without_a_gpu():
    assert kernels.gpu_status().startswith("reference: ")
