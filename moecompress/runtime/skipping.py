"""Waking fewer experts: which of a token's chosen experts are skipped, by what the router gave them.

A policy is a function (weights [T, k], threshold, importance of the layer, scores [T, k]) -> bool [T, k], True where the pair
of token and expert is skipped. Weights are combine weights, after the model's own renormalisation and scaling, in any order;
the threshold is a number, or [T, 1]; scores are what adamoe and otp need besides. Around it, for every policy: tokens that
get much attention may be protected (runtime/attention.py), and tokens of images may have a threshold of their own
(runtime/kinds.py). For dynamic-bits, what is "skipped" are the lower bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError
from torch import nn

from moecompress.errors import UserError
from moecompress.model.anatomy import top_k_of
from moecompress.model.checkpoint import read_config
from moecompress.model.experts import layout_of, resolve, routers
from moecompress.progress import notice
from moecompress.runtime import attention, kinds, pruner, seam
from moecompress.runtime.attention import Received
from moecompress.runtime.kinds import Kinds
from moecompress.runtime.packed import PackedExperts
from moecompress.runtime.pruner import Pruner
from moecompress.runtime.vectors import Vectors

#: The key of config.json that holds a policy. Absent: every chosen expert computes.
KEY = "moecompress_routing"
#: How far the norm of a router may be from the one that thresholds were tuned on: rounding to bfloat16 moves it less.
ROUTER_TOLERANCE = 1e-3


Threshold: TypeAlias = float | torch.Tensor


def odp(weights: torch.Tensor, threshold: Threshold, _importance: float = 1.0, _scores: torch.Tensor | None = None) -> torch.Tensor:
    """Skip every expert whose weight is under ``threshold`` times the token's largest; the largest always computes.

    MC-MoE (arXiv 2410.06270), online dynamic pruning, there for k = 2 and with the layer's median of w1/w0.
    """
    return weights < threshold * weights.amax(-1, keepdim=True)


def naee(weights: torch.Tensor, threshold: Threshold, _importance: float = 1.0, _scores: torch.Tensor | None = None) -> torch.Tensor:
    """Keep only the first expert of a token whose second weight is under ``threshold`` times its first.

    NAEE (arXiv 2402.14800), dynamic skipping: w1 < β w0. The paper has k = 2; with more, all behind the first go together.
    """
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    alone = ordered[:, 1:2] < threshold * ordered[:, :1]  # (T, 1)
    return _behind(alone.expand_as(weights), order)


def top_p(weights: torch.Tensor, threshold: Threshold, _importance: float = 1.0, _scores: torch.Tensor | None = None) -> torch.Tensor:
    """Keep the smallest set of experts whose share of the token's weight reaches ``threshold`` (arXiv 2403.07652).

    The paper's routers are trained for it and choose freely; here the set is a part of the k that the router chose.
    """
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    before = F.pad(ordered.cumsum(-1)[:, :-1], (1, 0))
    return _behind(before >= threshold * ordered.sum(-1, keepdim=True), order)


def modes(weights: torch.Tensor, threshold: Threshold, importance: float = 1.0, _scores: torch.Tensor | None = None) -> torch.Tensor:
    """Skip where importance of the layer × weight is under a threshold; a token may lose all its routed experts.

    MoDES (arXiv 2511.15690). The paper multiplies the router's probability, which is the weight where a family does not
    renormalise, and its importance is the KL of skipping the layer; for ours see route/calibrate.py.
    """
    return importance * weights < threshold


def adamoe(weights: torch.Tensor, threshold: Threshold, _importance: float = 1.0, scores: torch.Tensor | None = None) -> torch.Tensor:
    """Skip every expert whose router logit is under ``threshold``; the largest always computes. scores: logits.

    AdaMoE (arXiv 2406.13233): null experts, which compute nothing, stand in the router's top-k beside the true ones, and
    weights are renormalised over the true ones. There the nulls' logits are learned with the model, and k grows. Here nothing
    is trained: k nulls of a layer have one constant logit, so they take the places of the chosen experts below it.
    """
    assert scores is not None
    first = F.one_hot(weights.argmax(-1), weights.shape[-1]).bool()
    return (scores < threshold) & ~first


def otp(weights: torch.Tensor, threshold: Threshold, _importance: float = 1.0, scores: torch.Tensor | None = None) -> torch.Tensor:
    """Keep the c experts of largest weight, c of the largest score + ``threshold`` × (k − c). scores: of `Pruner`.

    OTP of MC# (arXiv 2510.10962): a learned mask, hard at inference. The threshold is ours: it moves the share that is skipped
    after training; at 0 the masks are as trained.
    """
    assert scores is not None
    k = weights.shape[-1]
    kept = (scores + threshold * torch.arange(k - 1, -1, -1, device=scores.device)).argmax(-1, keepdim=True)  # c − 1
    order = weights.argsort(dim=-1, descending=True, stable=True)
    return _behind(torch.arange(k, device=weights.device) > kept, order)


def compressed_experts(weights: torch.Tensor, threshold: Threshold, _importance: float = 1.0,
                       _scores: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """Keep the ``threshold`` experts of largest weight of every token; vectors stand for the others (runtime/vectors.py).

    Compressed Experts (arXiv 2503.00634). There vectors and model are trained together; here the vectors alone.
    """
    order = weights.argsort(dim=-1, descending=True, stable=True)
    return _behind(torch.arange(weights.shape[-1], device=weights.device).expand_as(weights) >= threshold, order)


def _behind(skipped: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """From ranks back to places, without the first rank. skipped [T, k] by rank, order [T, k]: the place of each rank."""
    skipped = skipped.clone()
    skipped[:, 0] = False
    return torch.zeros_like(skipped).scatter(-1, order, skipped)


Decide = Callable[[torch.Tensor, Any, float, torch.Tensor | None], torch.Tensor]
POLICIES: dict[str, Decide] = {
    "odp": odp, "naee": naee, "top-p": top_p, "modes": modes, "adamoe": adamoe, "otp": otp,
    # D²MoE (arXiv 2504.15299) has a trained router of bits for every expert; here a weight that is small beside the token's
    # largest makes two bits of a nested expert do.
    "dynamic-bits": odp, "compressed-experts": compressed_experts,
}  # fmt: skip
#: Whether the weights of the experts that are left grow to the sum of all, as in the policy's paper (compressed-experts: as was
#: better where both were measured, see route/vectors.py).
RENORMALISE = {"odp": True, "naee": True, "top-p": True, "modes": False, "adamoe": True, "otp": True, "dynamic-bits": False,
               "compressed-experts": False}  # fmt: skip
#: What the policies that learn something keep for a layer.
LEARNED: dict[str, type[Pruner] | type[Vectors]] = {"otp": Pruner, "compressed-experts": Vectors}
#: Share of tokens that are protected, as in the policy's paper; the others protect none.
PROTECT = {"odp": 0.02}


class Guard(BaseModel):
    """Tokens of the importance I = ‖t‖₁ · a or more lose no expert (MC-MoE, arXiv 2410.06270). t: what the experts are given.

    a, by attention: the mean weight that the token gets from itself and all later queries of the call, over heads (threshold
    ``together``). In a call of one query (decoding), where nothing later is known: from itself, times the number of tokens it
    sees, since weights shrink with that (threshold ``alone``). By norm, where a layer has no attention that can be seen: 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    by: Literal["attention", "norm"]
    together: float
    alone: float


class Rule(BaseModel):
    """Parameters of one layer. experts: how many it has. router: Frobenius norm of its router's weight (None: not found).
    vision: threshold of tokens of images and videos (None: the same). guard: which tokens are protected (None: none)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    threshold: float
    importance: float = 1.0
    experts: int
    router: float | None = None
    vision: float | None = None
    guard: Guard | None = None


class Policy(BaseModel):
    """What config.json holds under `KEY`. skip: share of expert calls skipped on the calibration text (dynamic-bits: computed
    on two bits). layers: experts module -> rule. learned: sha256 of the file of what policies of `LEARNED` have."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    version: Literal[1] = 1
    policy: Literal["odp", "naee", "top-p", "modes", "adamoe", "otp", "dynamic-bits", "compressed-experts"]
    renormalise: bool
    top_k: int
    skip: float
    layers: dict[str, Rule]
    learned: str | None = None
    _pruners: Mapping[str, Pruner | Vectors] = PrivateAttr(default_factory=dict)

    def with_pruners(self, pruners: Mapping[str, Pruner | Vectors]) -> Policy:
        """The same, holding what ``learned`` names. ``pruners``: by experts module, as ``layers``; for compressed-experts vectors."""
        if set(pruners) != set(self.layers):
            raise UserError(f"What is in {pruner.FILE} is of other layers", expected=", ".join(self.layers), got=", ".join(pruners),
                            remedy="make the folder again with `moecompress tune-routing`")  # fmt: skip
        self._pruners = pruners
        return self

    @property
    def pruners(self) -> Mapping[str, Pruner | Vectors]:
        return self._pruners


def skip(policy: str, rule: Rule, renormalise: bool, chosen: torch.Tensor, weights: torch.Tensor, scores: torch.Tensor | None = None,
         protected: torch.Tensor | None = None, vision: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """chosen, weights [T, k] -> the same with −1 for skipped experts and new weights (zero where skipped, unless it is bits
    that are skipped). protected, vision: bool [T]."""
    exact = weights.to(torch.promote_types(weights.dtype, torch.float32))
    threshold: Threshold = rule.threshold
    if vision is not None and rule.vision is not None:
        threshold = torch.where(vision, rule.vision, rule.threshold).to(exact)[:, None]
    skipped = POLICIES[policy](exact, threshold, rule.importance, scores)
    if protected is not None:
        skipped &= ~protected[:, None]
    if policy == "dynamic-bits":
        return chosen.masked_fill(skipped, -1), weights
    left = exact.masked_fill(skipped, 0)
    if renormalise:  # exactly × 1 where nothing is skipped
        left = left * (exact.sum(-1, keepdim=True) / left.sum(-1, keepdim=True).clamp_min(1e-20))
    return chosen.masked_fill(skipped, -1), left.to(weights.dtype)


@dataclass
class Skipper:
    """What an experts module asks, called by runtime/seam.py. score: (hidden [T, d], chosen, weights [T, k]) -> [T, k].
    vectors: what stands for the skipped experts, of compressed-experts. counts: grows by (skipped pairs, all pairs) with every
    call, where there is such a list."""

    policy: str
    rule: Rule
    renormalise: bool
    score: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    received: Received | None = None
    kinds: Kinds | None = None
    vectors: Vectors | None = None
    counts: list[tuple[int, int]] | None = None

    def __call__(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = None if self.score is None else self.score(hidden, chosen, weights)
        protected = None if self.rule.guard is None else guarded(self.rule.guard, hidden, self.received)
        vision = None if self.kinds is None else self.kinds.vision(len(hidden))
        left, new = skip(self.policy, self.rule, self.renormalise, chosen, weights, scores, protected, vision)
        if self.counts is not None:
            self.counts.append((int((left < 0).sum()), left.numel()))
        return left, new


def norms(hidden: torch.Tensor) -> torch.Tensor:
    """‖t‖₁ [T] of hidden [T, d], float32."""
    return hidden.abs().sum(-1, dtype=torch.float32)


def guarded(guard: Guard, hidden: torch.Tensor, received: Received | None) -> torch.Tensor:
    """bool [T]: which tokens `Guard` protects. hidden [T, d]."""
    if guard.by == "norm":
        return norms(hidden) >= guard.together
    shown = None if received is None else received.take()
    if shown is None or len(shown[0]) != len(hidden):
        raise UserError("The routing policy protects tokens by attention, and this layer's attention cannot be seen",
                        expected="attention by sdpa or eager, of the tokens that the experts are given", got="another implementation, or a paged cache",
                        remedy='load the model with attn_implementation="sdpa" or "eager", or tune the policy with --protect 0')  # fmt: skip
    together, alone, several = shown
    return norms(hidden) * (together if several else alone) >= (guard.together if several else guard.alone)


def router_logits(router: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """[T, E] of hidden [T, d]: by the router's matrix and, where it has one for every expert, bias."""
    weight: Any = router.weight
    bias = router._parameters.get("bias")
    fits = isinstance(bias, torch.Tensor) and bias.shape == weight.shape[:1]
    return F.linear(hidden.float(), weight.float(), bias.float() if fits and bias is not None else None)


def router_beside(model: nn.Module, name: str) -> nn.Module | None:
    """The router beside the experts ``name``, by structure."""
    found = routers(model.get_submodule(name.rpartition(".")[0]), model.get_submodule(name))
    return found[0] if found else None


def scorer(policy: Policy, model: nn.Module, name: str, listed: str) -> Callable[..., torch.Tensor] | None:
    """What `Skipper.score` is for the experts ``name``, which the policy lists as ``listed``."""
    if policy.policy == "otp":
        one = policy.pruners[listed]
        return lambda hidden, _chosen, weights: one.to(hidden.device)(hidden, weights)
    if policy.policy == "adamoe":
        router = router_beside(model, name)
        if router is None:
            raise UserError(f"There is no router with one logit an expert beside {name}", expected="the model that the policy was tuned on")
        return lambda hidden, chosen, _weights: router_logits(router, hidden).gather(-1, chosen)
    return None


def vectors_for(policy: Policy, model: nn.Module, name: str, listed: str) -> Vectors | None:
    """What `Skipper.vectors` is, likewise."""
    found = policy.pruners.get(listed) if policy.policy == "compressed-experts" else None
    if not isinstance(found, Vectors):
        return None
    module: Any = model.get_submodule(name)
    packed = getattr(module, "packed", None)
    found.check(packed.layout if isinstance(packed, PackedExperts) else layout_of(module), name)
    return found


def apply(model: nn.Module, policy: Policy | dict[str, Any]) -> None:
    """Let ``model``, packed or not, skip experts by ``policy`` (or what config.json holds) from now on.

    UserError if the policy is damaged, or was tuned on a model with other layers, experts or routers.
    """
    if isinstance(policy, dict):
        policy = with_file(parse(policy), Path(getattr(model, "name_or_path", "")))
    names = _rules(model, policy)
    scores = {name: scorer(policy, model, name, listed) for name, (listed, _) in names.items()}
    vectors = {name: vectors_for(policy, model, name, listed) for name, (listed, _) in names.items()}
    if policy.policy == "dynamic-bits":
        _split(model, names)
    remove(model, join=policy.policy != "dynamic-bits")
    seam.register()
    watched = attention.watch(model, [name for name, (_, rule) in names.items() if rule.guard is not None and rule.guard.by == "attention"])
    told = kinds.watch(model) if any(rule.vision is not None for _, rule in names.values()) else None
    for name, (_, rule) in names.items():
        module: Any = model.get_submodule(name)
        module.skipping = Skipper(policy.policy, rule, policy.renormalise, scores[name], watched.get(name), told, vectors[name])
        module.config._experts_implementation = seam.NAME
    setattr(model.config, KEY, policy.model_dump())  # save_pretrained writes it


def _split(model: nn.Module, names: Iterable[str]) -> None:
    """Nested integers of two parts, for dynamic-bits; UserError where none of the experts has such."""
    every = [getattr(model.get_submodule(name), "packed", None) for name in names]
    packed = [one for one in every if isinstance(one, PackedExperts)]
    if not any(one.has_nested() for one in packed):
        raise UserError("No expert has nested integers, so there are no bits to leave out",
                        expected="a folder quantized with a candidate such as {code: nested, bits: 4} (recipes/matryoshka.yaml)",
                        got="other codes" if packed else "an ordinary checkpoint",
                        remedy="quantize so first, or choose a policy that skips whole experts")  # fmt: skip
    for one in packed:
        one.split()


def remove(model: nn.Module, join: bool = True) -> None:
    """Wake every chosen expert again, with all its bits. ``join``: nested integers become whole ones."""
    for module in model.modules():
        module.__dict__.pop("skipping", None)
        if join and isinstance(module, PackedExperts):
            module.join()
    attention.unwatch(model)
    kinds.unwatch(model)
    if hasattr(model.config, KEY):
        delattr(model.config, KEY)


def forget_policy(config: dict[str, Any], fewer: bool, thinner: bool) -> None:
    """Take the policy out of the config.json of a model whose experts are other ones now, and say so. Thresholds and masks are
    about how many experts there are, the vectors of compressed experts also about their neurons."""
    policy = (config.get(KEY) or {}).get("policy")
    if policy is not None and (fewer or (thinner and policy == "compressed-experts")):
        del config[KEY]
        notice("the model's routing policy was tuned for other experts and is left out; see `moecompress tune-routing`")


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
    return None if record is None else with_file(parse(record), folder)


def with_file(policy: Policy, folder: Path) -> Policy:
    """The same policy with what it has learned, from the file in ``folder``."""
    kind = LEARNED.get(policy.policy)
    return policy if kind is None else policy.with_pruners(pruner.read(folder, policy.learned, kind))


def router_norm(model: nn.Module, name: str) -> float | None:
    """Frobenius norm of the router beside the experts ``name``; None where there is none by structure, or no weights."""
    router = router_beside(model, name)
    weight: Any = router.weight if router is not None else None
    return None if weight is None or weight.is_meta else float(weight.detach().float().norm())


def _rules(model: nn.Module, policy: Policy) -> dict[str, tuple[str, Rule]]:
    """Experts module -> its name in the policy, and its rule. Thresholds mean nothing for other layers, experts or routers
    than those they were tuned on."""

    def other(expected: str, got: object) -> UserError:
        return UserError("The routing policy was made for another model", expected=expected, got=got,
                         remedy="tune the policy on this model with `moecompress tune-routing`")  # fmt: skip

    def pattern(name: str) -> str:
        return re.sub(r"\d+", "#", name)

    try:
        rules = {resolve(model, name): (name, rule) for name, rule in policy.layers.items()}
    except UserError as error:
        raise other("rules for modules of this model", error.what) from None
    alike = {pattern(name) for name in rules}
    found = {name for name, _ in model.named_modules() if pattern(name) in alike}
    if found != set(rules):
        raise other(f"rules for {len(found)} layers of experts", f"rules for {len(rules)}")
    top_k = top_k_of(model)
    if top_k not in (None, policy.top_k):
        raise other(f"{top_k} experts per token", policy.top_k)
    for name, (_, rule) in rules.items():
        module: Any = model.get_submodule(name)
        if module.num_experts != rule.experts:
            raise other(f"{module.num_experts} experts in {name}", rule.experts)
        norm = router_norm(model, name)
        if norm is not None and rule.router is not None and abs(norm - rule.router) > ROUTER_TOLERANCE * rule.router:
            raise other(f"a router of norm {norm:.6g} beside {name}", f"{rule.router:.6g}")
    return rules
