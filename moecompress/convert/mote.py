"""Dense Llama-like model → Mixture of Experts to be trained: every feed-forward block stays, and experts are added to it.

The layout of MoTE (arXiv:2506.14435): the dense block is the shared expert, top-1 routed experts start as copies of it. The
paper adds the chosen copy at its full weight and trains for long; here a copy starts with a small combine weight, so that the
model is nearly the dense one before it is trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moecompress.convert.dense import Shape, check_dense, moe_config, save_moe
from moecompress.errors import UserError

#: Combine weight that a chosen expert starts with. The smaller it is, the closer is the start to the dense model, and the slower
#: is the training: on a tiny model of perplexity 16.87, 100 steps went from 16.87 to 16.67 with 0.05, from 16.91 to 16.15 with
#: 0.3 and from 17.27 to 15.93 with 1.
WEIGHT = 0.3
#: Standard deviation of the router's weights: that of a new router in transformers.
ROUTER_STD = 0.02


@torch.inference_mode()
def upcycle(model: PreTrainedModel, out_dir: Path, tokenizer: Any, *, experts: int = 4, weight: float = WEIGHT, seed: int = 0,
            dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:  # fmt: skip
    """Write ``model`` with ``experts`` routed experts a layer, one of them active, to ``out_dir``; returns a report.

    ``weight``: of the chosen expert beside the shared one, where its logit is zero; 2 · weight · sigmoid(logit) elsewhere.
    0 is the dense model exactly, but no training would change that. ``seed``: of the routers. The model is not changed.
    Raises UserError if the model is not a dense Llama-like one or the numbers do not fit.
    """
    check_dense(model)
    if experts < 2 or weight <= 0:
        raise UserError("these experts do not fit", expected="2 or more experts of a weight above 0", got=f"{experts} experts, weight {weight:g}")
    generator = torch.Generator().manual_seed(seed)
    width = model.config.intermediate_size
    shape = Shape(experts, 1, width, width)
    layers = [copies(block.mlp, experts, generator, dtype) for block in model.model.layers]
    save_moe(model, moe_config(model, shape, weight), layers, out_dir, tokenizer, dtype)
    return {
        "family": "glm4_moe",
        "experts": experts,
        "top_k": 1,
        "expert_width": width,
        "shared_width": width,
        "weight": weight,
        "layers": [{"layer": number} for number in range(len(layers))],
    }


def copies(mlp: Any, experts: int, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters of a Glm4MoeMoE module whose shared expert and routed experts are all the dense block, by name."""
    gate, up, down = (p.weight.to(dtype) for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    router = ROUTER_STD * torch.randn(experts, gate.shape[1], generator=generator)
    return {
        "experts.gate_up_proj": torch.cat([gate, up]).repeat(experts, 1, 1),  # (E, 2m, d)
        "experts.down_proj": down.repeat(experts, 1, 1),  # (E, d, m)
        "shared_experts.gate_proj.weight": gate,
        "shared_experts.up_proj.weight": up,
        "shared_experts.down_proj.weight": down,
        "gate.weight": router.to(dtype),
        "gate.e_score_correction_bias": torch.zeros(experts),
    }
