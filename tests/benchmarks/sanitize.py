"""The fuzz tests of the compiled libraries under AddressSanitizer: every read or write outside of memory ends the run.

    python tests/benchmarks/sanitize.py        # some minutes; needs g++ with libasan

Builds the libraries of kernels/cpu with -fsanitize=address in a copy of the package, and runs the tests that damage packed bytes with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ["tests/runtime/test_fuzz.py", "tests/kernels/test_trellis_matmul.py::test_fuzz"]
FLAGS = ["-shared", "-fPIC", "-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address", "-w"]


def main() -> int:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "moecompress", copy / "moecompress", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        for source in sorted((copy / "moecompress/kernels/cpu").glob("*.cpp")):
            target = copy / "moecompress/kernels" / f"_{source.stem}{suffix}"
            subprocess.run(["g++", *FLAGS, str(source), "-o", str(target)], check=True)
        # The exceptions of torch need the C++ library to be there when the sanitizer starts.
        found = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
                 for name in ("libasan.so", "libstdc++.so.6")]  # fmt: skip
        options = f"detect_leaks=0:log_path={copy / 'found'}"  # pytest would swallow what goes to stderr
        environment = os.environ | {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": options, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "2"}
        command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", *TESTS]
        code = subprocess.run(command, cwd=copy, env=environment).returncode
        for report in copy.glob("found*"):
            print(report.read_text())
        return code


if __name__ == "__main__":
    sys.exit(main())
