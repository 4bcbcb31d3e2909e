"""Learned pruning of a token's experts (OTP of MC#, arXiv 2510.10962): the module that says how many of them to keep.

It sees what the experts are given and the combine weights, and chooses one of k masks: keep the c experts of largest weight,
c = 1 … k. Trained by route/otp.py, stored in a file of its own beside the shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from moecompress.errors import UserError
from moecompress.model.checkpoint import read_entry, read_header, sha256_file, write_shard
from moecompress.runtime.vectors import Vectors

#: Stands beside config.json, and is copied with the tokenizer's files (model/checkpoint.py).
FILE = "moecompress_routing.safetensors"
#: What the mask that keeps all starts ahead of the others by.
HEAD_START = 1.0


class Pruner(nn.Module):
    """One layer's: a linear map from d normalised inputs and k ordered weights to k masks. ``weight`` [k, d + k], ``bias`` [k].

    MC# has a small module on the same two inputs whose size it does not say; one matrix is the smallest there is.
    """

    def __init__(self, hidden: int, top_k: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(top_k, hidden + top_k))
        self.bias = nn.Parameter(HEAD_START * (torch.arange(top_k) == top_k - 1).float())

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Pruner:
        weight = tensors["weight"]
        found = cls(weight.shape[1] - weight.shape[0], weight.shape[0])
        found.load_state_dict(tensors)
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """As they are stored."""
        return {name: value.detach().float().cpu() for name, value in self.state_dict().items()}

    def forward(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden [T, d], weights [T, k] in any order -> [T, k] float32: column c − 1 for keeping c experts."""
        x = hidden.float()
        x = x * (x.square().mean(-1, keepdim=True) + 1e-12).rsqrt() * x.shape[-1] ** -0.5  # length 1
        ordered = weights.float().sort(dim=-1, descending=True).values
        ordered = ordered / ordered.sum(-1, keepdim=True).clamp_min(1e-20)
        return torch.nn.functional.linear(torch.cat([x, ordered], dim=-1), self.weight, self.bias)


def write(folder: Path, learned: Mapping[str, Pruner | Vectors]) -> str:
    """Write the file (experts module -> its pruner, or vectors) into ``folder``; returns its sha256."""
    tensors = {f"{name}.{key}": value for name, one in learned.items() for key, value in one.tensors().items()}
    write_shard(folder / FILE, tensors)
    return sha256_file(folder / FILE)


def read(folder: Path, digest: str | None, kind: type[Pruner] | type[Vectors] = Pruner) -> dict[str, Pruner | Vectors]:
    """The inverse. ``digest``: the sha256 that config.json has of the file. ``kind``: of what is in it. UserError if it is missing
    or another one."""
    path = folder / FILE
    if not path.exists():
        raise UserError(f"File {FILE} is missing from {folder}", expected="what the policy learned, which config.json names",
                        remedy="copy it from the folder that tune-routing or quantize wrote (save_pretrained leaves it out)")  # fmt: skip
    found = sha256_file(path)
    if found != digest:
        raise UserError(f"{path} does not belong to the policy in config.json", expected=f"sha256 {str(digest)[:16]}…", got=f"{found[:16]}…",
                        remedy="copy both files from one folder")  # fmt: skip
    entries = read_header(path)
    learned: dict[str, Pruner | Vectors] = {}
    with torch.device("cpu"):  # transformers reads a policy while it builds models on the meta device
        for name in sorted({entry.rpartition(".")[0] for entry in entries}):
            own = {key.removeprefix(f"{name}."): read_entry(entry) for key, entry in entries.items() if key.rpartition(".")[0] == name}
            learned[name] = kind.from_tensors(own).requires_grad_(False)
    return learned
