"""Ordinary safetensors under the names of the original checkpoint: any tool that loads the original loads this."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moecompress.errors import UserError
from moecompress.job import refuse_target, work_folder
from moecompress.model.checkpoint import copy_companions, give_name, read_config, write_index, write_shard, write_text
from moecompress.model.experts import parameters_from
from moecompress.model.skeleton import build_skeleton, load_config, stored_names
from moecompress.model.walk import OpenModel
from moecompress.progress import track
from moecompress.runtime.loading import is_packed, prepare, verify_files
from moecompress.runtime.packed import PackedExperts, PackedLinear
from moecompress.runtime.pruner import FILE
from moecompress.runtime.skipping import KEY

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export(model: Path, output: Path, dtype: str, load_bits: int | None = None) -> dict[str, Any]:
    """Dequantize ``model`` (a folder of `moecompress quantize`) into ``output``, one decoder layer at a time. ``load_bits``: of
    nested integers (None: all)."""
    if dtype not in DTYPES:
        raise UserError(f"Unknown dtype {dtype!r}", expected=", ".join(DTYPES))
    refuse_target(output)
    if not is_packed(model):
        raise UserError(f"{model} is not a compressed folder", expected="quant_method moecompress in config.json",
                        remedy="pass a folder made by `moecompress quantize`")  # fmt: skip
    fewer = read_config(model)["quantization_config"].get("fewer")
    if fewer:
        counts = sorted(set(fewer["experts"].values()))
        raise UserError(f"Layers of {model} keep different numbers of experts", expected="one number, which a plain checkpoint's "
                        "config can say", got=f"{counts[0]} to {counts[-1]}, or all", remedy="use the compressed folder; or compress with "
                        "allocate.drop=false, after a transform step that drops equally many (moecompress prune)")  # fmt: skip
    verify_files(model)
    opened = OpenModel(model, DTYPES[dtype], prepare=prepare(model, load_bits=load_bits))
    work = work_folder(output)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    shards: list[Path] = []
    plain = build_skeleton(load_config(model))
    for layer in track([None, *range(opened.anatomy.num_layers)], "export"):
        tensors = layer_tensors(opened, plain, layer, DTYPES[dtype])
        path = work / f"model-{len(shards):05d}-of-{opened.anatomy.num_layers + 1:05d}.safetensors"
        write_shard(path, tensors)
        shards.append(path)
    write_index(work, shards)
    config = dict(opened.checkpoint.config)
    del config["quantization_config"]
    config.pop(KEY, None)  # a policy that other tools would not follow
    for section in (config, config.get("text_config")):
        if isinstance(section, dict):
            section.update({key: dtype for key in ("dtype", "torch_dtype") if key in section})
    write_text(work / "config.json", json.dumps(config, indent=2))
    copy_companions(model, work)
    (work / FILE).unlink(missing_ok=True)  # the policy's, too
    OpenModel(work)  # accounts for every tensor of what was written, or says which one is wrong
    give_name(work, output)
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    return {"output": str(output), "format": "dense", "dtype": dtype, "total_bytes": size, "shards": len(shards)}


@torch.no_grad()
def layer_tensors(opened: OpenModel, plain: PreTrainedModel, layer: int | None, dtype: torch.dtype
                  ) -> dict[str, torch.Tensor]:  # fmt: skip
    """Tensors of one decoder layer (None: of everything else) under their names in the original checkpoint."""
    kept = [info for info in opened.anatomy.of_layer(layer) if ".packed." not in info.name]
    guards = {f"{moe.module}.down_proj" for moe in opened.anatomy.moe.values()}
    tensors = {info.name: opened.checkpoint.read(info.name) for info in kept if info.name not in guards}
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    if layer is None:
        return tensors
    opened.load_layer(layer)
    parameters: dict[str, torch.Tensor] = {}
    for name, module in opened.layers[layer].named_modules():
        parameters.update(_dequantized(f"{opened.anatomy.layer_names[layer]}.{name}", module, dtype, opened))
    opened.release_layer(layer)
    return tensors | stored_names(opened.loader, plain, parameters)


def _dequantized(name: str, module: nn.Module, dtype: torch.dtype, opened: OpenModel) -> dict[str, torch.Tensor]:
    if isinstance(module, PackedLinear):
        return {f"{name}.weight": module.packed.dequantized(dtype)[0]}
    packed = getattr(module, "packed", None)
    if isinstance(packed, PackedExperts):
        weights = {p: packed.dequantized(p, dtype) for p in packed.layout.projections}
        return {f"{name}.{key}": value for key, value in parameters_from(weights, packed.layout).items()}
    return {}
