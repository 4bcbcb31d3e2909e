"""What transformers finds under quant_method "moecompress": a config and a quantizer. Light on purpose, since it is
imported while transformers itself is being imported; the work is in runtime/loading.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.quantizers import auto
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moecompress.errors import UserError

METHOD = "moecompress"
FORMAT_VERSION = 1


@register_quantization_config(METHOD)
class MoecompressConfig(QuantizationConfigMixin):
    """What config.json says of a compressed checkpoint.

    experts: experts module -> projection -> scheme -> how many experts. linears: scheme -> names of linear layers.
    dtype: name of the dtype of what is kept. rotation_seed: of the signs of the trellis format. verify:
    compare every file with its sha256 in the manifest when loading. load_bits: how many bits of nested integers to load
    (None: all). fewer: where some layers have fewer experts than the model's config says, its ``keys`` that say how many, and
    ``experts``, experts module -> how many it has. Not stored are verify and load_bits:
    pass ``quantization_config=MoecompressConfig(load_bits=2)`` to `from_pretrained`.
    """

    def __init__(self, experts: dict | None = None, linears: dict | None = None, dtype: str = "bfloat16",
                 version: int = FORMAT_VERSION, rotation_seed: int = 0, verify: bool = True,
                 load_bits: int | None = None, fewer: dict | None = None, **_: Any):  # fmt: skip
        self.quant_method = METHOD
        self.version = version
        self.dtype = dtype
        self.experts = experts or {}
        self.linears = linears or {}
        self.rotation_seed = rotation_seed
        self.verify = verify
        self.load_bits = load_bits
        self.fewer = fewer

    def get_loading_attributes(self) -> dict[str, Any]:
        return {"verify": self.verify, "load_bits": self.load_bits}

    def to_dict(self) -> dict[str, Any]:
        stored = {"quant_method": METHOD, "version": self.version, "dtype": self.dtype, "experts": self.experts,
                  "linears": self.linears, "rotation_seed": self.rotation_seed}  # fmt: skip
        return stored | ({"fewer": self.fewer} if self.fewer else {})


# transformers asks only the classes of this list for loading attributes, and has no other way to join it.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, MoecompressConfig)


@register_quantizer(METHOD)
class MoecompressQuantizer(HfQuantizer):
    requires_calibration = True
    quantization_config: MoecompressConfig

    def validate_environment(self, *args, **kwargs) -> None:
        if self.quantization_config.version != FORMAT_VERSION:
            raise UserError("This folder has another format version", expected=FORMAT_VERSION,
                            got=self.quantization_config.version, remedy="use the moecompress that wrote it")  # fmt: skip

    def _process_model_before_weight_loading(self, model, **kwargs) -> None:
        from moecompress.runtime import loading

        loading.install(model, self.quantization_config)
        files = [Path(file) for file in kwargs.get("checkpoint_files") or []]
        loading.check_files(model, files, self.quantization_config.verify)
        # From the file: the config of a multimodal checkpoint's text model lacks what stands beside its sections.
        self.policy = loading.read_policy(files[0].parent) if files else None

    def get_new_dtype(self, converter, param, dtype):
        """What is packed stays in the dtype of the format, also where a family wants names like ours in float32."""
        if any(".packed." in name for name in converter.source_patterns):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.device.type == "meta":
                raise UserError(f"Tensor {name} was not loaded", remedy="copy or compress the folder again")
        from moecompress.runtime.packed import PackedExperts

        for name, module in model.named_modules():
            if isinstance(module, PackedExperts):
                module.check(name)
                module.settle()
        if self.policy is not None:
            from moecompress.runtime.skipping import apply

            apply(model, self.policy)
        return model

    def get_state_dict_and_metadata(self, model) -> tuple[dict[str, Any] | None, dict[str, str]]:
        from moecompress.runtime import loading

        return loading.to_store(model), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True
