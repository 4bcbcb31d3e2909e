"""The steps that are timed on a GPU compute the same layer; and without a GPU nothing is timed."""

from __future__ import annotations

import pytest
import torch
import typer
from typer.testing import CliRunner

from moecompress.cli.bench import command
from moecompress.errors import UserError
from moecompress.evaluate import bench_gpu
from moecompress.evaluate.bench import random_bank
from moecompress.pack.scheme import Scheme

app = typer.Typer()
app.command()(command)


@pytest.mark.parametrize("code", ["b4g32s", "ternary", "t2"])
def test_both_steps_compute_the_same_layer(code):
    hidden, width, experts, tokens, top_k = 64, 32, 6, 5, 2
    generator = torch.Generator().manual_seed(0)
    banks = [random_bank(Scheme.parse(code), experts, *shape) for shape in ((width, hidden), (width, hidden), (hidden, width))]
    for bank in banks:
        for tensor in bank.buffers():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) / 8 + 0.05)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    slots = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)]).flatten().int()
    packed = bench_gpu.packed_step(*banks)(x, slots).float()
    dense = bench_gpu.dense_step(*(bank.dequantized(torch.bfloat16) for bank in banks))(x, slots).float()
    assert packed.shape == dense.shape == (tokens * top_k, hidden)
    assert float((packed - dense).norm() / dense.norm()) < 0.02


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_measure():
    refused = CliRunner().invoke(app, ["--device", "cuda"]).exception
    assert isinstance(refused, UserError) and "no GPU" in str(refused)
    assert isinstance(CliRunner().invoke(app, ["--device", "tpu"]).exception, UserError)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu():
    result = CliRunner().invoke(app, ["--device", "cuda", "--shape", "128x64:2", "--codes", "b3g64a,t2,ternary,sign", "--batch", "1,40",
                                      "--rounds", "3"])  # fmt: skip
    assert result.exit_code == 0 and "bfloat16" in result.stdout, result.output
