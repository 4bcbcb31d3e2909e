"""A tiny Qwen3-MoE checkpoint with a real tokenizer, made in seconds, and ways to run the command line on it."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each test process and what it starts, or they wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

#: Calibration small enough for a test: enough for every stage to have work, not enough for good statistics.
SMALL = ["calibration.sequences=6", "calibration.length=48", "calibration.heldout=2", "compute.micro_batch=2"]
#: Integers are rounded in half the time of the trellis's rates; where these matter, tests ask for them.
INTEGERS = "allocate.candidates=[{bits: 2}, {bits: 3}, {bits: 4}, {bits: 8, group: 128}, {bits: 16}]"


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40,000 characters of English: the beginning of the built-in text."""
    from moecompress.calibrate.data import read_texts

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(islice(read_texts("builtin"), 40))[:40_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A byte-level BPE of 512 tokens, trained on the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<|end|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    bpe.train([str(text_file)], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """3 layers of 8 experts (top-2), hidden 64, bfloat16, random weights, several shards with an index. Do not change it."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, max_position_embeddings=512, eos_token_id=0, bos_token_id=None, dtype=torch.bfloat16,
        initializer_range=0.15,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny") / "model"
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="200KB")
    for path in tokenizer_folder.iterdir():
        shutil.copyfile(path, folder / path.name)
    assert (folder / "model.safetensors.index.json").exists()
    return folder


@pytest.fixture(scope="module")
def quiet_and_single_threaded() -> Iterator[None]:
    """For matrices so tiny that a second thread only waits for the first."""
    import torch
    from transformers.utils import logging

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    torch.set_num_threads(threads)


@pytest.fixture
def copy_of_tiny(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    def json(self) -> dict:
        return json.loads(self.out)


@pytest.fixture(scope="session")
def moecompress() -> Iterator[Callable[..., Ran]]:
    """The command line, in this process: ``moecompress("inspect", folder, "--json")``. Session-wide, so that
    fixtures can use it."""
    from moecompress import progress
    from moecompress.cli import main

    def run(*arguments: object) -> Ran:
        out, err = io.StringIO(), io.StringIO()
        argv, stderr, file, width = sys.argv, sys.stderr, progress.console._file, progress.console._width
        sys.argv, sys.stderr = ["moecompress", *map(str, arguments)], err
        progress.console._file, progress.console._width = err, 200
        code = 0
        try:
            with redirect_stdout(out):
                main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        finally:
            sys.argv, sys.stderr = argv, stderr
            progress.console._file, progress.console._width = file, width
        return Ran(code, out.getvalue(), err.getvalue())

    yield run


@pytest.fixture(scope="session")
def quick(text_file: Path) -> list[str]:
    """Options for a calibration of a second."""
    return ["--text", str(text_file), *(part for change in [*SMALL, INTEGERS] for part in ("--set", change))]


@pytest.fixture(scope="session")
def packed_tiny(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, moecompress: Callable[..., Ran],
                quick: list[str]) -> Path:  # fmt: skip
    """The tiny model at three bits. Do not change it."""
    folder = tmp_path_factory.mktemp("packed") / "out"
    ran = moecompress("quantize", tiny_model, "-o", folder, "--target-bits", 3.6, *quick)
    assert ran.code == 0, ran.err
    return folder
