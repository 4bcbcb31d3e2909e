"""Text into token batches.

A source is ``"builtin"``, a .txt, .jsonl or .parquet file, a folder of them, or the id of a data set on the Hugging
Face hub. Sequences are always full: nothing is padded.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moecompress.errors import UserError

#: names of the text column of a .jsonl line, a .parquet file or a data set, in order of preference
TEXT_FIELDS = ("text", "content")
#: characters handed to the tokenizer at once
_PIECE = 100_000
#: characters kept per token asked for: more than any tokenizer needs, so that a long text is thinned, not cut off
_CHARACTERS_PER_TOKEN = 16
_LEAST_KEPT = 2_000_000
_LINE_END, _SPACE = re.compile(r"\n"), re.compile(r"\s")
#: modules of the standard library whose docstrings read like prose
_BUILTIN_MODULES = """
    argparse asyncio.events bdb calendar codecs collections concurrent.futures._base configparser contextlib copy
    csv dataclasses decimal difflib doctest email.message enum fractions functools gettext hashlib heapq html.parser
    http.client http.cookiejar http.server imaplib inspect io ipaddress json.decoder locale logging logging.handlers
    mailbox multiprocessing.managers optparse os pathlib pdb pickle pickletools platform plistlib pprint queue
    random sched selectors shelve shlex shutil smtplib socket socketserver sqlite3.dbapi2 ssl statistics string
    subprocess tarfile tempfile textwrap threading timeit trace traceback turtle types typing unittest.case
    unittest.mock urllib.parse urllib.request uuid warnings weakref xml.dom.minidom xmlrpc.client zipfile
"""


@dataclass(frozen=True)
class TokenBatches:
    """``ids`` int64 [N, L]. ``mask`` bool [N, L]: False at special tokens, which statistics must leave out.

    ``fingerprint``: sha256 of shape, ids and mask.
    """

    ids: Tensor
    mask: Tensor
    fingerprint: str

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor) -> TokenBatches:
        digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
        digest.update(ids.contiguous().numpy().tobytes())
        digest.update(mask.contiguous().numpy().tobytes())
        return cls(ids, mask, digest.hexdigest())


def token_batches(tokenizer: Any, source: str | Path, sequences: int, length: int, seed: int = 0) -> TokenBatches:
    """``sequences`` × ``length`` tokens of ``source``, spread evenly over its text; the same for the same arguments.

    The text is cut into ``sequences`` equal parts and each gives one sequence, at a place drawn with ``seed``; no two
    overlap. If the tokenizer puts a beginning-of-sequence token before a text, every sequence starts with one. Of a
    data set on the hub the beginning is used, about 16 characters per token asked for.
    Raises UserError if the text is missing, unreadable or too short.
    """
    needed = sequences * length
    most = max(_LEAST_KEPT, needed * _CHARACTERS_PER_TOKEN)
    start = _first_token(tokenizer)
    body = length - len(start)
    stream = _tokenize(tokenizer, _thinned(read_texts(source), most, whole=not _is_hub(source)))
    found = len(stream)
    if found < sequences * body:
        raise UserError(
            f"the text {str(source)!r} is too short",
            expected=f"{sequences * body:,} tokens ({sequences} sequences of {length})",
            got=f"{found:,} tokens",
            remedy=f"give more text, or ask for at most {found // body} sequences of this length",
        )
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(sequences):
        first, last = index * found // sequences, (index + 1) * found // sequences - body
        offset = int(torch.randint(last - first + 1, (1,), generator=generator)) if last > first else 0
        rows.append(torch.cat((start, stream[first + offset : first + offset + body])))
    ids = torch.stack(rows)  # (N, L)
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64)
    return TokenBatches.of(ids, ~torch.isin(ids, special))


def split_heldout(batches: TokenBatches, heldout: int) -> tuple[TokenBatches, TokenBatches]:
    """(calibration, heldout): disjoint, ``heldout`` of the sequences evenly spread over the text, in order."""
    count = len(batches.ids)
    if not 0 <= heldout < count:
        raise UserError("cannot hold out that many sequences", expected=f"0 to {count - 1}", got=heldout)
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[[(2 * index + 1) * count // (2 * heldout) for index in range(heldout)]] = True
    return (
        TokenBatches.of(batches.ids[~chosen], batches.mask[~chosen]),
        TokenBatches.of(batches.ids[chosen], batches.mask[chosen]),
    )


def read_texts(source: str | Path) -> Iterator[str]:
    """The texts of a source, one by one and never empty; a .txt file comes in blocks that end at a line's end.

    Raises UserError, when reached, for a missing, empty, binary or malformed file, with file and line.
    """
    if str(source) == "builtin":
        yield from _builtin()
    elif _is_hub(source):
        yield from _from_hub(str(source))
    else:
        for path in _files(Path(source).expanduser()):
            yield from _READERS[path.suffix.lower()](path)


# --- tokens ---------------------------------------------------------------------------------------------------------


def _first_token(tokenizer: Any) -> Tensor:
    """int64 (0,) or (1,): what the tokenizer puts before a text of its own accord."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("text")["input_ids"]
    return torch.tensor([bos] if bos is not None and ids and ids[0] == bos else [], dtype=torch.int64)


def _tokenize(tokenizer: Any, texts: list[str]) -> Tensor:
    """int64 (T,): the tokens of all texts in one row, without special tokens of the tokenizer's own."""
    pieces: list[str] = []
    waiting: list[str] = []
    size = 0
    for text in texts:
        waiting.append(text)
        size += len(text)
        if size >= _PIECE:
            pieces.append("".join(waiting))
            waiting, size = [], 0
    if waiting:
        pieces.append("".join(waiting))
    ids = [torch.tensor(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]) for piece in pieces]
    return torch.cat(ids).to(torch.int64) if ids else torch.zeros(0, dtype=torch.int64)


def _thinned(texts: Iterator[str], most: int, whole: bool) -> list[str]:
    """At most about ``most`` characters in bounded memory: every 1st, 2nd, 4th, 8th … text, as many as fit; or, unless
    the ``whole`` source is to be read, the first ones."""
    kept: list[str] = []
    stride, size = 1, 0
    for number, text in enumerate(_in_blocks(texts)):
        if number % stride:
            continue
        kept.append(text)
        size += len(text)
        if size > most and not whole:
            break
        while size > most and len(kept) > 1:
            kept, stride = kept[::2], 2 * stride
            size = sum(map(len, kept))
    return kept


def _in_blocks(texts: Iterator[str], size: int = 10_000) -> Iterator[str]:
    """The same texts in parts of about ``size`` characters that join again without a seam: long texts are cut at a
    line's end or at white space, and a blank line parts a text from one before it that does not end its line."""
    seam = ""
    for text in texts:
        start, ends_line = 0, text.endswith("\n")
        text = seam + text
        seam = "" if ends_line else "\n\n"
        while len(text) - start > 2 * size:
            cut = next((m for p in (_LINE_END, _SPACE) if (m := p.search(text, start + size, start + 2 * size))), None)
            end = cut.end() if cut else start + size
            yield text[start:end]
            start = end
        yield text[start:]


# --- sources --------------------------------------------------------------------------------------------------------


def _is_hub(source: str | Path) -> bool:
    """An id such as ``owner/name`` or ``owner/name:config``, where no such file or folder exists."""
    text = str(source)
    looks_like_file = Path(text).suffix.lower() in _READERS or text.startswith((".", "/", "~"))
    return (
        text != "builtin"
        and isinstance(source, str)
        and not looks_like_file
        and not Path(text).exists()
        and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", text) is not None
    )


def _files(path: Path) -> list[Path]:
    known = ", ".join(_READERS)
    if not path.exists():
        raise UserError(f"there is no text at {path}", expected="'builtin', a file, a folder, or a hub id owner/name")
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in _READERS)
        if not found:
            raise UserError(f"the folder {path} holds no text that can be read", expected=f"files ending in {known}")
        return found
    if path.suffix.lower() not in _READERS:
        raise UserError(
            f"cannot read text from {path}", expected=f"a file ending in {known}", got=path.suffix or "no ending"
        )
    return [path]


def _from_txt(path: Path) -> Iterator[str]:
    rest, some = "", False
    try:
        with path.open(encoding="utf-8-sig") as file:
            while block := file.read(_PIECE):
                if "\0" in block:
                    raise UserError(f"{path} is not text", got="a binary file (it holds NUL bytes)")
                block = rest + block
                end = block.rfind("\n") + 1
                rest = block[end:]
                if block[:end].strip():
                    some = True
                    yield block[:end]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text", expected="UTF-8", got=str(error),
                        remedy="convert it, for example with iconv -t utf-8") from None  # fmt: skip
    if rest.strip():
        some = True
        yield rest
    if not some:
        raise UserError(f"{path} is empty")


def _from_jsonl(path: Path) -> Iterator[str]:
    some, number = False, 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                some = True
                text = _text_of_line(line, f"{path}:{number}")
                if text.strip():
                    yield text
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number + 1}: not text", expected="UTF-8", got=str(error)) from None
    if not some:
        raise UserError(f"{path} is empty")


def _text_of_line(line: str, place: str) -> str:
    wanted = 'an object with "text" or "content"'
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not a line of JSON", expected=wanted, got=str(error)) from None
    for name in TEXT_FIELDS:
        if isinstance(record, dict) and isinstance(record.get(name), str):
            return record[name]
    got = "the keys " + ", ".join(record) if isinstance(record, dict) else type(record).__name__
    raise UserError(f"{place}: a line without text", expected=wanted, got=got)


def _from_parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise _needs_data_extra(f"reading {path}") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        name = _text_column(file.schema_arrow.names, str(path))
        some = False
        for batch in file.iter_batches(batch_size=256, columns=[name]):
            for text in batch.column(0).to_pylist():
                if isinstance(text, str) and text.strip():
                    some = True
                    yield text
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a parquet file", got=str(error)) from None
    if not some:
        raise UserError(f"{path} is empty", expected=f"text in the column {name}")


def _text_column(names: list[str], where: str) -> str:
    for name in TEXT_FIELDS:
        if name in names:
            return name
    raise UserError(f"{where} has no column of text", expected=" or ".join(TEXT_FIELDS), got=", ".join(names))


_READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _from_txt,
    ".jsonl": _from_jsonl,
    ".parquet": _from_parquet,
}


def _from_hub(name: str) -> Iterator[str]:
    """The training split, streamed; ``owner/name:config`` picks a configuration."""
    try:
        import datasets
    except ImportError:
        raise _needs_data_extra(f"the data set {name}") from None
    owner, _, config = name.partition(":")
    some = False
    try:
        for row in datasets.load_dataset(owner, config or None, split="train", streaming=True):
            text = row[_text_column(list(row), name)]
            if isinstance(text, str) and text.strip():
                some = True
                yield text
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"cannot read the data set {name!r} from the Hugging Face hub, and there is no such file here",
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            remedy="check the name (owner/name or owner/name:config) and the connection, or give a file of text",
        ) from None
    if not some:
        raise UserError(f"the data set {name!r} holds no text")


def _needs_data_extra(what: str) -> UserError:
    return UserError(f"{what} needs packages that are not installed", remedy="pip install 'moecompress[data]'")


# --- the text that comes with Python --------------------------------------------------------------------------------


def _builtin() -> Iterator[str]:
    """Prose that every CPython carries: its language reference as ``help()`` shows it, and docstrings of its library.

    At least 400,000 characters of English, without code and grammar, in a fixed order; it differs a little between
    versions of Python. It is about Python and nothing else: good for a first run without a network, while text like
    the model's own use gives better statistics.
    """
    from pydoc_data.topics import topics

    for name in sorted(topics):
        if prose := _prose(topics[name]):
            yield prose
    for name in _BUILTIN_MODULES.split():
        yield from _docstrings(name)


def _docstrings(module: str) -> Iterator[str]:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return  # a module that this version of Python does not have, or has in C
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            prose = _prose(ast.get_docstring(node) or "")
            if len(prose) >= 200:
                yield prose


def _prose(text: str) -> str:
    """The paragraphs that read like sentences, each on one line."""
    joined = re.sub(r"(?<=\w-)\n\s*(?=\w)", "", text)  # words broken at their hyphens
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", joined))
    return "\n\n".join(part for part in paragraphs if _is_prose(part))


def _is_prose(paragraph: str) -> bool:
    plain = sum(character.isalpha() or character in " ,.'" for character in paragraph)
    return len(paragraph) >= 60 and plain >= 0.9 * len(paragraph) and "::=" not in paragraph and ">>>" not in paragraph
