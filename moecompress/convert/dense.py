"""Dense Llama-like model → Mixture-of-Experts checkpoint, layer by layer, without training.

Each layer is fitted on what the already converted layers before it deliver. The result is an ordinary ``glm4_moe``
checkpoint: half-split rotary embedding over the whole head, optional query/key norms and biases, sigmoid router with a
selection bias, shared experts. With all experts active it is the dense model again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, PreTrainedModel

from moecompress.convert.split import (
    Routing,
    balanced_clusters,
    choose_shared,
    expert_strength,
    fit_routing,
    foreseeable,
    neuron_importance,
    reach_all,
    refit_down,
)
from moecompress.errors import UserError
from moecompress.progress import track

#: Architectures whose attention and norms glm4_moe represents exactly, and whether they normalise queries and keys.
DENSE_FAMILIES = {"llama": False, "mistral": False, "qwen2": False, "qwen3": True}
#: Largest router logit on the calibration text. Combine weights are 2·sigmoid(logit), so they stay within 0.2 % of 1,
#: while float32 near 0.5 still resolves a few thousandths of the typical difference between two experts.
LOGIT_CEILING = 2.0**-8
CLUSTER_ROUNDS = 2
ROUTER_DAMPING = 1e-2
DOWN_DAMPING = 1e-1
LEAST_USAGE = 0.1  # of the even share: an expert that nothing reaches would be dead weight
BATCH = 8  # sequences that run through a layer at once


@dataclass(frozen=True)
class Shape:
    """How a feed-forward layer is divided, in neurons: ``shared + experts · width`` is the dense width."""

    experts: int
    top_k: int
    shared: int
    width: int

    @property
    def active_fraction(self) -> float:
        return (self.shared + self.top_k * self.width) / (self.shared + self.experts * self.width)


@dataclass(frozen=True)
class Layer:
    """A converted layer's weights; neurons are ordered: shared ones first, then expert by expert."""

    gate: Tensor  # (n, d)
    up: Tensor  # (n, d)
    down: Tensor  # (d, n)
    routing: Routing


@torch.inference_mode()
def convert_dense(
    model: PreTrainedModel,
    sequences: Tensor,
    out_dir: Path,
    tokenizer: Any,
    *,
    experts: int,
    top_k: int,
    shared: int,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Write ``model`` as a Mixture of Experts to ``out_dir``, with the tokenizer if there is one; returns a report.

    ``sequences``: calibration tokens, int64 [N, L]. ``experts``, ``top_k``: routed experts of a layer and how many of
    them compute for a token. ``shared``: neurons that compute for every token; a multiple of the experts' width
    (dense width − shared) / experts. ``dtype``: of the written weights. The model is not changed.
    Raises UserError if the model is not a dense Llama-like one or the widths do not fit.
    """
    shape = check_shape(model, experts, top_k, shared)
    generator = torch.Generator().manual_seed(seed)
    converted, each = rebuild(model, sequences, lambda mlp, x: convert_layer(mlp, x, shape, generator))
    layers = [{"layer": number, **facts} for number, facts in enumerate(each)]
    save_moe(model, moe_config(model, shape), [moe_tensors(layer, shape, dtype) for layer in converted], out_dir, tokenizer, dtype)
    return {
        "family": "glm4_moe",
        "experts": shape.experts,
        "top_k": shape.top_k,
        "expert_width": shape.width,
        "shared_width": shape.shared,
        "active_fraction": shape.active_fraction,
        "routed_fraction": 1 - shape.shared / (shape.shared + shape.experts * shape.width),
        "calibration_tokens": sequences.numel(),
        "least_used_share": min(min(facts["usage"]) for facts in layers),
        "most_used_share": max(max(facts["usage"]) for facts in layers),
        "layers": layers,
    }


def rebuild(model: PreTrainedModel, sequences: Tensor, convert: Callable[[Any, Tensor], tuple[Layer, dict[str, Any], Tensor]]
            ) -> tuple[list[Layer], list[dict[str, Any]]]:  # fmt: skip
    """Every layer converted on what the converted layers before it deliver, and its facts. sequences: tokens [N, L]. convert:
    feed-forward part and its inputs (T, d) -> the new layer, facts, its outputs (T, d)."""
    hidden, arguments = _into_first_layer(model, list(sequences.split(BATCH)))
    converted: list[Layer] = []
    layers: list[dict[str, Any]] = []
    for block in track(model.model.layers, "converting layers"):
        x = _after_attention(block, hidden, arguments)
        layer, facts, outputs = convert(block.mlp, x)
        for batch, part in zip(hidden, outputs.split([b.shape[0] * b.shape[1] for b in hidden]), strict=True):
            batch += part.view_as(batch)
        converted.append(layer)
        layers.append(facts)
    return converted, layers


def convert_layer(
    mlp: Any, x: Tensor, shape: Shape, generator: torch.Generator
) -> tuple[Layer, dict[str, Any], Tensor]:
    """Divide one feed-forward layer whose inputs are ``x`` (T, d): the layer, its facts, its new outputs (T, d)."""
    gate, up, down = (p.weight.float() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    h = mlp.act_fn(x @ gate.T) * (x @ up.T)  # (T, n)
    importance = neuron_importance(h, down)
    kept, routed = choose_shared(importance, shape.shared)
    features = foreseeable(x, importance[:, routed], ROUTER_DAMPING)  # (n - s, d)
    labels = balanced_clusters(features, shape.experts, CLUSTER_ROUNDS, generator)
    order = torch.cat([kept, routed[labels.argsort(stable=True)]])
    gate, up, down, h, importance = gate[order], up[order], down[:, order], h[:, order], importance[:, order]

    strength = expert_strength(importance[:, shape.shared :], shape.experts)
    routing = fit_routing(x, strength, ROUTER_DAMPING)
    routing = reach_all(routing, x, shape.top_k, LEAST_USAGE * shape.top_k / shape.experts)
    down, facts, outputs = finish_layer(x, h, h @ down.T, down, routing, shape)
    return Layer(gate, up, down, routing), facts, outputs


def finish_layer(x: Tensor, h: Tensor, target: Tensor, down: Tensor, routing: Routing, shape: Shape
                 ) -> tuple[Tensor, dict[str, Any], Tensor]:  # fmt: skip
    """down_proj refitted to what the chosen experts compute, facts, and outputs (T, d). h (T, q), down (d, q): neurons in the order of
    `Layer`, h is changed. target (T, d): what the dense layer puts out for the inputs x (T, d)."""
    chosen = routing.choose(x, shape.top_k)  # (T, E)
    computed = torch.cat([torch.ones(len(x), shape.shared), chosen.repeat_interleave(shape.width, dim=1)], dim=1)
    h *= computed
    error = target - h @ down.T
    lost = float(error.square().sum() / target.square().sum())
    if shape.top_k < shape.experts:
        down = refit_down(h, error, down, DOWN_DAMPING)
    outputs = h @ down.T
    facts = {
        "usage": chosen.mean(0).tolist(),
        "error_before_refit": lost,
        "error": float((outputs - target).square().sum() / target.square().sum()),
    }
    return down, facts, outputs


# --- the walk through the dense model -------------------------------------------------------------------------------


class _Stop(Exception):
    """Ends a forward pass at the first decoder layer."""


class _Recorder(nn.Module):
    """Stands in for a feed-forward part: keeps its input and adds nothing to the residual stream."""

    seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return torch.zeros_like(x)


def _into_first_layer(model: PreTrainedModel, batches: list[Tensor]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """What the model hands its first decoder layer: hidden states (B, L, d) and keyword arguments, a batch each."""
    hidden: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        first = args[0] if args else kwargs.pop("hidden_states")
        hidden.append(first.clone())
        arguments.append(kwargs)
        raise _Stop

    handle = model.model.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for batch in batches:
            try:
                model(batch.to(model.device), use_cache=False)
            except _Stop:
                continue
    finally:
        handle.remove()
    return hidden, arguments


@contextmanager
def _recording(block: nn.Module) -> Iterator[_Recorder]:
    feed_forward, block.mlp = block.mlp, _Recorder()
    try:
        yield block.mlp
    finally:
        block.mlp = feed_forward


def _after_attention(block: nn.Module, hidden: list[Tensor], arguments: list[dict[str, Any]]) -> Tensor:
    """Move ``hidden`` past the attention part, in place; returns the feed-forward part's inputs (T, d)."""
    inputs = []
    with _recording(block) as recorder:
        for index, batch in enumerate(hidden):
            hidden[index] = block(batch, **arguments[index])
            inputs.append(recorder.seen.flatten(0, 1).float())
    return torch.cat(inputs)


# --- what can be converted ------------------------------------------------------------------------------------------


def check_shape(model: PreTrainedModel, experts: int, top_k: int, shared: int) -> Shape:
    """The division of every layer, or UserError if the model or the numbers do not allow it."""
    check_dense(model)
    config = model.config
    if experts < 2 or not 1 <= top_k <= experts:
        raise UserError("these numbers of experts do not fit", expected="2 or more experts, 1 ≤ top-k ≤ experts",
                        got=f"{experts} experts, top-{top_k}")  # fmt: skip
    width, rest = divmod(config.intermediate_size - shared, experts)
    if rest or width <= 0 or shared < width or shared % width:
        fitting = [s for s in range(1, config.intermediate_size) if _fits(config.intermediate_size, experts, s)]
        raise UserError(
            "the feed-forward width cannot be divided like this",
            expected="shared + experts · m = dense width, and shared a multiple of m, at least m",
            got=f"dense width {config.intermediate_size}, shared {shared}, experts {experts}",
            remedy=f"with {experts} experts choose --shared from {', '.join(map(str, fitting))}" if fitting else None,
        )
    return Shape(experts, top_k, shared, width)


def check_dense(model: PreTrainedModel) -> None:
    """UserError unless glm4_moe has a place for everything that the model has."""
    config = model.config
    check_family(config)
    mlp = model.model.layers[0].mlp
    if not all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        raise UserError("the feed-forward part is not gated", expected="gate_proj, up_proj and down_proj")
    biased = [n for n in ("mlp.gate_proj", "mlp.down_proj", "self_attn.o_proj")
              if model.model.layers[0].get_submodule(n).bias is not None]  # fmt: skip
    if biased:
        raise UserError("glm4_moe has no place for these biases", got=", ".join(biased))
    if _sliding(config):
        raise UserError("glm4_moe has no sliding-window attention", got=f"sliding_window={config.sliding_window}")


def check_family(config: Any) -> None:
    """UserError unless a model with this configuration can become glm4_moe without custom code."""
    if config.model_type in DENSE_FAMILIES:
        return
    moe = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    raise UserError(
        f"cannot convert a model of type {config.model_type!r}",
        expected="a dense model: " + ", ".join(DENSE_FAMILIES),
        got="a Mixture of Experts already" if moe else "an architecture that glm4_moe may not represent exactly",
    )


def default_shape(model: PreTrainedModel, experts: int, shared: int | None = None, active: float = 0.75) -> Shape:
    """``experts`` experts, about a third of the neurons shared, and the largest top-k that keeps within ``active``."""
    dense = getattr(model.config, "intermediate_size", 0)
    if shared is None:
        fitting = [s for s in range(1, dense) if _fits(dense, experts, s)]
        shared = min(fitting, key=lambda s: abs(s - dense / 3), default=0)
    width = max((dense - shared) // experts, 1)
    top_k = min(experts - 1, max(1, int((active * dense - shared) / width)))
    return check_shape(model, experts, top_k, shared)


def _fits(dense: int, experts: int, shared: int) -> bool:
    width, rest = divmod(dense - shared, experts)
    return rest == 0 and width > 0 and shared % width == 0


def _sliding(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


# --- writing --------------------------------------------------------------------------------------------------------


def moe_config(model: PreTrainedModel, shape: Shape, weight: float = 1.0) -> Glm4MoeConfig:
    """The glm4_moe configuration that keeps everything but the feed-forward part as it is. ``weight``: a chosen expert's combine
    weight where its router's logit is zero."""
    config = model.config
    attention = model.model.layers[0].self_attn
    rope = {**config.rope_parameters, "partial_rotary_factor": 1.0}
    extra = {"head_dim": attention.head_dim}  # not a declared field, but what its attention reads
    return Glm4MoeConfig(
        **extra,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        hidden_act=config.hidden_act,
        max_position_embeddings=config.max_position_embeddings,
        initializer_range=config.initializer_range,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters=rope,
        attention_bias=attention.q_proj.bias is not None,
        use_qk_norm=DENSE_FAMILIES[config.model_type],
        moe_intermediate_size=shape.width,
        n_routed_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        n_shared_experts=shape.shared // shape.width,
        routed_scaling_factor=2 * weight,  # sigmoid(0) = 1/2
        norm_topk_prob=False,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        num_mtp_layers=0,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


def save_moe(model: PreTrainedModel, config: Glm4MoeConfig, layers: list[dict[str, Tensor]], out_dir: Path, tokenizer: Any,
             dtype: torch.dtype) -> None:  # fmt: skip
    """Write the checkpoint: the dense model's tensors, each feed-forward part replaced by the parameters of a Glm4MoeMoE."""
    with torch.device("meta"):
        moe = Glm4MoeForCausalLM(config)
    state = {name: p.to(dtype) for name, p in model.state_dict().items() if ".mlp." not in name}
    for number, layer in enumerate(layers):
        state |= {f"model.layers.{number}.mlp.{name}": p for name, p in layer.items()}
    moe.load_state_dict(state, strict=True, assign=True)
    moe.tie_weights()
    moe.config.dtype = dtype
    if model.generation_config is not None:
        moe.generation_config = model.generation_config
    moe.save_pretrained(out_dir)
    if tokenizer is not None:
        tokenizer.save_pretrained(out_dir)


def moe_tensors(layer: Layer, shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters of a Glm4MoeMoE module, by name."""
    s, experts, width = shape.shared, shape.experts, shape.width
    gate = layer.gate[s:].view(experts, width, -1)
    up = layer.up[s:].view(experts, width, -1)
    down = layer.down[:, s:].unflatten(1, (experts, width)).transpose(0, 1)
    scale = 0.0 if shape.top_k == experts else layer.routing.logit_scale(LOGIT_CEILING)
    tensors = {
        "experts.gate_up_proj": torch.cat([gate, up], dim=1),  # (E, 2m, d)
        "experts.down_proj": down.contiguous(),  # (E, d, m)
        "shared_experts.gate_proj.weight": layer.gate[:s],
        "shared_experts.up_proj.weight": layer.up[:s],
        "shared_experts.down_proj.weight": layer.down[:, :s].contiguous(),
        "gate.weight": layer.routing.weight * scale,
    }
    # Near 0 sigmoid(z) = 1/2 + z/4, so a score's constant goes into the selection bias at a quarter. It stays float32.
    bias = layer.routing.bias * scale / 4
    return {name: p.to(dtype) for name, p in tensors.items()} | {"gate.e_score_correction_bias": bias}
