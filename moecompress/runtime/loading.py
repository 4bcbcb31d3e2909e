"""Turn a weightless model into one that computes on packed weights, and check the files it will be filled from."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moecompress.errors import UserError
from moecompress.model.anatomy import rehearse
from moecompress.model.checkpoint import read_config, read_header, sha256_file
from moecompress.model.experts import resolve
from moecompress.model.skeleton import Loader
from moecompress.pack.scheme import Scheme
from moecompress.runtime import seam
from moecompress.runtime.packed import PackedLinear, pack_experts_in_place
from moecompress.runtime.registration import METHOD, MoecompressConfig
from moecompress.runtime.skipping import apply, read_policy

RECORDS = "moecompress"  # folder inside the checkpoint: manifest, plan, recipe


def check_files(model: PreTrainedModel, files: list[Path], verify: bool) -> None:
    """Every tensor that the (installed) model needs is there, in the right shape; with ``verify``, no byte changed."""
    if not files:
        return
    if verify:
        verify_files(files[0].parent)
    entries = {name: entry for file in files for name, entry in read_header(file).items()}
    rehearse(entries, model, Loader(model))


def install(model: nn.Module, config: MoecompressConfig) -> None:
    """Replace experts and linear layers of a (weightless) model by packed ones, and switch the experts seam on."""
    dtype = getattr(torch, config.dtype)
    model.config._is_quantized = True  # as in from_pretrained: Jamba rounds differently then
    for name, contents in config.experts.items():
        name = resolve(model, name)
        module: Any = model.get_submodule(name)
        pack_experts_in_place(module, contents, dtype, config.rotation_seed)
        # Some families initialise the experts from the block around them, and would miss the weights that went.
        model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True
        module.config._experts_implementation = seam.NAME
    for scheme, names in config.linears.items():
        for name in names:
            name = resolve(model, name)
            old: Any = model.get_submodule(name)
            new = PackedLinear(Scheme.parse(scheme), old.out_features, old.in_features, old.bias is not None, dtype)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)


def is_packed(folder: Path) -> bool:
    return (read_config(folder).get("quantization_config") or {}).get("quant_method") == METHOD


def prepare(folder: Path, skipping: bool = True) -> Callable[[PreTrainedModel], None] | None:
    """For `OpenModel`: what to do to the skeleton of this folder (None: nothing; the checkpoint is an ordinary one).
    ``skipping`` False: wake all chosen experts, whatever policy the folder has."""
    settings, policy = read_config(folder).get("quantization_config") or {}, read_policy(folder) if skipping else None
    packed = is_packed(folder)
    if not packed and (settings or policy is None):
        return None

    def change(model: PreTrainedModel) -> None:
        if packed:
            install(model, MoecompressConfig(**settings))
        if policy is not None:
            apply(model, policy)

    return change


def load(folder: Path, dtype: str | torch.dtype = "auto", trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder, compressed or not, ready to generate; weights stay packed."""
    from transformers import AutoModelForCausalLM

    from moecompress.model.skeleton import architecture, load_config, quiet_transformers

    with quiet_transformers():
        found = architecture(load_config(folder, trust_remote_code)) or AutoModelForCausalLM
        model = found.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    if not is_packed(folder) and (policy := read_policy(folder)) is not None:  # packed: from_pretrained applied it
        apply(model, policy)
    return model


def verify_files(folder: Path) -> None:
    """Compare every file that the manifest lists with its sha256. A folder without a manifest (saved again) passes."""
    path = folder / RECORDS / "manifest.json"
    if not path.exists():
        return
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError):
        raise UserError(f"{path} is damaged", remedy="copy or compress the folder again") from None
    for name in listed:
        if not (folder / name).exists():
            raise UserError(f"File {name} is missing from {folder}", expected="every file of the manifest",
                            remedy="copy or compress the folder again")  # fmt: skip
    with ThreadPoolExecutor() as pool:
        found = dict(zip(listed, pool.map(lambda name: sha256_file(folder / name), listed), strict=True))
    for name, digest in found.items():
        if digest != listed[name]:
            raise UserError(f"File {name} of {folder} is corrupt", expected=f"sha256 {listed[name][:16]}…",
                            got=f"{digest[:16]}…", remedy="copy or compress the folder again")  # fmt: skip


seam.register()
