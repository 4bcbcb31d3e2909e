"""The GPU kernels: in Triton's interpreter, compiled for GPUs that are not here, and on the GPU if there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moecompress import kernels

HERE = Path(__file__).parent


def run(file: str, interpreted: bool) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpreted))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_in_the_interpreter():
    run("triton_cases.py", interpreted=True)


def test_through_the_compiler():
    run("triton_compiled.py", interpreted=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_the_gpu():
    run("triton_cases.py", interpreted=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_status_without_a_gpu():
    assert kernels.gpu_status().startswith("reference: ")
