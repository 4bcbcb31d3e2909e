"""Tiny random checkpoints of every model family behind transformers' experts interface, as save_pretrained writes them."""

from __future__ import annotations

import dataclasses
import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moecompress.model.experts import find_experts

VOCABULARY = 96
EXPERTS = 4

#: Set wherever a text config has the field. Every matrix that is quantized has at least 32 columns (one group).
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128,
    "intermediate_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32, "dense_intermediate_size": 64, "moe_shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32, "prefix_dense_intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS, "moe_num_experts": EXPERTS,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2, "sliding_window": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_mtp_layers": 0, "num_nextn_predict_layers": 0,
    "linear_head_dim": 16, "linear_num_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "short_conv_kernel_size": 4,
}  # fmt: skip
#: The same for vision and audio parts: they are only carried along, never run.
OTHER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "depth": 1, "num_attention_heads": 2,
    "num_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 32, "patch_size": 4, "image_size": 16,
    "out_hidden_size": 64, "mlp_dim": 32, "output_channels": 32, "text_hidden_size": 64,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0], "spatial_merge_size": 2, "merge_size": 2,
    "projection_intermediate_size": 32, "projection_hidden_dim": 32, "posemb_grid_size": 4, "mel_vocab_size": 8,
    "n_mel_bins": 8, "adapter_in_dim": 32, "adapter_out_dim": 64, "adapter_input_size": 32, "downsample_hidden_size": 8,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Family:
    """Where a family differs. ``head``: model class, if not the first one that generates. ``text``: on top of TEXT.
    ``top``: fields of a multimodal config itself. ``other``: section of a multimodal config -> on top of OTHER.
    """

    head: str = ""
    text: dict[str, Any] = dataclasses.field(default_factory=dict)
    top: dict[str, Any] = dataclasses.field(default_factory=dict)
    other: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


ALL_HEADS = {"num_key_value_heads": 4}  # latent attention: every head has its own keys
SPARSE = ["dense", "sparse"]
SLIDING = ["sliding_attention", "full_attention"]
LINEAR = ["linear_attention", "full_attention"]
SMALL_SAM = {"sam_config": {"downsample_channels": [32, 32]}}
SWA = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "rel_extent": 32,
       "sliding_window_size": 8, "layer_types": ["hybrid_sliding", "hybrid"]}  # fmt: skip


def vision(model_type: str, **more: Any) -> dict[str, dict[str, Any]]:
    """A vision part whose config class the family leaves open."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    return {"vision_config": {"model_type": model_type} | {name: OTHER[name] for name in names} | more}


GEMMA_VISION = vision("gemma4_vision", num_key_value_heads=2, head_dim=16, position_embedding_size=16)

FAMILIES: dict[str, Family] = {
    "afmoe": Family(text={"layer_types": SLIDING}),
    "aria": Family(top={"projector_patch_to_query_dict": {16: 4}}, other=vision("idefics3_vision", image_size=16)),
    "axk2": Family(text=ALL_HEADS),
    "bailing_hybrid": Family(text=ALL_HEADS | {
        "num_hidden_layers": 3, "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"]}),
    "beam": Family(text={"layer_types": SLIDING, "mlp_layer_types": SPARSE}),
    "cohere2_moe": Family(text={"layer_types": SLIDING, "mlp_layer_types": SPARSE, "logit_scale": 1.0}),
    "deepseek_ocr2": Family(text={"mlp_layer_types": SPARSE}, other=SMALL_SAM),
    "deepseek_v32": Family(text=ALL_HEADS),
    "deepseek_v4": Family(text={
        "num_hidden_layers": 3, "hc_mult": 2, "o_groups": 2, "o_lora_rank": 16, "num_key_value_heads": 1,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}}),
    "diffusion_gemma": Family("DiffusionGemmaForBlockDiffusion", text={"layer_types": SLIDING, "global_head_dim": 32},
                              other=GEMMA_VISION),
    "dots3_note": Family(text=ALL_HEADS | {
        "num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": ["indexed_attention", "indexed_attention", "sliding_attention"],
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 32,
        "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 16},
        other={"vision_config": {"num_local_experts": 4, "mlp_layer_types": ["sparse"], "moe_intermediate_size": 32},
               "audio_config": {"feature_size": 8, "max_position_embeddings": 16}}),
    "ernie4_5_vl_moe": Family("Ernie4_5_VLMoeForConditionalGeneration", text={
        "moe_intermediate_size": [32, 32],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}}),
    "exaone_moe": Family(text={"layer_types": SLIDING}),
    "flint": Family(text={"layer_types": SLIDING, "mlp_only_layers": [0]}),
    "gemma4": Family(text={
        "enable_moe_block": True, "num_hidden_layers": 3, "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"], "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16, "global_head_dim": 32},
        other=GEMMA_VISION | {"audio_config": {"output_proj_dims": 32, "use_clipped_linears": False}}),
    "glm4v_moe": Family(text={
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}),
    "glm5_next": Family(text=ALL_HEADS | {
        "qk_rope_head_dim": 0, "layer_types": ["linear_attention", "indexed_attention"], "mlp_layer_types": SPARSE,
        "index_kpool": 2}),
    "glm_moe_dsa": Family(text=ALL_HEADS | {"num_hidden_layers": 3, "indexer_types": ["full", "full", "shared"]}),
    "granitemoehybrid": Family(text={
        "layer_types": LINEAR, "mamba_n_heads": 4, "mamba_d_state": 16, "mamba_chunk_size": 16}),
    "hy_v4": Family(text=ALL_HEADS | {"num_hidden_layers": 3, "indexer_types": ["full", "full", "shared"]}),
    "inkling": Family(text=SWA | {"mlp_layer_types": SPARSE, "logits_mup_width_multiplier": 1.0},
                      other={"vision_config": {"patch_size": 40}}),
    "inkling2": Family(text=SWA | {"unpadded_vocab_size": VOCABULARY}),
    "jamba": Family(text={"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
    "kolibri1": Family(text={"layer_types": SLIDING}),
    "laguna": Family(text={"layer_types": SLIDING}),
    "lfm2_moe": Family(text={"layer_types": ["conv", "full_attention"]}),
    "mellum": Family(text={"layer_types": SLIDING}),
    "minimax": Family(text={"block_size": 8}),
    "minimax_m3_vl": Family(top={"projector_hidden_size": 32}, text={
        "layer_types": ["full_attention", "minimax_m3_sparse"], "mlp_layer_types": SPARSE,
        "index_block_size": 4, "index_topk_blocks": 2, "rotary_dim": 8}),
    "mistral_large4": Family(text=ALL_HEADS | {
        "num_hidden_layers": 3, "kv_source_layers": [0, 1, 1], "indexer_types": ["full", "full", "shared"]},
        other=vision("pixtral", image_size=16, head_dim=16)),
    "muse_spark": Family(
        top={"out_hidden_size": 32, "projector_hidden_size": 32},
        text={"moe_hidden_size": 32, "layer_types": SLIDING, "mlp_layer_types": SPARSE},
        other={"audio_config": {"patch_sizes": [4], "hidden_sizes": [32], "depths": [1]},
               "vision_config": {"pos_emb_height": 4, "pos_emb_width": 4}}),
    "nemotron_h": Family(text={
        "num_hidden_layers": None, "layers_block_type": ["mamba", "moe", "attention", "mlp"], "mamba_num_heads": 4,
        "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16}),
    "openai_privacy_filter": Family("OpenAIPrivacyFilterForTokenClassification"),
    "qwen3_5_moe": Family(text={"layer_types": LINEAR}),
    "qwen3_next": Family(text={"layer_types": LINEAR}),
    "qwen3_omni_moe": Family("Qwen3OmniMoeThinkerForConditionalGeneration", other={"audio_config": {
        "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 32, "num_mel_bins": 8,
        "output_dim": 64, "max_source_positions": 16}}),
    "qwen4_exp": Family(text={
        "layer_types": ["linear_attention", "indexed_attention"], "hc_count": 2, "hc_lowrank": 16,
        "ple_layer_ids": [1], "ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 8,
        "heads_per_ngram": 2, "split_ngram_parts": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 4}),
    "unlimited_ocr": Family(other=SMALL_SAM),
    "zaya": Family(text={"num_experts_per_tok": 1, "router_hidden_size": 32}),
}  # fmt: skip


@cache
def interface() -> dict[str, list[str]]:
    """Family -> its experts classes, from the source of every model of transformers that uses the experts interface."""
    found: dict[str, list[str]] = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        pattern = r"^@use_experts_implementation(?:\([^)]*\))?\s*\nclass (\w+)"
        if classes := re.findall(pattern, text, re.MULTILINE):
            found.setdefault(path.parent.name, []).extend(classes)
    return found


def head_class(family: str) -> type[PreTrainedModel]:
    """The class whose checkpoints people have: the multimodal one where there is one."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    named = FAMILIES.get(family, Family()).head
    ends = ("ForConditionalGeneration", "ForCausalLM")
    return getattr(module, named or next(name for end in ends for name in module.__all__ if name.endswith(end)))


def tiny_config(family: str) -> PretrainedConfig:
    return head_class(family).config_class(
        **_section(head_class(family).config_class, "", FAMILIES.get(family, Family()))
    )


def _section(config_class: Any, name: str, family: Family) -> dict[str, Any]:
    """Values for one config class, and for the configs inside it. ``name``: of the section, "" for the whole."""
    parts = getattr(config_class, "sub_configs", {})
    if name == "" and any("text" in part for part in parts):
        values = dict(family.top)
    else:
        text = name == "" or "text" in name
        own = family.text if text else family.other.get(name, {})
        fields = {field.name for field in dataclasses.fields(config_class)}
        values = {key: value for key, value in (TEXT if text else OTHER).items() if key in fields} | own
    for part, inner in parts.items():
        if inner.__name__ != "AutoConfig":
            values[part] = _section(inner, part, family)
        elif part in family.other:
            values[part] = family.other[part]
    return {key: value for key, value in values.items() if value is not None}


def tiny_checkpoint(family: str, folder: Path) -> PretrainedConfig:
    """Write the checkpoint in bfloat16 under its names on disk; returns its config."""
    torch.manual_seed(0)
    config = tiny_config(family)
    config.dtype = torch.bfloat16
    model = head_class(family)._from_config(config)
    shake(model)
    model.save_pretrained(folder)
    return model.config


@torch.no_grad()
def shake(model: PreTrainedModel) -> None:
    """Weights that matter: transformers initialises experts so small that no test would miss them."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.ndim >= 2:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.05 * noise)


def experts_of(family: str) -> torch.nn.Module:
    """A family's experts module (E = 4, d = 64, m = 32 or 64) with random weights in float32."""
    config = tiny_config(family)
    config.dtype = torch.float32
    model = head_class(family)._from_config(config)
    shake(model)
    return next(find_experts(model))[1]


def random_experts(experts: int, hidden: int, width: int, std: float) -> Qwen3MoeExperts:
    """An experts module of qwen3_moe that is not trained, its weights normal."""
    torch.manual_seed(0)
    module = Qwen3MoeExperts(Qwen3MoeConfig(num_experts=experts, hidden_size=hidden, moe_intermediate_size=width))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
        parameter.requires_grad_(False)
    return module


def letters_model(folder: Path) -> None:
    """A dense model of letters, and its tokenizer."""
    words = {word: number for number, word in enumerate(["<unk>", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=27, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
                                 num_key_value_heads=1)).save_pretrained(folder)  # fmt: skip
