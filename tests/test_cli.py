"""What every command promises: help with examples that parse, one JSON object on stdout, completion, exit code 2."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.main import get_command

from moecompress.cli import COMMANDS, app

GROUP = get_command(app)


def examples(name: str) -> list[str]:
    return re.findall(r"^(?:    |`)(moecompress [^`\n]*)`?$", GROUP.commands[name].help or "", flags=re.MULTILINE)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_parse(name: str) -> None:
    found = examples(name)
    assert found
    for line in found:
        called, *words = shlex.split(line)[1:]
        assert called == name
        GROUP.commands[name].make_context(name, words)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_printed(name: str, moecompress: Callable) -> None:
    ran = moecompress(name, "--help")
    assert ran.code == 0
    assert examples(name)[0].split("'")[0].strip() in " ".join(ran.out.split())


def test_unknown_option_ends_with_two(moecompress: Callable) -> None:
    ran = moecompress("quantize", "model", "--targetsize", "1GB")
    assert ran.code == 2
    assert "--target-size" in ran.err  # did you mean


@pytest.fixture(scope="module")
def calls(tiny_model: Path, packed_tiny: Path, quick: list[str], text_file: Path, tmp_path_factory: pytest.TempPathFactory
          ) -> dict[str, list[object]]:  # fmt: skip
    """A call of every command that is quick on the tiny model, without --json."""
    folder = tmp_path_factory.mktemp("json")
    small = ["--sequences", 2, "--length", 32]
    return {
        "inspect": [tiny_model],
        "calibrate": [tiny_model, "-o", folder / "stats", *quick],
        "plan": [tiny_model, "--target-bits", 3.6, *quick],
        "quantize": [tiny_model, "-o", folder / "out", "--target-bits", 3.6, *quick],
        "prune": [tiny_model, "-o", folder / "pruned", *quick],
        "slim": [tiny_model, "-o", folder / "slim", *quick],
        "distill": [tiny_model, "--teacher", tiny_model, "-o", folder / "distilled", "--steps", 1, *quick],
        "evaluate": [packed_tiny, "--reference", tiny_model, "--text", text_file, *small],
        "export": [packed_tiny, "-o", folder / "dense"],
        "run": [packed_tiny, "--prompt", "The", "-n", 2],
        "report": [packed_tiny, "-o", folder / "report.html"],
        "tune-routing": [packed_tiny, "-o", folder / "routed", "--text", text_file, *small, "--heldout", 1],
        "bench": ["--shape", "64x64:4", "--codes", "b4g64s"],
    }


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"demo", "convert"}))  # those two: tests/convert
def test_json_is_one_object_on_stdout(name: str, calls: dict[str, list[object]], moecompress: Callable) -> None:
    ran = moecompress(name, *calls[name], "--json")
    assert ran.code == 0, ran.err
    assert ran.out.count("\n") == 1
    assert isinstance(ran.json(), dict)


def test_evaluate_has_the_promised_keys(calls: dict[str, list[object]], moecompress: Callable) -> None:
    record = moecompress("evaluate", *calls["evaluate"], "--json").json()
    promised = {"kl_mean", "kl_p99", "top1_agreement", "router_agreement", "perplexity", "reference_perplexity",
                "bits_per_weight", "total_bytes"}  # fmt: skip
    assert promised <= set(record)
    assert all(isinstance(record[key], int | float) for key in promised)


@pytest.mark.parametrize(("typed", "offered"), [("qu", "quantize"), ("quantize --target", "--target-size")])
def test_shell_completion(typed: str, offered: str) -> None:
    words = f"moecompress {typed}"
    environment = os.environ | {"_MOECOMPRESS_COMPLETE": "complete_bash", "COMP_WORDS": words,
                                "COMP_CWORD": str(len(words.split()) - 1)}  # fmt: skip
    start = "import sys; sys.argv = ['moecompress']; from moecompress.cli import app; app(prog_name='moecompress')"
    ran = subprocess.run([sys.executable, "-c", start], env=environment, capture_output=True, text=True, timeout=60)
    assert offered in ran.stdout.split(), ran.stderr
