"""What the checkpoint is: every tensor, its role, the layer it belongs to, and where the routed experts are."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from moecompress.errors import UserError
from moecompress.model.checkpoint import Checkpoint, TensorEntry
from moecompress.model.experts import ExpertsLayout, find_experts, layout_of
from moecompress.model.skeleton import Loader

#: Linear layers by what they do; only these three roles (and experts) may be quantized.
ATTENTION, SHARED, DENSE = "attention", "shared", "dense_ffn"
EXPERT, EXPERT_BIAS, ROUTER, NORM, EMBEDDING, HEAD, IGNORED, OTHER = (
    "expert", "expert_bias", "router", "norm", "embedding", "head", "not_in_model", "other",
)  # fmt: skip
#: Projections into and out of MLA latents, and what picks or sums up the tokens that sparse attention looks at:
#: quantizing them ruins the model for no gain in size.
MLA_LATENT = re.compile(r"(^|\.)(q_a_proj|q_b_proj|q_gate_proj|kv_a_proj\w*|kv_b_proj|wq_a|wq_b|wkv_a|wkv_b)$"
                        r"|(^|\.)(indexer|compressor)\.")  # fmt: skip
ATTENTION_PATH = re.compile(r"(^|\.)\w*(attn|attention)\w*(\.|$)", re.IGNORECASE)
SHARED_PATH = re.compile(r"(^|\.)shared_(mlp|expert)\w*\.")
DENSE_PATH = re.compile(r"(^|\.)(mlp|ffn|feed_forward|dense)\w*\.")
#: What weights may be stored in.
PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
#: Narrower matrices are gates and small projections: their bytes do not matter, their error does.
SMALLEST_LINEAR = 32


@dataclass(frozen=True)
class TensorInfo:
    """One input tensor. ``target`` is the parameter of the module it ends up in."""

    name: str
    target: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True)
class MoELayer:
    layer: int
    module: str  # e.g. "model.layers.3.mlp.experts"
    layout: ExpertsLayout


@dataclass(frozen=True)
class Anatomy:
    model_type: str
    architecture: str
    stacks: tuple[str, ...]  # module lists of the layers, e.g. "model.layers"; an encoder's come before a decoder's
    layer_names: tuple[str, ...]  # all their layers, in the order of the forward pass
    top_k: int | None
    moe: dict[int, MoELayer]
    linears: dict[str, str]  # quantizable nn.Linear module -> role
    tensors: tuple[TensorInfo, ...]

    @property
    def num_layers(self) -> int:
        return len(self.layer_names)

    @property
    def stack(self) -> str:
        """The only list of layers."""
        if len(self.stacks) != 1:
            raise UserError(f"{self.architecture} has an encoder and a decoder", expected="layers in one list",
                            remedy="it can be quantized and evaluated, but not be pruned or rebuilt")  # fmt: skip
        return self.stacks[0]

    def of_layer(self, layer: int | None) -> list[TensorInfo]:
        return [tensor for tensor in self.tensors if tensor.layer == layer]

    @property
    def largest_layer(self) -> int:
        """Stored bytes of the largest decoder layer."""
        sizes: Counter[int | None] = Counter()
        for tensor in self.tensors:
            sizes[tensor.layer] += tensor.nbytes
        return max(size for layer, size in sizes.items() if layer is not None)

    def bytes_by_role(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for tensor in self.tensors:
            total[tensor.role] += tensor.nbytes
        return dict(total.most_common())

    @property
    def expert_weights(self) -> int:
        """Number of routed-expert weights: the denominator of bits per weight."""
        return sum(
            moe.layout.experts * rows * cols
            for moe in self.moe.values()
            for rows, cols in map(moe.layout.shape, moe.layout.projections)
        )


def dissect(checkpoint: Checkpoint, model: PreTrainedModel, loader: Loader, stacks: tuple[str, ...], moe: dict[int, MoELayer]) -> Anatomy:
    """Account for every tensor of the checkpoint, or say which one does not fit.

    A rehearsal on the meta device runs transformers' whole loading on shapes alone; whatever it finds missing,
    unexpected or of another shape is an error here, not bad text later.
    """
    ignored = rehearse(checkpoint.entries, model, loader, moe.values())
    targets = loader.targets(list(checkpoint.entries))
    top_k = top_k_of(model)
    if top_k is not None and not 0 < top_k <= min(layer.layout.experts for layer in moe.values()):
        raise UserError("config.json asks for an impossible number of experts per token", expected="1 to "
                        f"{min(layer.layout.experts for layer in moe.values())}", got=top_k, remedy="download config.json again")  # fmt: skip
    roles = _Roles(model, stacks, moe)
    names = layer_names(model, stacks)
    tensors = []
    for name, entry in checkpoint.entries.items():
        target = targets[name]
        layer = None if target in ignored else names.get(_layer_of(target, stacks))
        role = IGNORED if target in ignored else roles.of(target)
        _refuse_codes(entry, loader.expected.get(target))
        tensors.append(TensorInfo(name, target, role, layer, entry.shape, entry.dtype, entry.nbytes))
    return Anatomy(
        model_type=model.config.model_type,
        architecture=type(model).__name__,
        stacks=stacks,
        layer_names=tuple(names),
        top_k=top_k,
        moe=moe,
        linears=roles.linears,
        tensors=tuple(sorted(tensors, key=lambda t: t.name)),
    )


def layer_names(model: PreTrainedModel, stacks: tuple[str, ...]) -> dict[str, int]:
    """Name of each layer -> its number, counted through all stacks."""
    names = (f"{stack}.{index}" for stack in stacks for index in range(len(model.get_submodule(stack))))
    return {name: number for number, name in enumerate(names)}


def _layer_of(target: str, stacks: tuple[str, ...]) -> str:
    """The layer that a parameter is in, or an empty string."""
    found = next((stack for stack in stacks if target.startswith(stack + ".")), None)
    return "" if found is None else f"{found}.{target[len(found) + 1 :].split('.')[0]}"


def _refuse_codes(entry: TensorEntry, parameter: torch.Tensor | None) -> None:
    """Loading would turn the codes of a quantized tensor into weights without a word."""
    if parameter is not None and parameter.is_floating_point() and entry.dtype not in PLAIN:
        raise UserError(f"Tensor {entry.name} holds no plain numbers", expected="float16, bfloat16 or float32",
                        got=str(entry.dtype).removeprefix("torch."), remedy="dequantize the checkpoint first")  # fmt: skip


def refuse_quantized(checkpoint: Checkpoint) -> None:
    settings = checkpoint.config.get("quantization_config")
    if settings:
        method = settings.get("quant_method", "unknown")
        remedy = (
            "this folder is already compressed; start from the original model"
            if method == "moecompress"
            else "dequantize it to bfloat16 first (transformers: from_pretrained(..., "
            "quantization_config=...(dequantize=True)) and save_pretrained)"
        )
        raise UserError("The checkpoint is already quantized", expected="float16, bfloat16 or float32 weights",
                        got=f"quant_method {method}", remedy=remedy)  # fmt: skip


def refuse_other_tasks(model: PreTrainedModel) -> None:
    """Calibration and evaluation need the distribution of the next token."""
    if model.get_output_embeddings() is None:
        raise UserError(f"{type(model).__name__} has no language-model head", expected="a model that predicts the next token",
                        remedy="pass the checkpoint of a causal language model, or of the part of the model that is one")  # fmt: skip


def find_stacks(model: PreTrainedModel) -> tuple[tuple[str, ...], dict[int, MoELayer]]:
    """The list of decoder layers that holds the routed experts, or an encoder's and a decoder's, and the experts in them."""
    stacks: dict[str, dict[int, MoELayer]] = defaultdict(dict)
    for name, module in find_experts(model):
        parts = name.split(".")
        depths = range(1, len(parts))
        for depth in depths if model.config.is_encoder_decoder else reversed(depths):  # T5's layers are lists of parts
            parent = ".".join(parts[:depth])
            if parts[depth].isdigit() and isinstance(model.get_submodule(parent), nn.ModuleList):
                index = int(parts[depth])
                if index in stacks[parent]:
                    raise UserError(f"Layer {index} of {parent} has two sets of experts", expected="one a layer",
                                    got=f"{stacks[parent][index].module} and {name}",
                                    remedy="this architecture is not supported yet")  # fmt: skip
                stacks[parent][index] = MoELayer(index, name, layout_of(module))
                break
    if not stacks:
        raise UserError(f"{type(model).__name__} is not a Mixture-of-Experts model that moecompress can see",
                        expected="routed experts behind transformers' experts interface", got="none",
                        remedy="see `moecompress inspect --families`; a dense model can become one by `moecompress convert`")  # fmt: skip
    if model.config.is_encoder_decoder:
        one = next(iter(stacks))
        both = tuple(re.sub("encoder|decoder", side, one) for side in ("encoder", "decoder"))
        numbers = layer_names(model, both)
        layers = (layer for moe in stacks.values() for layer in moe.values())
        found = {numbers[_layer_of(layer.module, both)]: layer for layer in layers}
        return both, {number: replace(layer, layer=number) for number, layer in sorted(found.items())}
    order = sorted(stacks.items(), key=lambda item: -len(item[1]))
    if len(order) > 1 and len(order[1][1]) == len(order[0][1]):
        raise UserError(f"{type(model).__name__} has experts in two stacks of layers", expected="one decoder that predicts the next token",
                        got=f"{order[0][0]} and {order[1][0]}", remedy="this architecture is not supported yet")  # fmt: skip
    return (order[0][0],), order[0][1]


def rehearse(entries: Mapping[str, TensorEntry], model: PreTrainedModel, loader: Loader, moe: Iterable[MoELayer] = ()
             ) -> set[str]:  # fmt: skip
    """Load shapes only; UserError naming the tensor that is missing, unexpected or of another shape.

    Returns the targets that the model is known to ignore (multi-token prediction layers).
    """
    shapes = {name: torch.empty(e.shape, dtype=e.dtype, device="meta") for name, e in entries.items()}
    info = loader.load(shapes, device="meta")
    for target, got, expected in sorted(info.mismatched_keys):
        raise _misfit(target, tuple(expected), tuple(got), entries, loader, moe)
    for target in sorted(info.conversion_errors):
        raise _misfit(target, tuple(loader.expected[target].shape), None, entries, loader, moe)
    patterns = [re.compile(p) for p in (model._keys_to_ignore_on_load_unexpected or [])]
    ignored = {name for name in info.unexpected_keys if any(p.search(name) for p in patterns)}
    for name in sorted(info.unexpected_keys - ignored):
        raise UserError(f"Tensor {name} has no place in {type(model).__name__}", expected="only tensors the model has",
                        got=f"{len(info.unexpected_keys - ignored)} unexpected", remedy="check that config.json belongs to these weights")  # fmt: skip
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    optional = [re.compile(p) for p in (model._keys_to_ignore_on_load_missing or [])]
    missing = {name for name in info.missing_keys - tied if not any(p.search(name) for p in optional)}
    for name in sorted(missing):
        raise UserError(f"Nothing in the checkpoint fills {name}", expected=f"a tensor of shape {tuple(loader.expected[name].shape)}",
                        got=f"{len(missing)} parameters without weights", remedy="the checkpoint is incomplete: download it again")  # fmt: skip
    return ignored


def _misfit(target: str, expected: tuple[int, ...], got: tuple[int, ...] | None, entries: Mapping[str, TensorEntry],
            loader: Loader, moe: Iterable[MoELayer]) -> UserError:  # fmt: skip
    """Say which tensors on disk do not add up to ``target``; for experts, which expert."""
    names = sorted(name for name, to in loader.targets(list(entries)).items() if to == target)
    for layer in moe:
        if not target.startswith(layer.module + "."):
            continue
        suffixes: dict[str, set[int]] = defaultdict(set)
        for name in names:
            found = re.search(r"experts\.(\d+)\.(.+)$", name)
            if found:
                suffixes[found[2]].add(int(found[1]))
        count = layer.layout.experts
        for suffix, indices in sorted(suffixes.items()):
            where = f"{names[0].split('experts.')[0]}experts"
            if extra := sorted(i for i in indices if i >= count):
                return UserError(f"Unexpected expert {where}.{extra[0]} ({suffix})", expected=f"{count} experts, as config.json says",
                                 got=f"{len(indices)}", remedy="config.json and weights disagree: get both from one source")  # fmt: skip
            if absent := sorted(set(range(count)) - indices):
                return UserError(f"Expert {where}.{absent[0]} has no {suffix}", expected=f"{count} experts, as config.json says",
                                 got=f"{len(indices)}", remedy="the checkpoint is incomplete: download it again")  # fmt: skip
    shapes = ", ".join(f"{name} {entries[name].shape}" for name in names[:2])
    return UserError(f"{target} does not have the shape that config.json asks for", expected=expected,
                     got=f"{got or 'tensors that cannot be joined'} from {shapes}",
                     remedy="config.json and weights disagree: get both from one source")  # fmt: skip


def top_k_of(model: nn.Module) -> int | None:
    """Experts per token, as the config says; None if it has no name for it that we know."""
    config = model.config.get_text_config()
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "experts_per_token"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
        if isinstance(value, list) and value:
            return max(value)
    return None


class _Roles:
    """Roles of parameters, from the structure of the module tree."""

    def __init__(self, model: PreTrainedModel, stacks: tuple[str, ...], moe: dict[int, MoELayer]):
        self.experts = {layer.module: layer.layout for layer in moe.values()}
        self.all_experts = {name for name, _ in find_experts(model)}
        self.blocks = {module.rpartition(".")[0]: layout for module, layout in self.experts.items()}
        self.modules = dict(model.named_modules())
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.stacks = tuple(stack + "." for stack in stacks)
        head = model.get_output_embeddings()
        self.head = next((name for name, module in self.modules.items() if module is head), None)
        self.linears = {
            name: role
            for name, module in self.modules.items()
            if type(module) is nn.Linear and (role := self.of(name + ".weight")) in (ATTENTION, SHARED, DENSE)
        }

    def of(self, parameter: str) -> str:
        module_name, _, leaf = parameter.rpartition(".")
        if ".packed." in parameter:  # a packed bank plays the role of the matrix it stores
            module_name, leaf = parameter.split(".packed.")[0], "down_proj"
        module = self.modules.get(module_name)
        if module_name in self.experts:
            return EXPERT if leaf in self.experts[module_name].parameters else EXPERT_BIAS
        if module is not None and hasattr(module, "packed"):
            return self._linear_role(module_name)
        if isinstance(module, nn.Embedding):
            return EMBEDDING
        if module_name == self.head:
            return HEAD
        tensor = self.parameters.get(parameter)
        if tensor is None or not parameter.startswith(self.stacks):
            return NORM if tensor is not None and tensor.ndim == 1 else OTHER
        block = next((b for b in self.blocks if parameter.startswith(b + ".")), None)
        if block is not None and self._is_router(parameter, block, tensor):
            return ROUTER
        if tensor.ndim == 1:
            return NORM if leaf == "weight" else OTHER
        if type(module) is not nn.Linear or min(tensor.shape) < SMALLEST_LINEAR or MLA_LATENT.search(module_name):
            return ATTENTION + "_kept" if ATTENTION_PATH.search(module_name) else OTHER
        return self._linear_role(module_name)

    def _linear_role(self, module_name: str) -> str:
        """By the path, or where all parts of a layer have one name (``mixer``) by the class of the module around it."""
        path = module_name.removeprefix(next((stack for stack in self.stacks if module_name.startswith(stack)), ""))
        around = type(self.modules[module_name.rpartition(".")[0]]).__name__.lower()
        if ATTENTION_PATH.search(path) or around.endswith("attention"):
            return ATTENTION
        if SHARED_PATH.search(path) or any(module_name.startswith(block + ".") for block in self.blocks):
            return SHARED
        return DENSE if DENSE_PATH.search(path) or around.endswith("mlp") else OTHER

    def _is_router(self, parameter: str, block: str, tensor: torch.Tensor) -> bool:
        """Inside the MoE block: one row or value an expert, or a gate with a single output."""
        experts = self.blocks[block].experts
        inside = parameter.removeprefix(block + ".")
        if re.search(r"(^|\.)(gate|router|shared_expert_gate|wg)(\.|$)", inside):
            return True
        return tensor.shape[0] in (experts, 1) and "shared" not in inside and "mlp" not in inside
