"""Rewrite the demo's Mixture of Experts as qwen2_moe, for tools that cannot read glm4_moe.

    python tests/benchmarks/demo_as_qwen2_moe.py moecompress-demo/moe OUT

qwen2_moe has no selection bias, so the router loses it and some tokens go to other experts: it is another model of the same
weights, good for comparing compressors with each other. Everything else is exact up to rounding: combine weights are 1/k
instead of 1, made up for in down_proj; the shared expert's gate is a sigmoid of zero, made up for by a factor of two.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM


def rewrite(source: Path, out: Path) -> None:
    old = json.loads((source / "config.json").read_text())
    width, top_k = old["moe_intermediate_size"], old["num_experts_per_tok"]
    config = Qwen2MoeConfig(
        **{name: old[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                                        "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
                                        "bos_token_id", "eos_token_id", "pad_token_id", "moe_intermediate_size", "num_experts_per_tok")},
        rope_parameters={"rope_type": "default", "rope_theta": old["rope_parameters"]["rope_theta"]}, qkv_bias=False,
        num_experts=old["n_routed_experts"], norm_topk_prob=True, shared_expert_intermediate_size=old["n_shared_experts"] * width,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config).bfloat16()
    tensors = load_file(source / "model.safetensors")
    state = model.state_dict()
    for name, target in state.items():
        layer = name.rpartition(".mlp.")[0] + ".mlp."
        if name.endswith("mlp.experts.gate_up_proj"):
            rows = [[tensors[f"{layer}experts.{e}.{x}_proj.weight"] for x in ("gate", "up")] for e in range(config.num_experts)]
            target.copy_(torch.stack([torch.cat(pair) for pair in rows]))
        elif name.endswith("mlp.experts.down_proj"):
            target.copy_(top_k * torch.stack([tensors[f"{layer}experts.{e}.down_proj.weight"] for e in range(config.num_experts)]))
        elif name.endswith("shared_expert_gate.weight"):
            target.zero_()
        elif ".shared_expert." in name:
            factor = 2 if "down_proj" in name else 1
            target.copy_(factor * tensors[name.replace("shared_expert", "shared_experts")])
        else:
            target.copy_(tensors["model.embed_tokens.weight" if name == "lm_head.weight" else name])
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


if __name__ == "__main__":
    rewrite(Path(sys.argv[1]), Path(sys.argv[2]))
