"""Keeping experts in use: the load-balance loss of the Switch Transformer, for any family."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moecompress.errors import UserError
from moecompress.model.anatomy import ROUTER, Anatomy


class Balance:
    """Watches the routers of ``model`` while it is trained. ``take`` after a forward pass gives its loss.

    Of each layer: E Σ_e f_e P_e, with f_e the share of the expert calls that go to expert e and P_e the mean over tokens of
    softmax(W x)_e (arXiv:2101.03961, eq. 4 to 6; top-k calls are counted alike). 1 where all experts are used alike. Only the
    router's matrix counts: whatever a family does with its logits, their order is meant to change.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy):
        self.inputs: dict[int, torch.Tensor] = {}  # layer -> what its router was given
        self.losses: list[torch.Tensor] = []
        for moe in anatomy.moe.values():
            router = next((i.target for i in anatomy.tensors if i.role == ROUTER and i.layer == moe.layer
                           and i.shape == (moe.layout.experts, moe.layout.hidden)), None)  # fmt: skip
            if router is None:
                raise UserError(f"layer {moe.layer} has no router that can be balanced", expected="one matrix from hidden states to experts",
                                remedy="leave --balance out")  # fmt: skip
            gate = model.get_submodule(router.removesuffix(".weight"))
            experts = model.get_submodule(moe.module)
            gate.register_forward_pre_hook(self._keep_input(moe.layer), with_kwargs=True)
            experts.register_forward_pre_hook(self._count(moe.layer, gate, moe.layout.experts), with_kwargs=True)

    def _keep_input(self, layer: int) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.is_grad_enabled():
                self.inputs[layer] = args[0] if args else kwargs["hidden_states"]

        return keep

    def _count(self, layer: int, gate: Any, experts: int) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not torch.is_grad_enabled():
                return
            chosen = args[1] if len(args) > 1 else kwargs["top_k_index"]
            x = self.inputs.pop(layer, None)
            if x is None:
                raise UserError(f"layer {layer} has no router that can be balanced", expected="one that is asked before its experts",
                                remedy="leave --balance out")  # fmt: skip
            shares = F.one_hot(chosen.reshape(-1), experts).float().mean(0)
            wanted = F.linear(x.float(), gate.weight.float()).softmax(-1).reshape(-1, experts).mean(0)
            self.losses.append(experts * (shares * wanted).sum())

        return count

    def take(self) -> torch.Tensor:
        """Mean of the layers' losses since the last time."""
        losses, self.losses = self.losses, []
        return torch.stack(losses).mean()
