"""Waking fewer experts: which of a token's chosen experts are skipped, by the combine weights that the router gave them.

A policy is a function (weights [T, k], threshold, importance of the layer) -> bool [T, k], True where the pair of token
and expert is skipped. Weights are combine weights, after the model's own renormalisation and scaling, in any order.
The policies see nothing else: the parts of their papers that need attention or the kind of a token are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from moecompress.errors import UserError
from moecompress.model.anatomy import top_k_of
from moecompress.model.checkpoint import read_config
from moecompress.model.experts import resolve, routers
from moecompress.runtime import seam

#: The key of config.json that holds a policy. Absent: every chosen expert computes.
KEY = "moecompress_routing"
#: How far the norm of a router may be from the one that thresholds were tuned on: rounding to bfloat16 moves it less.
ROUTER_TOLERANCE = 1e-3


def odp(weights: torch.Tensor, threshold: float, _importance: float = 1.0) -> torch.Tensor:
    """Skip every expert whose weight is under ``threshold`` times the token's largest; the largest always computes.

    MC-MoE (arXiv 2410.06270), online dynamic pruning, there for k = 2 and with the layer's median of w1/w0. Its
    protection of tokens that get much attention is left out: experts see no attention.
    """
    return weights < threshold * weights.amax(-1, keepdim=True)


def naee(weights: torch.Tensor, threshold: float, _importance: float = 1.0) -> torch.Tensor:
    """Keep only the first expert of a token whose second weight is under ``threshold`` times its first.

    NAEE (arXiv 2402.14800), dynamic skipping: w1 < β w0. The paper has k = 2; with more, all behind the first go together.
    """
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    alone = ordered[:, 1:2] < threshold * ordered[:, :1]  # (T, 1)
    skipped = alone.expand_as(weights).clone()
    skipped[:, 0] = False
    return torch.zeros_like(skipped).scatter(-1, order, skipped)


def top_p(weights: torch.Tensor, threshold: float, _importance: float = 1.0) -> torch.Tensor:
    """Keep the smallest set of experts whose share of the token's weight reaches ``threshold`` (arXiv 2403.07652).

    The paper's routers are trained for it and choose freely; here the set is a part of the k that the router chose.
    """
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    before = F.pad(ordered.cumsum(-1)[:, :-1], (1, 0))
    skipped = before >= threshold * ordered.sum(-1, keepdim=True)
    skipped[:, 0] = False
    return torch.zeros_like(skipped).scatter(-1, order, skipped)


def modes(weights: torch.Tensor, threshold: float, importance: float = 1.0) -> torch.Tensor:
    """Skip where importance of the layer × weight is under a threshold; a token may lose all its routed experts.

    MoDES (arXiv 2511.15690), one threshold, for text. The paper multiplies the router's probability, which is the weight
    where a family does not renormalise, and its importance is the KL of skipping the layer; for ours see route/calibrate.py.
    """
    return importance * weights < threshold


POLICIES: dict[str, Callable[[torch.Tensor, float, float], torch.Tensor]] = {
    "odp": odp, "naee": naee, "top-p": top_p, "modes": modes,
}  # fmt: skip
#: Whether the weights of the experts that are left grow to the sum of all, as in the policy's paper.
RENORMALISE = {"odp": True, "naee": True, "top-p": True, "modes": False}


class Rule(BaseModel):
    """Parameters of one layer. experts: how many it has. router: Frobenius norm of its router's weight (None: not found)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    threshold: float
    importance: float = 1.0
    experts: int
    router: float | None = None


class Policy(BaseModel):
    """What config.json holds under `KEY`. skip: share of expert calls skipped on the calibration text. layers: experts
    module -> rule."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    version: Literal[1] = 1
    policy: Literal["odp", "naee", "top-p", "modes"]
    renormalise: bool
    top_k: int
    skip: float
    layers: dict[str, Rule]


def skip(policy: str, rule: Rule, renormalise: bool, chosen: torch.Tensor, weights: torch.Tensor
         ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """chosen, weights [T, k] -> the same with −1 for skipped experts and new weights (zero where skipped)."""
    exact = weights.to(torch.promote_types(weights.dtype, torch.float32))
    skipped = POLICIES[policy](exact, rule.threshold, rule.importance)
    left = exact.masked_fill(skipped, 0)
    if renormalise:  # exactly × 1 where nothing is skipped
        left = left * (exact.sum(-1, keepdim=True) / left.sum(-1, keepdim=True).clamp_min(1e-20))
    return chosen.masked_fill(skipped, -1), left.to(weights.dtype)


def apply(model: nn.Module, policy: Policy | dict[str, Any]) -> None:
    """Let ``model``, packed or not, skip experts by ``policy`` (or what config.json holds) from now on.

    UserError if the policy is damaged, or was tuned on a model with other layers, experts or routers.
    """
    if isinstance(policy, dict):
        policy = parse(policy)
    names = _rules(model, policy)
    seam.register()
    for name, rule in names.items():
        module: Any = model.get_submodule(name)
        module.skipping = partial(skip, policy.policy, rule, policy.renormalise)  # called by runtime/seam.py
        module.config._experts_implementation = seam.NAME
    setattr(model.config, KEY, policy.model_dump())  # save_pretrained writes it


def remove(model: nn.Module) -> None:
    """Wake every chosen expert again."""
    for module in model.modules():
        module.__dict__.pop("skipping", None)
    if hasattr(model.config, KEY):
        delattr(model.config, KEY)


def parse(record: Any) -> Policy:
    try:
        return Policy.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (KEY, *first["loc"])))
        raise UserError("The routing policy is damaged", expected=f"{where}: {first['msg']}", got=repr(first["input"])[:80],
                        remedy="make the folder again with `moecompress tune-routing`") from None  # fmt: skip


def read_policy(folder: Path) -> Policy | None:
    """The policy in a folder's config.json, if there is one."""
    record = read_config(folder).get(KEY)
    return None if record is None else parse(record)


def router_norm(model: nn.Module, name: str) -> float | None:
    """Frobenius norm of the router beside the experts ``name``; None where there is none by structure, or no weights."""
    found = routers(model.get_submodule(name.rpartition(".")[0]), model.get_submodule(name))
    weight: Any = found[0].weight if found else None
    return None if weight is None or weight.is_meta else float(weight.detach().float().norm())


def _rules(model: nn.Module, policy: Policy) -> dict[str, Rule]:
    """Experts module -> rule. Thresholds mean nothing for other layers, experts or routers than those they were tuned on."""

    def other(expected: str, got: object) -> UserError:
        return UserError("The routing policy was made for another model", expected=expected, got=got,
                         remedy="tune the policy on this model with `moecompress tune-routing`")  # fmt: skip

    def pattern(name: str) -> str:
        return re.sub(r"\d+", "#", name)

    try:
        rules = {resolve(model, name): rule for name, rule in policy.layers.items()}
    except UserError as error:
        raise other("rules for modules of this model", error.what) from None
    alike = {pattern(name) for name in rules}
    found = {name for name, _ in model.named_modules() if pattern(name) in alike}
    if found != set(rules):
        raise other(f"rules for {len(found)} layers of experts", f"rules for {len(rules)}")
    top_k = top_k_of(model)
    if top_k not in (None, policy.top_k):
        raise other(f"{top_k} experts per token", policy.top_k)
    for name, rule in rules.items():
        module: Any = model.get_submodule(name)
        if module.num_experts != rule.experts:
            raise other(f"{module.num_experts} experts in {name}", rule.experts)
        norm = router_norm(model, name)
        if norm is not None and rule.router is not None and abs(norm - rule.router) > ROUTER_TOLERANCE * rule.router:
            raise other(f"a router of norm {norm:.6g} beside {name}", f"{rule.router:.6g}")
    return rules
