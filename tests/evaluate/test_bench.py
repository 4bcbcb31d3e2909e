"""The benchmark measures what it says: routes, bytes, ratios."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from moecompress.cli.bench import command
from moecompress.errors import UserError
from moecompress.evaluate import bench
from moecompress.pack.scheme import Scheme

app = typer.Typer()
app.command()(command)


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments), catch_exceptions=True)


def test_numbers_agree_with_each_other():
    threads = torch.get_num_threads()
    result = run("--shape", "128x64:2", "--codes", "b3g64a,b3g64a_o1,t2,v2,ternary,sign,b16", "--batch", "1,5", "--rounds", "3", "--memory", "0.1", "--json",
                 "--threads", "1")  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["threads"] == 1 and torch.get_num_threads() == threads
    assert record["bandwidth_gigabytes_per_second"] > 0
    rows = record["results"]
    assert [(r["batch"], r["weights"]) for r in rows] == [
        (b, w) for b in (1, 5) for w in ("b3g64a", "b3g64a_o1", "t2", "v2", "ternary", "sign", "b16", "bfloat16", "float32")
    ]
    expert = 2 * Scheme(3, 64, False).price(64, 128) + Scheme(3, 0, False).price(128, 64)  # a group that holds the row needs no multipliers
    for row in rows:
        seconds = row["microseconds_per_token"] * row["batch"] / 1e6
        touched = row["experts_per_step"]
        assert 2 <= touched <= 2 * row["batch"]
        size = {"b3g64a": expert, "b3g64a_o1": expert + 3 * (64 + 64 + 128), "v2": 2 * 64 * (32 + 2) + 128 * (16 + 2),
                "t2": 3 * (128 * 64 // 4 + 4), "ternary": 2 * 64 * (26 + 4) + 128 * (13 + 4),
                "sign": 2 * 64 * (16 + 2) + 128 * (8 + 2), "b16": 3 * 128 * 64 * 2, "bfloat16": 3 * 128 * 64 * 2,
                "float32": 3 * 128 * 64 * 4}[row["weights"]]  # fmt: skip
        assert row["gigabytes_per_second"] == pytest.approx(touched * size / seconds / 1e9)
        dense = next(r for r in rows if (r["batch"], r["weights"]) == (row["batch"], "bfloat16"))
        ratio = dense["microseconds_per_token"] / row["microseconds_per_token"]
        assert row["times_as_fast_as_bfloat16"] == pytest.approx(ratio)


def test_experts_in_memory_take_turns():
    shape = bench.Shape(hidden=8, width=8, experts=6, top_k=2)
    routes = list(bench.routes(shape, batch=1, experts=10, rounds=5))
    assert [expert for step in routes for expert in step[0]] == list(range(10))
    for step in bench.routes(shape, batch=7, experts=10, rounds=5):
        assert all(len(set(token)) == 2 for token in step)
        assert len({expert for token in step for expert in token}) <= 6


def test_table_for_people():
    result = run("--shape", "64x32:2", "--codes", "b2g64s", "--batch", "1", "--rounds", "1", "--memory", "0.1")
    assert result.exit_code == 0 and "b2g64s" in result.stdout and "bfloat16" in result.stdout


@pytest.mark.parametrize(
    "arguments", ["--codes b5g64s", "--codes a", "--batch 0", "--shape large", "--shape 8x8:0", "--memory 0.1 --shape mixtral"]
)
def test_what_cannot_be_measured_is_refused(arguments):
    assert isinstance(run(*arguments.split()).exception, UserError)
