from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moecompress.calibrate.data import TokenBatches, read_texts, split_heldout, token_batches
from moecompress.errors import UserError


def byte_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, and <s> at 256; with ``bos`` it puts <s> before a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)} | {"<s>": 256}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


def numbered(count: int) -> str:
    """Lines that tell where they stand."""
    return "".join(f"line {i:06d}\n" for i in range(count))


def test_builtin_is_long_prose_and_always_the_same() -> None:
    texts = list(read_texts("builtin"))
    whole = "\n\n".join(texts)
    assert len(whole) >= 400_000 and texts == list(read_texts("builtin"))
    assert ">>>" not in whole and "::=" not in whole and "\0" not in whole
    words = whole.lower().split()
    assert sum(word in {"the", "of", "is", "a", "to", "and", "in"} for word in words) > 0.15 * len(words)


def test_every_kind_of_file_and_a_folder_of_them(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"text": "three"}) + "\n\n" + json.dumps({"content": "four", "id": 1}) + "\n", encoding="utf-8"
    )
    table = pyarrow.table({"id": [1, 2, 3], "text": ["five", None, "six é"]})
    parquet.write_table(table, tmp_path / "sub" / "c.parquet")
    (tmp_path / "notes.md").write_text("not read")
    assert list(read_texts(tmp_path / "b.jsonl")) == ["three", "four"]
    assert list(read_texts(str(tmp_path / "sub" / "c.parquet"))) == ["five", "six é"]
    assert list(read_texts(tmp_path)) == ["one\n\ntwo\n", "three", "four", "five", "six é"]


def test_a_long_txt_file_comes_back_whole(tmp_path: Path) -> None:
    text = numbered(40_000)
    (tmp_path / "a.txt").write_text(text)
    blocks = list(read_texts(tmp_path / "a.txt"))
    assert len(blocks) > 1 and "".join(blocks) == text


@pytest.mark.parametrize("bos", [False, True])
def test_batches_are_full_spread_over_the_text_and_do_not_overlap(tmp_path: Path, bos: bool) -> None:
    (tmp_path / "a.txt").write_text(numbered(10_000))  # 120,000 tokens
    tokenizer = byte_tokenizer(bos)
    batches = token_batches(tokenizer, tmp_path / "a.txt", 20, 240, seed=3)
    assert batches.ids.shape == batches.mask.shape == (20, 240)
    assert batches.ids.dtype == torch.int64 and batches.mask.dtype == torch.bool
    assert (batches.ids[:, 0] == 256).all() == bos and (batches.ids[:, 1:] != 256).all()
    assert torch.equal(~batches.mask, batches.ids == 256)
    seen: list[int] = []
    for index, row in enumerate(batches.ids):
        text = tokenizer.decode(row[batches.mask[index]])
        lines = [int(part) for part in text.split("\n")[1:-1] if part.startswith("line") for part in part.split()[1:]]
        assert lines == list(range(lines[0], lines[0] + len(lines)))
        assert index * 500 - 1 <= lines[0] <= (index + 1) * 500 - len(lines)  # its own twentieth of the text
        seen += lines
    assert len(seen) == len(set(seen))


def test_batches_depend_on_the_seed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(numbered(3000))
    one, same, other = (token_batches(byte_tokenizer(), tmp_path / "a.txt", 8, 64, seed) for seed in (0, 0, 1))
    assert one.fingerprint == same.fingerprint and torch.equal(one.ids, same.ids)
    assert one.fingerprint != other.fingerprint
    assert TokenBatches.of(one.ids, ~one.mask).fingerprint != one.fingerprint


def test_a_text_of_exactly_the_needed_length_and_one_token_less(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * 640)
    assert token_batches(byte_tokenizer(), path, 10, 64).ids.shape == (10, 64)
    assert token_batches(byte_tokenizer(bos=True), path, 10, 65).ids.shape == (10, 65)
    path.write_text("x" * 639)
    with pytest.raises(UserError, match=r"640 tokens \(10 sequences of 64\)\n.*639 tokens\n.*at most 9 sequences"):
        token_batches(byte_tokenizer(), path, 10, 64)


def test_special_tokens_in_the_text_are_masked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcd<s>efgh" * 20)
    batches = token_batches(byte_tokenizer(), tmp_path / "a.txt", 2, 50)
    assert (~batches.mask).sum() > 0 and torch.equal(~batches.mask, batches.ids == 256)


def test_a_very_long_text_is_thinned_evenly_and_not_cut_off(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(numbered(800_000))  # 9.6 million characters
    tokenizer = byte_tokenizer()
    batches = token_batches(tokenizer, tmp_path / "a.txt", 10, 100)
    places = [int(tokenizer.decode(row).split("line ")[2][:6]) for row in batches.ids]
    assert places == sorted(places) and places[0] < 80_000 and places[-1] > 700_000


def test_heldout_is_disjoint_even_and_keeps_order() -> None:
    ids = torch.arange(20)[:, None].repeat(1, 3)
    batches = TokenBatches.of(ids, torch.ones_like(ids, dtype=torch.bool))
    calibration, heldout = split_heldout(batches, 4)
    assert heldout.ids[:, 0].tolist() == [2, 7, 12, 17]
    assert sorted(calibration.ids[:, 0].tolist() + heldout.ids[:, 0].tolist()) == list(range(20))
    assert calibration.fingerprint != batches.fingerprint
    for count in range(20):
        calibration, heldout = split_heldout(batches, count)
        assert (len(heldout.ids), len(calibration.ids)) == (count, 20 - count)
    with pytest.raises(UserError, match="hold out"):
        split_heldout(batches, 20)


def write_bytes(name: str, data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "none.txt", "there is no text at"),
        (lambda folder: folder, "holds no text"),
        (write_bytes("a.txt", b""), "is empty"),
        (write_bytes("a.txt", b" \n\n"), "is empty"),
        (write_bytes("a.jsonl", b"\n"), "is empty"),
        (write_bytes("a.txt", b"abc\0def"), "NUL bytes"),
        (write_bytes("a.txt", b"abc\xff\xfe"), "UTF-8"),
        (write_bytes("a.pdf", b"abc"), "cannot read text from"),
        (write_bytes("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n'), r"a\.jsonl:2: a line without text"),
        (write_bytes("a.jsonl", b'{"text": "a"}\n{"text"\n'), r"a\.jsonl:2: not a line of JSON"),
        (write_bytes("a.jsonl", b'{"text": 3}\n'), r"a\.jsonl:1: a line without text"),
        (write_bytes("a.jsonl", b"[1]\n"), r"a\.jsonl:1: a line without text"),
        (write_bytes("a.parquet", b"not parquet at all"), "not a parquet file"),
    ],
)
def test_sources_that_cannot_be_read(tmp_path: Path, make: Callable[[Path], Path], words: str) -> None:
    with pytest.raises(UserError, match=words):
        token_batches(byte_tokenizer(), str(make(tmp_path)), 1, 8)


def test_a_parquet_file_without_text(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column of text"):
        list(read_texts(tmp_path / "a.parquet"))


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'moecompress\[data\]'"):
        list(read_texts("owner/name"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"pip install 'moecompress\[data\]'"):
        list(read_texts(tmp_path / "a.parquet"))


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls: list[object] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> object:
        calls.append((name, config, split, streaming))
        if name == "owner/gone":
            raise ConnectionError("no network")
        return ({"content": f"document {i} " * 50} for i in range(10**9))  # more than anyone could read

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    batches = token_batches(byte_tokenizer(), "owner/name:english", 4, 32)
    assert batches.ids.shape == (4, 32) and calls == [("owner/name", "english", "train", True)]
    with pytest.raises(UserError, match="no network"):
        list(read_texts("owner/gone"))
