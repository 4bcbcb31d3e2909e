"""The README shows every command, only options that exist, and links that lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from moecompress.cli import COMMANDS, app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#\s]+)\)", README)
    assert len(links) > 10
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_every_command_is_shown() -> None:
    assert [name for name in COMMANDS if f"`moecompress {name}" not in README] == []


@pytest.mark.parametrize("line", sorted(set(re.findall(r"`moecompress ([a-z-]+ [^`]*)`", README))))
def test_options_exist(line: str) -> None:
    name, *words = line.split()
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("-")} <= known
    assert all((ROOT / word).exists() for word in words if word.startswith("recipes/"))
