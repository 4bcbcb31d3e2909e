"""The command from end to end on a tiny model with a tiny tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from tiny import letters_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from moecompress.cli.convert import command
from moecompress.errors import UserError


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    letters_model(folder)
    (folder / "text.txt").write_text(" ".join("the quick brown fox".replace(" ", "")) * 200)
    return folder


def app() -> typer.Typer:
    made = typer.Typer()
    made.command()(command)
    return made


def test_json_and_a_loadable_checkpoint(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "moe"
    arguments = [str(dense), "-o", str(out), "--experts", "4", "--text", str(dense / "text.txt"), "--sequences", "4"]
    done = CliRunner().invoke(app(), [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert report["shared_width"] == 32 and report["top_k"] == 2 and report["least_used_share"] > 0
    assert AutoModelForCausalLM.from_pretrained(out).config.n_routed_experts == 4
    assert AutoTokenizer.from_pretrained(out)("a b")["input_ids"] == [1, 2]
    assert [p.name for p in out.parent.iterdir()] == ["moe"], "nothing temporary stays behind"
    with pytest.raises(UserError, match="exists"):
        CliRunner().invoke(app(), arguments, catch_exceptions=False)


def test_a_failure_leaves_nothing(dense: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ([str(dense), "--experts", "96"], "divided"),
        ([str(tmp_path / "absent")], "cannot load"),
        ([str(dense), "--experts", "4", "--text", str(tmp_path / "absent.txt")], "no text"),
    ):
        with pytest.raises(UserError, match=words):
            CliRunner().invoke(app(), [*arguments, "-o", str(tmp_path / "moe")], catch_exceptions=False)
    assert not list(tmp_path.iterdir())
