"""The model without its weights, and transformers' own rules for bringing weights in.

Everything that knows how names on disk become parameters of modules (renaming, stacking experts, concatenating gate and
up, transposing) is transformers' `core_model_loading`; this file only calls it, so no family needs a table of ours.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    PrefixChange,
    Transpose,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as hf_logging

from moecompress.errors import UserError
from moecompress.model.checkpoint import read_config
from moecompress.model.switch import adapt, converters

#: Checkpoints up to this size are computed in float32; larger ones in the dtype they are stored in.
FLOAT32_LIMIT = 2 * 1024**3


@contextlib.contextmanager
def quiet_transformers():
    """Silence transformers' own bars and warnings while we load piecewise: our checks say what matters."""
    verbosity = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def load_config(folder: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    read_config(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a wrong value raises whatever it leads to, deep inside transformers
        raise UserError(f"transformers does not understand the config.json of {folder}", got=first_line(error),
                        remedy="download config.json again, update transformers, or pass --trust-remote-code if the folder "
                               "brings its own code and you trust it") from None  # fmt: skip


def build_skeleton(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that the config describes, parameters on the meta device, buffers (rotary tables) real."""
    from accelerate import init_empty_weights

    with quiet_transformers(), init_empty_weights(include_buffers=False):
        found = architecture(config)
        try:
            if found is not None:
                model = found._from_config(config)
            else:
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        except Exception as error:  # as above: a wrong size or name in the config
            raise UserError("transformers cannot build the model that config.json describes", got=first_line(error),
                            remedy="download config.json again, or update transformers") from None  # fmt: skip
    adapt(model)
    keep_float32(model, config.dtype)
    return model.eval()


def keep_float32(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Give the parameters that a family always computes in float32 (routers, mixing weights) that dtype, as
    `from_pretrained` does: their modules expect it."""
    plan = model._get_dtype_plan(dtype) if isinstance(dtype, torch.dtype) else {}
    if not plan:
        return
    pattern, patterns, _ = build_glob_alternation(list(plan))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and (found := pattern.search(name)):
            where, _, leaf = name.rpartition(".")
            module = model.get_submodule(where)
            new = tensor.detach().to(plan[patterns[str(found.lastgroup)]])
            if leaf in module._buffers:
                module._buffers[leaf] = new
            else:
                module._parameters[leaf] = nn.Parameter(new, requires_grad=False)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")


def architecture(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class that config.json names, if it is one of transformers' own (a VL model is not AutoModelForCausalLM)."""
    import transformers

    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return None


class Loader:
    """Brings named tensors of a checkpoint into a skeleton, and takes them out again."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.mapping = [*converters(model), *get_model_conversion_mapping(model, None, None)]
        for entry in self.mapping:
            if isinstance(entry, WeightConverter):
                entry.force_cpu = False  # in a rehearsal on the meta device it would fail, elsewhere we load on the CPU
        self.expected = model.state_dict()  # name -> meta tensor

    def targets(self, names: list[str]) -> dict[str, str]:
        """Name on disk -> the module parameter it goes to (the first, where it is split over several)."""
        return {name: target for name, (target, _) in self._places(names).items()}

    def _places(self, names: Iterable[str]) -> dict[str, tuple[str, str | None]]:
        """Name on disk -> (parameter, pattern of the converter that makes it, if one does)."""
        renamings = [entry for entry in self.mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self.mapping if isinstance(entry, WeightConverter)]
        prefix = self.model.base_model_prefix
        found = {}
        for name in names:
            place = rename_source_key(name, renamings, converters, prefix, self.expected)
            found[name] = (name, None) if place[0] not in self.expected and name in self.expected else place
        return found

    def fill(self, names: Iterable[str], read: Callable[[str], torch.Tensor]) -> None:
        """Load the tensors ``names``, which ``read`` fetches, holding little more than what they become.

        Where a checkpoint has one tensor an expert, transformers holds their list, their stack, and gate and up joined:
        up to three times the layer. So such experts go through its converters one by one, into the finished parameter.
        """
        stacks: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))  # target -> pattern -> names
        others: dict[str, _Lazy] = {}
        for name, (target, pattern) in self._places(sorted(names, key=dot_natural_key)).items():
            if pattern is not None and self._stacks_experts(pattern):
                stacks[target][pattern].append(name)
            else:
                others[name] = _Lazy(read, name)
        if others:
            info = self.load(others)
            for target, problem in info.conversion_errors.items():
                raise UserError(f"{target} could not be loaded", got=problem.strip().splitlines()[-1])
        for target, sources in stacks.items():
            self._fill_stack(target, sources, read)

    def _converter(self, pattern: str) -> WeightConverter:
        return next(c for c in reversed(self.mapping) if isinstance(c, WeightConverter) and pattern in c.source_patterns)

    def _stacks_experts(self, pattern: str) -> bool:
        """Does the converter treat every expert alone? It stacks along axis 0, and then only touches later axes."""
        first, *rest = self._converter(pattern).operations
        later = all(
            (isinstance(op, Concatenate | Interleave) and op.dim > 0)
            or (isinstance(op, Transpose) and op.dim0 > 0 and op.dim1 > 0 and not op.check_dims)
            for op in rest
        )
        return type(first) is MergeModulelist and first.dim == 0 and later

    def _fill_stack(self, target: str, sources: dict[str, list[str]], read: Callable[[str], torch.Tensor]) -> None:
        expected = self.expected[target]
        whole = torch.empty(expected.shape, dtype=expected.dtype)
        for expert, members in enumerate(zip(*sources.values(), strict=True)):
            one = deepcopy(self._converter(next(iter(sources))))
            for pattern, name in zip(sources, members, strict=True):
                one.add_tensor(target, name, pattern, read(name).to(expected.dtype))
            (value,) = one.convert(target, model=self.model, config=self.model.config).values()
            whole[expert : expert + 1] = value[0] if isinstance(value, list) else value
        module, _, name = target.rpartition(".")
        self.model.get_submodule(module)._parameters[name] = nn.Parameter(whole, requires_grad=False)

    def load(self, tensors: Mapping[str, Any], device: str = "cpu", dtype: torch.dtype | None = None):
        """Load ``tensors`` (names on disk) into the model; returns transformers' LoadStateDictInfo.

        ``dtype`` None keeps each parameter's own dtype. With device "meta" this is the rehearsal: all shapes, no bytes.
        """
        settings = LoadStateDictConfig(device_map={"": device}, dtype=dtype, weight_mapping=self.mapping)
        with quiet_transformers():
            info, _ = convert_and_load_state_dict_in_model(self.model, dict(tensors), settings)
        return info


def stored_names(loader: Loader, plain: PreTrainedModel, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters of modules as the tensors of the checkpoint that ``loader`` read: experts taken apart, families' own names.

    transformers would revert only the conversions that loading used, and packed experts used none: tell it all of the
    family's. A changed prefix is reverted only if it was used: nothing else says whether the original had it.
    ``plain``: a skeleton without packed modules, because some conversions look at the shapes of its parameters.
    """
    own = len(converters(plain)) + len(get_model_conversion_mapping(plain, add_legacy=False))
    plain._weight_conversions = [
        c for i, c in enumerate(loader.mapping) if c.was_used() or (i < own and not isinstance(c, PrefixChange))
    ]
    with quiet_transformers():
        return revert_weight_conversion(plain, parameters)


@dataclass(frozen=True)
class _Lazy:
    """What transformers takes for a slice of a safetensors file: `[...]` reads it."""

    read: Callable[[str], torch.Tensor]
    name: str

    def __getitem__(self, _) -> torch.Tensor:
        return self.read(self.name)


def put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Make ``tensor`` the parameter or buffer ``name`` of ``module``, whatever was there."""
    where, _, leaf = name.rpartition(".")
    owner = module.get_submodule(where)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def release(module: nn.Module) -> None:
    """Send every parameter and persistent buffer of ``module`` back to the meta device, freeing its memory."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                part._buffers[name] = torch.empty_like(buffer, device="meta")


def load_tokenizer(folder: Path, trust_remote_code: bool = False):
    from transformers import AutoTokenizer

    load_config(folder, trust_remote_code)  # a damaged config.json would be taken for a damaged tokenizer below
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        problem = None if tokenizer("text").input_ids else "it turns every text into nothing"
    except Exception as error:  # damaged files raise whatever they lead to, deep inside transformers and tokenizers
        problem = first_line(error)
    if problem is not None:
        raise UserError(
            f"No usable tokenizer in {folder}", got=problem, remedy="copy the tokenizer's files into the folder"
        )
    return tokenizer


@contextlib.contextmanager
def bfloat16_products(stored: torch.dtype):
    """Inside, float32 matrix products may round their factors to bfloat16, where the machine has hardware for it.

    For statistics and rounding of a model that is itself ``stored`` in bfloat16: three times as fast with AMX, and far below
    the sampling error of calibration. Never for measuring what a compression cost.
    """
    before = torch.get_float32_matmul_precision()
    if stored == torch.bfloat16:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compute_dtype(folder: Path, wanted: str) -> torch.dtype | None:
    """None: as stored."""
    if wanted != "auto":
        return getattr(torch, wanted)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return torch.float32 if size <= FLOAT32_LIMIT else None
