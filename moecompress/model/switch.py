"""Switch Transformers (arXiv:2101.03961), which transformers keeps outside its experts interface, brought behind it.

Its experts are modules of their own, asked by one-hot rows, and a token beyond an expert's capacity goes to none. Here the
same weights are two stacked parameters, and such a token is given to expert E, which does not exist: it counts nowhere.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.core_model_loading import MergeModulelist, WeightConverter
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

FAMILY = "switch_transformers"


class SwitchExperts(nn.Module):
    """up_proj [E, m, d], down_proj [E, d, m]; the flags are those of transformers' experts interface."""

    has_gate = has_bias = has_post_expert_norm = is_transposed = False
    is_concatenated = _is_expert_parallel = True  # the latter: experts from E on are sentinels

    def __init__(self, config, like: torch.Tensor):
        super().__init__()
        self.config, self.num_experts, self.act_fn = config, config.num_experts, ACT2FN[config.dense_act_fn]
        self.up_proj = nn.Parameter(like.new_empty(config.num_experts, config.d_ff, config.d_model), requires_grad=False)
        self.down_proj = nn.Parameter(like.new_empty(config.num_experts, config.d_model, config.d_ff), requires_grad=False)

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden [T, d]; chosen [T, 1, E], one-hot or all zeros as Switch's router gives it, or experts [T, 1]; weights [T, 1]."""
        if chosen.dim() == 3:
            chosen = torch.where(chosen.sum(-1) > 0, chosen.argmax(-1), self.num_experts)
        run = ALL_EXPERTS_FUNCTIONS.get_interface(self.config._experts_implementation, grouped_mm_experts_forward)
        return run(self, hidden, chosen, weights)


def adapt(model: nn.Module) -> None:
    """Give a Switch model experts that all others have; nothing happens to a model of another family, or a second time."""
    if getattr(getattr(model, "config", None), "model_type", None) != FAMILY:
        return
    blocks = [module for module in model.modules() if type(module).__name__ == "SwitchTransformersSparseMLP"]
    configs = {id(module): part.config for part in model.modules() if isinstance(part, PreTrainedModel) for module in part.modules()}
    for block in blocks:
        old = block.experts
        if not isinstance(old, SwitchExperts):
            block.experts = SwitchExperts(configs[id(block)], old["expert_0"].wi.weight)
        block._is_hf_initialized = True  # transformers' initialisation would look for the modules that went


def converters(model: nn.Module) -> list[WeightConverter]:
    """How an adapted model's parameters come from the tensors of a checkpoint."""
    if getattr(model.config, "model_type", None) != FAMILY:
        return []
    pairs = {"wi": "up_proj", "wo": "down_proj"}
    return [WeightConverter(source_patterns=f"mlp.experts.expert_*.{old}.weight", target_patterns=f"mlp.experts.{new}",
                            operations=[MergeModulelist(dim=0)]) for old, new in pairs.items()]  # fmt: skip
