"""Conversion of tiny random models, judged by transformers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moecompress.convert.dense import check_shape, convert_dense, default_shape
from moecompress.errors import UserError

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama tied, scaled rope": (LlamaForCausalLM, LlamaConfig,
                                {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None, "head_dim": 24}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32, "rms_norm_eps": 1e-5}),
}  # fmt: skip


def tiny(model: Any, config: Any, **changes: Any) -> PreTrainedModel:
    settings: dict[str, Any] = {
        "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    made = model(config(**(settings | changes))).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(61, (10, 48), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


def reload(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_active_is_the_dense_model(family: str, ids: torch.Tensor, tmp_path: Path) -> None:
    cls, config, changes = FAMILIES[family]
    dense = tiny(cls, config, **changes)
    before = {name: p.clone() for name, p in dense.state_dict().items()}
    convert_dense(dense, ids, tmp_path, None, experts=4, top_k=4, shared=32, dtype=torch.float32)
    assert all(torch.equal(p, before[name]) for name, p in dense.state_dict().items())
    moe = reload(tmp_path)
    assert moe.config.model_type == "glm4_moe" and len(moe.model.layers[0].mlp.experts.down_proj) == 4
    want = logits(dense, ids)
    torch.testing.assert_close(logits(moe, ids), want, atol=2e-6 * float(want.abs().max()), rtol=0)


def test_the_checkpoint_computes_what_was_fitted(ids: torch.Tensor, tmp_path: Path) -> None:
    dense = tiny(LlamaForCausalLM, LlamaConfig)
    report = convert_dense(dense, ids, tmp_path, None, experts=4, top_k=3, shared=32, dtype=torch.float32)
    moe = reload(tmp_path)
    chosen: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []

    def record(module: Any, args: Any, output: Any) -> None:
        weights.append(output[1])
        chosen.append(output[2])

    for layer in moe.model.layers:
        layer.mlp.gate.register_forward_hook(record)
    got = logits(moe, ids)
    for facts, index, weight in zip(report["layers"], chosen, weights, strict=True):
        usage = index.flatten().bincount(minlength=4) / len(index)
        assert min(facts["usage"]) > 0, "an expert that no token reaches"
        # float32 sigmoids near 1/2 may swap two experts whose scores are all but equal
        assert usage.tolist() == pytest.approx(facts["usage"], abs=0.01)
        assert float((weight - 1).abs().max()) < 0.004
        assert facts["error"] < facts["error_before_refit"] < 0.3
    want = logits(dense, ids)
    assert float((got - want).norm() / want.norm()) < 0.3
    assert report["active_fraction"] == pytest.approx((32 + 3 * 16) / 96)


def test_bfloat16_keeps_the_selection_bias_exact(ids: torch.Tensor, tmp_path: Path) -> None:
    dense = tiny(LlamaForCausalLM, LlamaConfig)
    convert_dense(dense, ids, tmp_path, None, experts=4, top_k=3, shared=32)
    moe = reload(tmp_path, "auto")  # type: ignore[arg-type]
    gate = moe.model.layers[0].mlp.gate
    assert gate.weight.dtype == torch.bfloat16 and gate.e_score_correction_bias.dtype == torch.float32
    want = logits(dense, ids)
    assert float((logits(moe, ids).float() - want).norm() / want.norm()) < 0.3


def test_same_seed_same_checkpoint(ids: torch.Tensor, tmp_path: Path) -> None:
    dense = tiny(LlamaForCausalLM, LlamaConfig)
    for name in ("a", "b"):
        convert_dense(dense, ids, tmp_path / name, None, experts=4, top_k=2, shared=32, seed=5)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_what_cannot_be_converted_is_refused() -> None:
    moe = tiny(Qwen3MoeForCausalLM, Qwen3MoeConfig, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    with pytest.raises(UserError, match="Mixture of Experts already"):
        check_shape(moe, 4, 2, 32)
    ungated = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=61))
    with pytest.raises(UserError, match="cannot convert a model of type 'gpt2'"):
        check_shape(ungated, 4, 2, 32)
    biased = tiny(LlamaForCausalLM, LlamaConfig, mlp_bias=True)
    with pytest.raises(UserError, match="biases"):
        check_shape(biased, 4, 2, 32)
    sliding = tiny(MistralForCausalLM, MistralConfig, sliding_window=16)
    with pytest.raises(UserError, match="sliding"):
        check_shape(sliding, 4, 2, 32)


@pytest.mark.parametrize(("experts", "top_k", "shared"), [(4, 2, 30), (4, 2, 0), (4, 5, 32), (1, 1, 48), (5, 2, 32)])
def test_numbers_that_do_not_fit_are_refused(experts: int, top_k: int, shared: int) -> None:
    with pytest.raises(UserError, match=r"fit|divided"):
        check_shape(tiny(LlamaForCausalLM, LlamaConfig), experts, top_k, shared)


def test_default_shape() -> None:
    shape = default_shape(tiny(LlamaForCausalLM, LlamaConfig), 4)
    assert (shape.shared, shape.width, shape.top_k) == (32, 16, 2)
    assert shape.active_fraction <= 0.75
