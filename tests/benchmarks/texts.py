"""What tables of methods have in common: their options, the texts, and the original on the one that nothing was fitted to."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def parser(description: str | None, methods: list[str], evaluate: int) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", type=Path, required=True)
    found.add_argument("--calibration", required=True)
    found.add_argument("--evaluation", required=True)
    found.add_argument("--only", nargs="+", default=methods)
    found.add_argument("--sequences", type=int, default=64)
    found.add_argument("--evaluate", type=int, default=evaluate, help="evaluation sequences")
    found.add_argument("--length", type=int, default=512)
    found.add_argument("--json", action="store_true")
    return found


def read(given: argparse.Namespace):
    """(calibration text with 4 held-out sequences, unseen sequences [1, L] each, the original's trace on these)."""
    from moecompress.calibrate.data import token_batches
    from moecompress.evaluate.divergence import trace
    from moecompress.model.skeleton import load_tokenizer
    from moecompress.model.walk import OpenModel

    tokenizer = load_tokenizer(given.model)
    tokens = token_batches(tokenizer, given.calibration, given.sequences + 4, given.length)
    unseen = list(token_batches(tokenizer, given.evaluation, given.evaluate, given.length).ids.split(1))
    return tokens, unseen, trace(OpenModel(given.model, torch.float32), unseen, "original on unseen text")
