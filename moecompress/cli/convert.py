"""``moecompress convert``: a dense model → a Mixture-of-Experts checkpoint."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moecompress.errors import UserError
from moecompress.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHE = Path.home() / ".cache" / "moecompress"
LENGTH = 512  # tokens of a calibration sequence

MODEL = Annotated[
    str, typer.Argument(help="Folder or hub id of a dense llama, mistral, qwen2 or qwen3 model; or `smollm2`, fetched.")
]
OUTPUT = Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must be new or empty.")]
METHOD = Annotated[
    str,
    typer.Option(help="cmoe: split the neurons into experts. mote: keep the block, add copies of it to train. read-me: an expert for every "
                 "kind of text."),
]  # fmt: skip
EXPERTS = Annotated[int | None, typer.Option(help="cmoe and mote: routed experts of a layer. Default: 16, with mote 4.")]
WEIGHT = Annotated[float | None, typer.Option(help="mote: combine weight that a chosen expert starts with. Default: 0.3.")]
TOP_K = Annotated[int | None, typer.Option(help="Experts that compute for a token. Default: 75 % of the neurons.")]
SHARED = Annotated[int | None, typer.Option(help="Neurons that compute for every token. Default: about a third.")]
DOMAINS = Annotated[int | None, typer.Option(help="read-me: cut one text into this many kinds, by k-means of hidden states.")]
SHARE = Annotated[float | None, typer.Option(help="read-me: share of the neurons that compute for a kind of text. Default: 0.5.")]
TEXT = Annotated[
    list[str] | None,
    typer.Option(help="Calibration text: `builtin`, a .txt, .jsonl or .parquet file, folder, hub id. read-me: give one for every domain."),
]
SEQUENCES = Annotated[int, typer.Option(min=1, help=f"Calibration sequences of {LENGTH} tokens, of each text.")]
SEED = Annotated[int, typer.Option(help="Seed of the text's places and of the clustering.")]
JSON = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def command(
    model: MODEL,
    output: OUTPUT,
    method: METHOD = "cmoe",
    experts: EXPERTS = None,
    top_k: TOP_K = None,
    shared: SHARED = None,
    weight: WEIGHT = None,
    domains: DOMAINS = None,
    share: SHARE = None,
    text: TEXT = None,
    sequences: SEQUENCES = 32,
    seed: SEED = 0,
    as_json: JSON = False,
) -> None:
    """Turn a dense model into a Mixture of Experts.

    cmoe, without training: each feed-forward layer becomes a shared part and experts of neurons that fire together, with a fitted
    router. All weights are kept: it computes less for a token, and it is a Mixture of Experts to try the other commands on.

    mote, before training: each feed-forward layer becomes the shared expert, and copies of it routed experts of a small weight,
    one of them active. Train these with `distill --train experts+router --qat ternary` and quantize the result (recipes/mote.yaml).

    read-me, without training: each domain's text keeps the neurons that it uses most, half of them; what all keep is the shared
    expert, what else a domain keeps its routed expert, one of them active. Give a --text for every domain, or --domains to find them.

    The result is an ordinary transformers checkpoint (glm4_moe, bfloat16).

    Examples:

    `moecompress convert smollm2 -o demo-moe`

    `moecompress convert ./dense -o ./moe --experts 8 --top-k 5 --shared 512 --text corpus.txt`

    `moecompress convert ./dense -o ./upcycled --method mote --experts 4`

    `moecompress convert ./dense -o ./domains --method read-me --text news.txt --text code.txt --text letters.txt`

    `moecompress convert ./dense -o ./domains --method read-me --domains 4 --text corpus.txt --sequences 128`
    """
    refuse_unused(method, {
        "--experts": (experts, ("cmoe", "mote")), "--top-k": (top_k, ("cmoe",)), "--shared": (shared, ("cmoe",)), "--weight": (weight, ("mote",)),
        "--domains": (domains, ("read-me",)), "--share": (share, ("read-me",)),
    })  # fmt: skip
    texts = text or ["builtin"]
    refuse_texts(method, texts, domains)
    refuse_existing(output)
    started = time.monotonic()
    dense, tokenizer = load_dense(model)

    def convert(folder: Path) -> dict[str, Any]:
        if method == "mote":
            from moecompress.convert.mote import WEIGHT, upcycle

            return upcycle(dense, folder, tokenizer, experts=experts or 4, weight=WEIGHT if weight is None else weight, seed=seed)
        if method == "read-me":
            return by_domain(dense, folder, tokenizer, texts, domains, 0.5 if share is None else share, sequences, seed) | {"text": texts}
        return split(dense, folder, tokenizer, experts or 16, top_k, shared, texts[0], sequences, seed) | {"text": texts[0]}

    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, so that it appears under its name in one step, complete or not at all.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        unfinished = Path(folder) / "checkpoint"
        report = convert(unfinished)
        if output.exists():
            output.rmdir()  # empty, or it would have been refused
        os.replace(unfinished, output)
    report |= {"model": model, "method": method, "output": str(output), "seconds": round(time.monotonic() - started, 1)}
    if as_json:
        print(json.dumps(report))
    else:
        say(summary(report))


def split(dense: PreTrainedModel, folder: Path, tokenizer: Any, experts: int, top_k: int | None, shared: int | None, text: str,
          sequences: int, seed: int) -> dict[str, Any]:  # fmt: skip
    """CMoE: see convert_dense."""
    from moecompress.calibrate.data import token_batches
    from moecompress.convert.dense import check_shape, convert_dense, default_shape

    if shared is None or top_k is None:
        usual = default_shape(dense, experts, shared)
        shared = usual.shared if shared is None else shared
        top_k = usual.top_k if top_k is None else top_k
    check_shape(dense, experts, top_k, shared)
    ids = token_batches(tokenizer, text, sequences, LENGTH, seed).ids
    return convert_dense(dense, ids, folder, tokenizer, experts=experts, top_k=top_k, shared=shared, seed=seed)


def by_domain(dense: PreTrainedModel, folder: Path, tokenizer: Any, texts: list[str], domains: int | None, share: float, sequences: int,
              seed: int) -> dict[str, Any]:  # fmt: skip
    """Read-ME: see convert_read_me."""
    from moecompress.calibrate.data import token_batches
    from moecompress.convert.dense import check_dense
    from moecompress.convert.read_me import cluster, convert_read_me

    check_dense(dense)
    ids = [token_batches(tokenizer, text, sequences, LENGTH, seed).ids for text in texts]
    return convert_read_me(dense, ids if domains is None else cluster(dense, ids[0], domains, seed), folder, tokenizer, share=share)


def refuse_texts(method: str, texts: list[str], domains: int | None) -> None:
    if method != "read-me" and len(texts) > 1:
        raise UserError(f"--method {method} takes one text", expected="one --text", got=len(texts), remedy="put the files into a folder, and give that")
    if method == "read-me" and (len(texts) == 1) == (domains is None):
        raise UserError("read-me needs domains", expected="a --text for every domain, or one --text and --domains",
                        got=f"{len(texts)} texts and " + ("no number of domains" if domains is None else f"--domains {domains}"))  # fmt: skip


def refuse_unused(method: str, options: dict[str, tuple[Any, tuple[str, ...]]]) -> None:
    """options: name -> (value, the methods that have it)."""
    if method not in ("cmoe", "mote", "read-me"):
        raise UserError("Unknown method", expected="cmoe, mote or read-me", got=method, remedy="pass one of them to --method")
    given = [name for name, (value, methods) in options.items() if value is not None and method not in methods]
    if given:
        raise UserError(f"{' and '.join(given)} cannot be given with --method {method}", expected="options of this method",
                        remedy="leave them out; moecompress convert --help says which are whose")  # fmt: skip


def refuse_existing(output: Path) -> None:
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise UserError(f"{output} exists", expected="a new or empty folder",
                        remedy="choose another --output or remove it")  # fmt: skip


def load_dense(model: str) -> tuple[PreTrainedModel, Any]:
    """(model in float32, tokenizer) of a folder, a hub id or the word ``smollm2``."""
    from moecompress.convert.smollm2 import load_smollm2

    if model == "smollm2" and not Path(model).exists():
        return load_smollm2(CACHE)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from moecompress.convert.dense import check_family

    try:
        check_family(AutoConfig.from_pretrained(model))  # before gigabytes are read
        dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        return dense, AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load {model!r}",
            expected="a folder or hub id of a transformers model with its tokenizer, or 'smollm2'",
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
        ) from None


def summary(report: dict[str, Any]) -> str:
    if report["method"] == "mote":
        return (
            f"{report['output']}: {len(report['layers'])} layers, each the dense block of {report['shared_width']} neurons as shared expert "
            f"and {report['experts']} copies as routed experts, top-1, of weight {report['weight']:g}\n"
            f"  to be trained: moecompress distill {report['output']} --teacher {report['model']} -o OUT --train experts+router "
            f"--qat ternary --cross-entropy 1 --kd-share 0 --balance 0.01 --text TEXT"
        )
    if report["method"] == "read-me":
        return summary_of_domains(report)
    error = sum(layer["error"] for layer in report["layers"]) / len(report["layers"])
    return (
        f"{report['output']}: {len(report['layers'])} layers, each {report['shared_width']} shared neurons and "
        f"{report['experts']} experts of {report['expert_width']}, top-{report['top_k']}\n"
        f"  {report['active_fraction']:.1%} of the feed-forward neurons compute for a token; "
        f"{report['routed_fraction']:.1%} of them are routed\n"
        f"  an expert serves {report['least_used_share']:.1%} to {report['most_used_share']:.1%} of the tokens\n"
        f"  mean relative error of a layer {error:.4f}; {report['seconds']:.0f} s"
    )


def summary_of_domains(report: dict[str, Any]) -> str:
    found, layers = report["perplexity"], report["layers"]
    error, right = (sum(layer[key] for layer in layers) / len(layers) for key in ("error", "right_domain"))
    each = ", ".join(f"{row['dense']:.2f} → {row['moe']:.2f}" for row in found["domains"])
    return (
        f"{report['output']}: {len(layers)} layers, each {report['shared_width']} shared neurons and {report['experts']} experts of "
        f"{report['expert_width']}, top-1\n"
        f"  {report['active_fraction']:.1%} of the dense model's {report['dense_width']} neurons compute for a token, {report['stored_fraction']:.1%} are "
        f"stored, copies counted; all domains keep {report['common_fraction']:.1%}, {report['lost_fraction']:.1%} are lost\n"
        f"  routers choose the expert of the text's domain for {right:.1%} of the tokens\n"
        f"  perplexity on held-out text {found['dense']:.2f} → {found['moe']:.2f} ({each})\n"
        f"  mean relative error of a layer {error:.4f}; {report['seconds']:.0f} s"
    )
