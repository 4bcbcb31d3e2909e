"""Turn a weightless model into one that computes on packed weights, and check the files it will be filled from."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moecompress.errors import UserError
from moecompress.model.anatomy import rehearse
from moecompress.model.checkpoint import read_config, read_header, sha256_file
from moecompress.model.experts import find_experts, resolve
from moecompress.model.skeleton import Loader
from moecompress.model.switch import adapt
from moecompress.pack import nested
from moecompress.pack.scheme import NESTED, Scheme
from moecompress.runtime import seam
from moecompress.runtime.bank import IntegerBank, unused_planes
from moecompress.runtime.graft import graft, sprout
from moecompress.runtime.packed import PackedExperts, PackedLinear, pack_experts_in_place
from moecompress.runtime.registration import METHOD, MoecompressConfig
from moecompress.runtime.skipping import KEY, apply, read_policy

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
    if config.load_bits is not None:
        leave_out(model, config.experts, config.load_bits)
    adapt(model)
    model.config._is_quantized = True  # as in from_pretrained: Jamba rounds differently then
    if config.fewer:
        thin_out(model, config.fewer)
    known = {name for name, _ in find_experts(model)}
    for name, contents in config.experts.items():
        name = resolve(model, name)
        if name not in known:
            raise UserError(f"config.json says that {name} holds packed experts", expected=", ".join(sorted(known)) or "experts in the model",
                            got=type(model.get_submodule(name)).__name__, remedy="copy or compress the folder again")  # fmt: skip
        module: Any = model.get_submodule(name)
        pack_experts_in_place(module, contents, dtype, config.rotation_seed, config.load_bits)
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


def thin_out(model: Any, fewer: dict[str, Any]) -> None:
    """Give layers of a (weightless) model fewer experts. fewer: as in `MoecompressConfig`."""
    sources = {count: sprout(model, fewer["keys"], count) for count in set(fewer["experts"].values())}
    for name, count in fewer["experts"].items():
        graft(model, resolve(model, name), sources[count])


def leave_out(model: Any, experts: dict[str, dict[str, dict[str, int]]], load_bits: int) -> None:
    """Let the loader pass over what ``load_bits`` bits of nested integers do not need. UserError for other numbers of bits."""
    schemes = _nested(name for contents in experts.values() for banks in contents.values() for name in banks)
    known = nested.widths(int(max((scheme.bits for scheme in schemes), default=0)))
    if load_bits not in known:
        raise UserError(f"This model cannot be loaded at {load_bits} bits", expected=", ".join(map(str, known)) or "no number of bits",
                        got=load_bits, remedy="choose one of these, or load all bits" if known else "leave --load-bits out: none of its matrices "
                        "is nested (a candidate {code: nested, bits: 4} of the recipe makes such)")  # fmt: skip
    unused = [rf"_banks\.{scheme.name}\.{plane}$" for scheme in schemes for plane in unused_planes(scheme, load_bits)]
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *unused}


def _nested(names: Iterable[str]) -> list[Scheme]:
    return [scheme for scheme in map(Scheme.parse, sorted(set(names))) if scheme.code == NESTED]


def to_store(model: Any) -> dict[str, torch.Tensor] | None:
    """The tensors that `save_pretrained` shall write, None for those in memory. Tells the model's config what they are.

    Nested integers with all their bits go back to planes. Loaded at fewer bits, they are written as the ordinary integers
    they have become, in one bank with the matrices that have this scheme anyway.
    """
    became = {f"{name}.{projection}_banks.{key}": (Scheme.parse(key), bank)
              for name, module in model.named_modules() if isinstance(module, PackedExperts)
              for projection in module.contents for key, bank in module.banks(projection).items()
              if isinstance(bank, IntegerBank) and bank.scheme.name != key}  # fmt: skip
    if not became:
        return None
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        where, _, leaf = name.rpartition(".")
        if where in became and leaf == "rest":
            continue  # a part of the codes (SplitIntegers)
        parts = {leaf: tensor}
        if where in became:
            scheme, bank = became[where]
            if bank.scheme.bits < scheme.bits:
                where = where.removesuffix(scheme.name) + bank.scheme.name
            elif leaf == "codes":
                whole = nested.from_integers(bank.bank())
                parts = {"codes": whole.codes, **whole.planes}
        for leaf, part in parts.items():
            there = tensors.get(f"{where}.{leaf}")
            tensors[f"{where}.{leaf}"] = part if there is None else torch.cat([there, part])
    renamed = {scheme.name: bank.scheme.name for scheme, bank in became.values() if bank.scheme.bits < scheme.bits}
    if renamed and (getattr(model.config, KEY, None) or {}).get("policy") == "dynamic-bits":
        delattr(model.config, KEY)  # of ordinary integers it could leave nothing out
    config = model.config.quantization_config
    for contents in config.experts.values():
        for projection, banks in contents.items():
            counts: Counter[str] = Counter()
            for name, count in banks.items():
                counts[renamed.get(name, name)] += count
            contents[projection] = dict(counts)
    return tensors


def is_packed(folder: Path) -> bool:
    return (read_config(folder).get("quantization_config") or {}).get("quant_method") == METHOD


def prepare(folder: Path, skipping: bool = True, load_bits: int | None = None) -> Callable[[PreTrainedModel], None] | None:
    """For `OpenModel`: what to do to the skeleton of this folder (None: nothing; the checkpoint is an ordinary one).
    ``skipping`` False: wake all chosen experts, whatever policy the folder has. ``load_bits``: see `load`."""
    settings, policy = read_config(folder).get("quantization_config") or {}, read_policy(folder) if skipping else None
    packed = is_packed(folder)
    if not packed and load_bits is not None:
        raise _not_packed(folder)
    if not packed and (settings or policy is None):
        return None

    def change(model: PreTrainedModel) -> None:
        if packed:
            install(model, MoecompressConfig(**settings | {"load_bits": load_bits}))
        if policy is not None:
            apply(model, policy)

    return change


def load(folder: Path, dtype: str | torch.dtype = "auto", trust_remote_code: bool = False, load_bits: int | None = None
         ) -> PreTrainedModel:  # fmt: skip
    """The model of a folder, compressed or not, ready to generate; weights stay packed. ``load_bits``: how many bits of
    nested integers (None: all); UserError if the folder cannot be loaded so."""
    from transformers import AutoModelForCausalLM

    from moecompress.model.skeleton import architecture, load_config, quiet_transformers

    if load_bits is not None and not is_packed(folder):
        raise _not_packed(folder)
    chosen = {} if load_bits is None else {"quantization_config": MoecompressConfig(load_bits=load_bits)}
    with quiet_transformers(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        found = architecture(load_config(folder, trust_remote_code)) or AutoModelForCausalLM
        model = found.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code, **chosen).eval()
    if not is_packed(folder) and (policy := read_policy(folder)) is not None:  # packed: from_pretrained applied it
        apply(model, policy)
    return model


def _not_packed(folder: Path) -> UserError:
    return UserError(f"{folder} cannot be loaded at fewer bits", expected="a folder made by `moecompress quantize` from nested candidates",
                     got="an ordinary checkpoint", remedy="leave --load-bits out")  # fmt: skip


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
