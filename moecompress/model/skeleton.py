"""The model without its weights, and transformers' own rules for bringing weights in.

Everything that knows how names on disk become parameters of modules (renaming, stacking experts, concatenating gate and
up, transposing) is transformers' `core_model_loading`; this file only calls it, so no family needs a table of ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as hf_logging

from moecompress.errors import UserError
from moecompress.model.checkpoint import read_config


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
        architecture = _architecture(config)
        try:
            if architecture is not None:
                model = architecture._from_config(config)
            else:
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        except Exception as error:  # as above: a wrong size or name in the config
            raise UserError("transformers cannot build the model that config.json describes", got=first_line(error),
                            remedy="download config.json again, or update transformers") from None  # fmt: skip
    return model.eval()


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")


def _architecture(config: PretrainedConfig) -> type[PreTrainedModel] | None:
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
        self.mapping = get_model_conversion_mapping(model, None, None)
        self.expected = model.state_dict()  # name -> meta tensor

    def targets(self, names: list[str]) -> dict[str, str]:
        """Name on disk -> the module parameter it goes to (the first, where it is split over several)."""
        renamings = [entry for entry in self.mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self.mapping if isinstance(entry, WeightConverter)]
        prefix = self.model.base_model_prefix
        found = {}
        for name in names:
            target, _ = rename_source_key(name, renamings, converters, prefix, self.expected)
            if target not in self.expected and name in self.expected:
                target = name
            found[name] = target
        return found

    def load(self, tensors: Mapping[str, torch.Tensor], device: str = "cpu", dtype: torch.dtype | None = None):
        """Load ``tensors`` (names on disk) into the model; returns transformers' LoadStateDictInfo.

        ``dtype`` None keeps each parameter's own dtype. With device "meta" this is the rehearsal: all shapes, no bytes.
        """
        settings = LoadStateDictConfig(device_map={"": device}, dtype=dtype, weight_mapping=self.mapping)
        with quiet_transformers():
            info, _ = convert_and_load_state_dict_in_model(self.model, dict(tensors), settings)
        return info


def release(module: nn.Module) -> None:
    """Send every parameter and persistent buffer of ``module`` back to the meta device, freeing its memory."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                part._buffers[name] = torch.empty_like(buffer, device="meta")
