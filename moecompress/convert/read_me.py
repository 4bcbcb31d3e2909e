"""Dense Llama-like model → Mixture of Experts whose experts are domains: the neurons that texts of a kind use most.

Read-ME (arXiv:2410.19123): of every feed-forward layer each domain keeps the half of the neurons with the largest mean |activation|.
What all domains keep is the shared expert, what else a domain keeps is its routed expert; a neuron may be in several experts, and
one that no domain keeps is lost. One expert is chosen for a token.

Otherwise than the paper: it has one small transformer on token ids that routes a token the same way in all layers before the model
runs, which no transformers family has a place for; here every layer has its own linear router, a multinomial logistic regression of the
domain on what the layer is given. It trains routers and experts in turns; here down_proj answers for what is left out, by ridge
regression as in CMoE (convert/split.py), and `moecompress distill` can train the result. And a checkpoint has one width for all
layers: the shared expert has the neurons that most domains keep, about as many as all keep on average; where all keep more, the
surplus is copied into every expert, so that for every domain the same neurons compute as in the paper; where all keep fewer,
neurons of most domains are shared, and each domain gives up as many of its least active ones.
Letters: D domains, n neurons of the dense layer, K of them kept for a domain, s shared, m = K − s of a routed expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from scipy.optimize import minimize
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moecompress.convert.dense import (
    BATCH,
    Layer,
    Shape,
    check_dense,
    finish_layer,
    moe_config,
    moe_tensors,
    rebuild,
    save_moe,
)
from moecompress.convert.split import Routing
from moecompress.errors import UserError
from moecompress.evaluate.perplexity import perplexity
from moecompress.progress import track

#: The shared expert is at most this many times as wide as a routed one.
MOST_SHARED = 15
#: Widths of experts are multiples of the first, or grouped products of bfloat16 refuse them; better of the second, which
#: quantization stores in whole groups.
STEP, GROUP = 8, 32
#: Share of a domain's neurons that widths may cost, if that makes them fit better.
SLACK = 0.01
#: Weight of ½‖W‖² beside the mean cross-entropy of a router, on inputs of unit variance.
ROUTER_DECAY = 1e-3
ROUTER_STEPS = 100
#: Share of a domain's sequences that nothing is fitted on.
HELDOUT = 1 / 8


@dataclass(frozen=True)
class Division:
    """Where neurons of a layer go: ``shared`` (s,) and ``experts`` (D, m) are their numbers. common: how many are in all domains'
    sets; lost: how many are in no expert."""

    shared: Tensor
    experts: Tensor
    common: int
    lost: int


@torch.inference_mode()
def convert_read_me(model: PreTrainedModel, domains: Sequence[Tensor], out_dir: Path, tokenizer: Any, *, share: float = 0.5,
                    dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:  # fmt: skip
    """Write ``model`` as a Mixture of Experts of one expert a domain to ``out_dir``, with the tokenizer if there is one; a report.

    ``domains``: tokens of each domain, int64 [N, L], N ≥ 2; an eighth of the sequences only measures. ``share``: of the neurons that a
    domain keeps. ``dtype``: of the written weights. One domain alone gets two equal experts, since the family (glm4_moe) knows no
    layer of one. The model is not changed. Raises UserError if the model is not a dense Llama-like one or the numbers do not fit.
    """
    check_dense(model)
    _check(domains, share)
    domains = list(domains) * 2 if len(domains) == 1 else list(domains)
    unseen = [ids[: max(1, round(HELDOUT * len(ids)))] for ids in domains]
    used = [ids[len(out) :] for ids, out in zip(domains, unseen, strict=True)]
    active = activity(model, used)  # (layers, D, n)
    shape = widths(active, share)
    divisions = [divide(each, shape) for each in active]
    labels = torch.cat([torch.full((ids.numel(),), number) for number, ids in enumerate(used)])
    parts = iter(divisions)
    layers, facts = rebuild(model, torch.cat(used), lambda mlp, x: convert_layer(mlp, x, labels, next(parts), shape))
    save_moe(model, moe_config(model, shape), [moe_tensors(layer, shape, dtype) for layer in layers], out_dir, tokenizer, dtype)
    dense = model.config.intermediate_size
    return {
        "family": "glm4_moe",
        "experts": shape.experts,
        "top_k": 1,
        "expert_width": shape.width,
        "shared_width": shape.shared,
        "dense_width": dense,
        "active_fraction": (shape.shared + shape.width) / dense,
        "stored_fraction": (shape.shared + shape.experts * shape.width) / dense,
        "lost_fraction": sum(each.lost for each in divisions) / (dense * len(divisions)),
        "common_fraction": sum(each.common for each in divisions) / (dense * len(divisions)),
        "calibration_tokens": len(labels),
        "perplexity": compared(model, out_dir, unseen),
        "layers": [{"layer": number, **each} for number, each in enumerate(facts)],
    }  # fmt: skip


def _check(domains: Sequence[Tensor], share: float) -> None:
    if not domains or min(len(ids) for ids in domains) < 2:
        raise UserError("A domain has too little text", expected="2 or more sequences of every domain, one of them to measure on",
                        got=", ".join(str(len(ids)) for ids in domains) or "no domain", remedy="give more text, or fewer domains")  # fmt: skip
    if not 0 < share <= 1:
        raise UserError("Impossible share of neurons", expected="above 0, at most 1", got=share)


def activity(model: PreTrainedModel, domains: Sequence[Tensor]) -> Tensor:
    """Mean |activation| of every neuron on each domain's tokens, float64 (layers, D, n): what enters down_proj."""
    blocks: Any = model.model.layers
    sums = torch.zeros(len(blocks), len(domains), model.config.intermediate_size, dtype=torch.float64)

    def add(number: int, domain: int, _module: Any, args: tuple[Tensor, ...]) -> None:
        sums[number, domain] += args[0].abs().double().sum((0, 1)).cpu()

    batches = [(number, batch) for number, ids in enumerate(domains) for batch in ids.split(BATCH)]
    for domain, batch in track(batches, "activations", len(batches)):
        handles = [block.mlp.down_proj.register_forward_pre_hook(partial(add, number, domain)) for number, block in enumerate(blocks)]
        try:
            model.model(input_ids=batch.to(model.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
    return sums / torch.tensor([ids.numel() for ids in domains])[:, None]


def most_active(activity: Tensor, kept: int) -> Tensor:
    """Each domain's set: bool (…, D, n), True at the ``kept`` neurons of the largest activity (…, D, n)."""
    return torch.zeros_like(activity, dtype=torch.bool).scatter(-1, activity.topk(kept, dim=-1).indices, True)


def widths(active: Tensor, share: float) -> Shape:
    """Widths for all layers: K = share · n, less what does not divide, and s the multiple of m that is nearest to what all domains have
    in common on average. active: (layers, D, n). UserError if that leaves nothing."""
    domains, dense = active.shape[1:]
    kept = round(share * dense)
    common = float(most_active(active, kept).all(-2).sum(-1).double().mean()) if kept else 0.0
    every = [(times, kept // (times + 1) // STEP * STEP) for times in range(1, MOST_SHARED + 1)]
    found = [(times * width, width) for times, width in every if width]
    if not found:
        raise UserError("A domain would keep too few neurons", expected=f"{2 * STEP} or more", got=kept, remedy="choose a larger --share")
    slack = 0 if kept == dense else SLACK * kept

    def misfit(pair: tuple[int, int]) -> tuple[float, bool, float]:
        missing = kept - sum(pair)
        return missing if missing > slack else 0, pair[1] % GROUP > 0, abs(pair[0] - common)

    shared, width = min(found, key=misfit)
    return Shape(domains, 1, shared, width)


def divide(active: Tensor, shape: Shape) -> Division:
    """The neurons of one layer; active: (D, n). Shared are those in most domains' sets, of equally many the more active ones; of
    a domain's other neurons its expert gets the most active."""
    inside = most_active(active, shape.shared + shape.width)
    relative = (active / active.sum(1, keepdim=True).clamp_min(1e-30)).mean(0)  # below 1: only among equal numbers of sets
    shared = (inside.sum(0) + relative).topk(shape.shared).indices.sort().values
    others = active.index_fill(1, shared, -1.0).topk(shape.width, dim=1).indices.sort(dim=1).values  # (D, m)
    placed = torch.cat([shared, others.flatten()]).unique()
    return Division(shared, others, int(inside.all(0).sum()), active.shape[1] - len(placed))


def convert_layer(mlp: Any, x: Tensor, labels: Tensor, division: Division, shape: Shape) -> tuple[Layer, dict[str, Any], Tensor]:
    """One feed-forward layer whose inputs are ``x`` (T, d), of the domains ``labels`` (T,): the layer, its facts, its new outputs (T, d)."""
    gate, up, down = (p.weight.float() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    order = torch.cat([division.shared, division.experts.flatten()])
    h = mlp.act_fn(x @ gate.T) * (x @ up.T)  # (T, n)
    target = h @ down.T
    routing = fit_domains(x, labels, shape.experts)
    down, facts, outputs = finish_layer(x, h[:, order], target, down[:, order], routing, shape)
    right = float((routing.scores(x).argmax(1) == labels).float().mean())
    facts |= {"right_domain": right, "common": division.common, "lost": division.lost}
    return Layer(gate[order], up[order], down, routing), facts, outputs


def fit_domains(x: Tensor, labels: Tensor, domains: int) -> Routing:
    """Multinomial logistic regression of the domain ``labels`` (T,) on x (T, d), by L-BFGS."""
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-6)
    standard = (x - mean) / spread
    wanted = torch.nn.functional.one_hot(labels, domains).float()

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        both = torch.from_numpy(flat).float().view(domains, -1)  # (D, d + 1): weights and bias
        weight, bias = both[:, :-1], both[:, -1]
        logs = (standard @ weight.T + bias).log_softmax(1)
        miss = (logs.exp() - wanted) / len(x)
        value = -(logs * wanted).sum() / len(x) + ROUTER_DECAY / 2 * weight.square().sum()
        slope = torch.cat([miss.T @ standard + ROUTER_DECAY * weight, miss.sum(0)[:, None]], dim=1)
        return float(value), slope.double().flatten().numpy()

    found = minimize(loss, np.zeros(domains * (x.shape[1] + 1)), jac=True, method="L-BFGS-B", options={"maxiter": ROUTER_STEPS}).x
    both = torch.from_numpy(found).view(domains, -1)
    weight = (both[:, :-1] / spread.double()).float()
    return Routing(weight, (both[:, -1] - (both[:, :-1] / spread.double()) @ mean.double()).float(), float((x @ weight.T).abs().max()))


def compared(model: PreTrainedModel, folder: Path, unseen: Sequence[Tensor]) -> dict[str, Any]:
    """Perplexity of the dense model and of the one in ``folder`` on held-out sequences, of all domains and of each."""
    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(model.device).eval()
    rows = [{name: perplexity(each, ids.to(model.device), f"{name} on domain {number}") for name, each in (("dense", model), ("moe", made))}
            for number, ids in enumerate(unseen)]  # fmt: skip
    counts = [ids.shape[0] * (ids.shape[1] - 1) for ids in unseen]
    both = {name: float(np.exp(np.average(np.log([row[name] for row in rows]), weights=counts))) for name in ("dense", "moe")}
    return both | {"domains": rows}


@torch.inference_mode()
def cluster(model: PreTrainedModel, ids: Tensor, count: int, seed: int = 0) -> list[Tensor]:
    """``count`` domains of one text: its sequences [N, L] grouped by k-means of their mean last hidden state. UserError if a group has
    fewer than 2."""
    if count < 2 or count > len(ids) // 2:
        raise UserError("The text cannot be cut into that many domains", expected=f"2 to {len(ids) // 2}, of {len(ids)} sequences", got=count,
                        remedy="give more sequences (--sequences), or fewer domains")  # fmt: skip
    body: Any = model.model
    rows = [body(input_ids=batch.to(model.device), use_cache=False).last_hidden_state.float().mean(1).cpu() for batch in ids.split(BATCH)]
    features = torch.cat(rows)
    _, labels = kmeans2((features - features.mean(0)).double().numpy(), count, minit="++", seed=seed)
    sizes = np.bincount(labels, minlength=count)
    if sizes.min() < 2:
        raise UserError("The text does not fall into that many domains", expected="2 or more sequences in each of them",
                        got=", ".join(map(str, sorted(sizes, reverse=True))), remedy="choose fewer --domains, more --sequences or another --seed")  # fmt: skip
    return [ids[torch.from_numpy(labels == number)] for number in range(count)]
