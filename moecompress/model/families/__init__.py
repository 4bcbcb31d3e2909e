"""Which model families were tried, and what became of them. A record, not a switch: nothing else in the package asks it.

tests/model/test_families.py takes a tiny checkpoint of every family here through calibrating, quantizing, loading and
exporting, and fails if this record says anything else.
"""

from __future__ import annotations

from typing import Any

#: The transformers release that the record was made with.
TRANSFORMERS = "5.23.0"

#: Family -> its experts class, for every family behind transformers' experts interface.
INTERFACE = {
    "afmoe": "AfmoeExperts",
    "aria": "AriaExperts",
    "axk1": "AXK1Experts",
    "axk2": "AXK2Experts",
    "bailing_hybrid": "BailingHybridExperts",
    "beam": "BeamExperts",
    "cohere2_moe": "Cohere2MoeExperts",
    "deepseek_ocr2": "DeepseekOcr2TextExperts",
    "deepseek_v2": "DeepseekV2Experts",
    "deepseek_v3": "DeepseekV3Experts",
    "deepseek_v32": "DeepseekV32Experts",
    "deepseek_v4": "DeepseekV4Experts",
    "diffusion_gemma": "DiffusionGemmaTextExperts",
    "dots1": "Dots1Experts",
    "dots3_note": "Dots3NoteExperts",
    "ernie4_5_moe": "Ernie4_5_MoeExperts",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeMoeExperts",
    "exaone_moe": "ExaoneMoeExperts",
    "flex_olmo": "FlexOlmoExperts",
    "flint": "FlintExperts",
    "gemma4": "Gemma4TextExperts",
    "glm4_moe": "Glm4MoeExperts",
    "glm4_moe_lite": "Glm4MoeLiteExperts",
    "glm4v_moe": "Glm4vMoeTextExperts",
    "glm5_next": "Glm5NextTextExperts",
    "glm_moe_dsa": "GlmMoeDsaExperts",
    "gpt_oss": "GptOssExperts",
    "granitemoe": "GraniteMoeExperts",
    "granitemoe_swa": "GraniteMoeSWAExperts",
    "granitemoehybrid": "GraniteMoeHybridExperts",
    "granitemoeshared": "GraniteMoeSharedExperts",
    "hunyuan_v1_moe": "HunYuanMoEV1Experts",
    "hy_v3": "HYV3Experts",
    "hy_v4": "HYV4Experts",
    "inkling": "InklingExperts",
    "inkling2": "Inkling2Experts",
    "jamba": "JambaExperts",
    "kimi_linear": "KimiLinearExperts",
    "kolibri1": "Kolibri1Experts",
    "laguna": "LagunaExperts",
    "lfm2_moe": "Lfm2MoeExperts",
    "mellum": "MellumExperts",
    "mimo_v2_flash": "MiMoV2FlashExperts",
    "minimax": "MiniMaxExperts",
    "minimax_m2": "MiniMaxM2Experts",
    "minimax_m3_vl": "MiniMaxM3VLExperts",
    "mistral4": "Mistral4Experts",
    "mistral_large4": "MistralLarge4TextExperts",
    "mixtral": "MixtralExperts",
    "muse_spark": "MuseSparkExperts",
    "nemotron_h": "NemotronHExperts",
    "olmoe": "OlmoeExperts",
    "openai_privacy_filter": "OpenAIPrivacyFilterExperts",
    "phimoe": "PhimoeExperts",
    "qwen2_moe": "Qwen2MoeExperts",
    "qwen3_5_moe": "Qwen3_5MoeExperts",
    "qwen3_moe": "Qwen3MoeExperts",
    "qwen3_next": "Qwen3NextExperts",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerTextExperts",
    "qwen3_vl_moe": "Qwen3VLMoeTextExperts",
    "qwen4_exp": "Qwen4ExpTextExperts",
    "solar_open": "SolarOpenExperts",
    "unlimited_ocr": "UnlimitedOcrTextExperts",
    "zaya": "ZayaExperts",
}

#: Family of the interface -> why it cannot be compressed.
FAILS = {
    "diffusion_gemma": "generates by diffusion: an encoder and a decoder share experts, and no next token is predicted",
    "ernie4_5_vl_moe": "each layer has text and vision experts, mixed in one list on disk",
    "openai_privacy_filter": "a token classifier: no next token is predicted",
}

#: What else there is to know of a family that passes.
NOTES = {
    "aria": "text part; experts fused and transposed on disk",
    "deepseek_ocr2": "text part",
    "dots3_note": "text part; experts of the vision part stay as they are",
    "gemma4": "text part; experts fused on disk",
    "glm4v_moe": "text part",
    "glm5_next": "text part",
    "gpt_oss": "experts fused, transposed, gate and up alternate, biases; the original MXFP4 must be dequantized first",
    "granitemoe": "experts fused on disk",
    "granitemoe_swa": "experts fused on disk",
    "granitemoehybrid": "experts fused on disk; Mamba layers stay as they are",
    "granitemoeshared": "experts fused on disk",
    "hy_v4": "experts fused on disk",
    "inkling": "text part; experts fused on disk, gate and up alternate",
    "inkling2": "text part; experts fused on disk, gate and up alternate",
    "jamba": "Mamba layers stay as they are",
    "minimax_m3_vl": "text part",
    "mistral4": "experts fused on disk",
    "mistral_large4": "text part",
    "muse_spark": "text part; experts fused on disk",
    "nemotron_h": "experts without a gate; Mamba layers stay as they are",
    "qwen3_5_moe": "text part",
    "qwen3_omni_moe": "text part; the thinker alone, not the model with its talker",
    "qwen3_vl_moe": "text part; experts fused on disk",
    "qwen4_exp": "text part",
    "unlimited_ocr": "text part",
    "zaya": "experts fused on disk",
}

#: Families with experts of their own making, outside the interface: none can be compressed.
OUTSIDE = ("dbrx", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "step3p7", "switch_transformers")


def table() -> list[dict[str, Any]]:
    """One row a family: family, experts_class ("" outside the interface), passes, note (why not, or what to know)."""
    inside = [
        {"family": family, "experts_class": experts, "passes": family not in FAILS,
         "note": FAILS.get(family) or NOTES.get(family, "")}
        for family, experts in INTERFACE.items()
    ]  # fmt: skip
    note = "its experts are not behind transformers' experts interface"
    outside = [{"family": family, "experts_class": "", "passes": False, "note": note} for family in OUTSIDE]
    return inside + outside
