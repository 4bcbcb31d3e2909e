"""Output error of single matrices: trellis against integers with GPTQ, on feed-forward matrices of SmolLM2-135M-Instruct.

    python tests/benchmarks/layers.py --text wikitext.txt [--rates 1 1.5 2 2.5] [--json]

Relative output error tr(ΔW H ΔWᵀ) / tr(W H Wᵀ), with H from tokens that the codes were not chosen on. Gate and up: the first 128
rows; down: the first 128 columns of the weights, as an expert of 128 neurons would have them. Sizes are exact.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from moecompress.calibrate.data import token_batches
from moecompress.convert.smollm2 import load_smollm2
from moecompress.pack.scheme import Scheme
from moecompress.quantize.encode import Settings, encode, study
from moecompress.runtime.bank import make_bank

LAYERS, NEURONS, TOKENS, LENGTH = (3, 14, 25), 128, 4096, 512
INTEGERS = ("b2g64a", "b3g64a")


def matrices(cache: Path, text: str) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Name -> weight [o, i], Hessian to choose codes by, Hessian of other tokens."""
    model, tokenizer = load_smollm2(cache)
    ids = token_batches(tokenizer, text, 2 * TOKENS // LENGTH, LENGTH, 0).ids
    seen: dict[str, list[torch.Tensor]] = {}
    for layer in LAYERS:
        for name in ("gate_proj", "down_proj"):
            module = model.get_submodule(f"model.layers.{layer}.mlp.{name}")
            where = seen.setdefault(f"{layer} {name}", [])
            module.register_forward_pre_hook(lambda _m, args, where=where: where.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in ids.split(4):
            model(batch)
    found = {}
    for layer in LAYERS:
        for name in ("gate", "up", "down"):
            x = torch.cat(seen[f"{layer} {'down' if name == 'down' else 'gate'}_proj"])
            weight = model.get_submodule(f"model.layers.{layer}.mlp.{name}_proj").weight.detach()
            x, weight = (x[:, :NEURONS], weight[:, :NEURONS]) if name == "down" else (x, weight[:NEURONS])
            first, second = x[:TOKENS], x[TOKENS:]
            found[f"{layer} {name}"] = (weight.contiguous(), first.T @ first / len(first), second.T @ second / len(second))
    return found


def measure(weight: torch.Tensor, hessian: torch.Tensor, other: torch.Tensor, scheme: Scheme) -> tuple[float, float]:
    """Relative output error on the other tokens, and stored bits a weight."""
    settings = Settings(refine=0) if scheme.code == "int" else Settings()
    encoded = encode(weight[None], study(hessian[None], ["matrix"], settings, [scheme]), scheme, settings)
    bank = make_bank(scheme, 1, *weight.shape, torch.bfloat16)
    for name, tensor in encoded.bank.tensors().items():
        getattr(bank, name).copy_(tensor)
    off = weight - bank.dequantized(torch.float32)[0]
    error = float(((off @ other) * off).sum() / ((weight @ other) * weight).sum())
    return error, 8 * scheme.price(*weight.shape) / weight.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 1.5, 2, 2.5])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    schemes = [*map(Scheme.parse, INTEGERS), *(Scheme(rate, code="trellis") for rate in given.rates)]
    with tempfile.TemporaryDirectory() as folder:
        found = matrices(Path(folder), given.text)
    rows = {name: {s.name: measure(*parts, s) for s in schemes} for name, parts in found.items()}
    if given.json:
        print(json.dumps(rows))
        return
    sizes = next(iter(rows.values()))
    print("matrix   " + "".join(f"{name:>8} ({size:.2f})" for name, (_, size) in sizes.items()))
    for name, row in rows.items():
        print(f"{name:9}" + "".join(f"{error:15.4f}" for error, _ in row.values()))


if __name__ == "__main__":
    main()
