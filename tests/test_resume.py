"""kill -9 at any moment, run the same command again: the same bytes, without doing finished layers again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_pipeline import INTEGERS

START = "import sys; from moecompress.cli import main; sys.argv = ['moecompress', *sys.argv[1:]]; main()"


def command(model: Path, out: Path, text: Path) -> list[str]:
    settings = ["calibration.sequences=10", "calibration.length=96", "calibration.heldout=2", "compute.micro_batch=2", INTEGERS]
    return [sys.executable, "-c", START, "quantize", str(model), "-o", str(out), "--target-bits", "3.6", "--text", str(text),
            *(part for setting in settings for part in ("--set", setting))]  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_model, text_file) -> tuple[Path, float]:
    out = tmp_path_factory.mktemp("resume") / "whole"
    start = time.monotonic()
    subprocess.run(command(tiny_model, out, text_file), check=True, capture_output=True)
    return out, time.monotonic() - start


def progress_marks(work: Path) -> int:
    """How many finished pieces (layers of statistics, shards, records) the work folder holds."""
    if not work.exists():
        return 0
    return sum(1 for p in work.rglob("*") if (p.suffix == ".safetensors" and "hidden" not in p.name) or p.name.startswith("record-"))


def test_killed_runs_end_with_the_same_bytes(tmp_path, tiny_model, text_file, uninterrupted):
    """Kills at random amounts of finished work, then lets it finish; every file must be the one of the whole run."""
    whole, _ = uninterrupted
    out, draw = tmp_path / "whole", random.Random(0)
    work = out.with_name(f".{out.name}.moecompress-work")
    kills = 0
    for goal in sorted(draw.sample(range(1, 16), 3)):
        process = subprocess.Popen(command(tiny_model, out, text_file), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and progress_marks(work) < goal:
            time.sleep(0.005)
        time.sleep(draw.random() * 0.1)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        assert not out.exists() or contents(out) == contents(whole)  # nothing half-written under the final name
    before = {p: p.stat().st_mtime_ns for p in work.rglob("model-layer-*")} if work.exists() else {}
    finished = len(list(work.rglob("record-*"))) if work.exists() else 0
    if not out.exists():
        done = subprocess.run(command(tiny_model, out, text_file), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "resuming" in done.stderr
    assert kills and contents(out) == contents(whole)
    assert not work.exists()
    if finished:  # finished layers were moved into place, not written again
        again = {p.name: p.stat().st_mtime_ns for p in out.glob("model-layer-*")}
        assert any(again.get(p.name) == mtime for p, mtime in before.items())


def test_other_inputs_start_afresh(tmp_path, tiny_model, text_file):
    from moecompress.job import open_work

    work = tmp_path / "work"
    open_work(work, "one", fresh=False)
    (work / "piece").write_text("x")
    open_work(work, "one", fresh=False)
    assert (work / "piece").exists()
    open_work(work, "two", fresh=False)
    assert not (work / "piece").exists()
    (work / "piece").write_text("x")
    open_work(work, "two", fresh=True)
    assert not (work / "piece").exists()
