"""How much attention each token receives, seen where its experts are called.

All families of transformers ask one registry for the function that computes their attention, and give it queries and keys as
they are after rotary embeddings. `watch` puts itself before the registry: every function it gives away is called as before, and
in layers that are watched the weights are added up: those that eager attention returns, and for sdpa, which returns none, those
of the same queries and keys, a block of queries at a time. Layers without such attention (linear ones, state spaces) and other
functions (flash attention) show nothing. Registering functions under names of our own would be simpler, but some families ask
for the names "eager" and "sdpa" before they mask what their sparse attention leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

#: Queries whose weights are in memory at once.
BLOCK = 128


class Received:
    """What the attention of one layer showed last, until the layer's experts take it.

    together: [T] mean weight that a token gets from itself and the later queries of this call. alone: [T] from itself, which
    is all that is known of the newest token, times the number of tokens it sees: 1 if it attends to all of them alike.
    """

    def __init__(self) -> None:
        self.shown: tuple[torch.Tensor, torch.Tensor, bool] | None = None

    def put(self, weights: Iterable[torch.Tensor], own: torch.Tensor, keys: int, mask: torch.Tensor | None) -> None:
        """weights: blocks of [B, q, keys], averaged over heads. own: [B, Q] which key is the query's own token."""
        batch, queries = own.shape
        total, alone, begin = own.new_zeros(batch, keys, dtype=torch.float32), [], 0
        for block in weights:
            total += block.sum(1)
            alone.append(block.gather(2, own[:, begin : begin + block.shape[1], None]).squeeze(2))
            begin += block.shape[1]
        later = torch.arange(queries, 0, -1, device=own.device)  # queries from a token's own on: itself and those behind it
        sees = own + 1 if mask is None else seen(mask[:, 0, :, :keys]).sum(-1)
        self.shown = (total.gather(1, own) / later).flatten(), (torch.cat(alone, 1) * sees).flatten(), queries > 1

    def take(self) -> tuple[torch.Tensor, torch.Tensor, bool] | None:
        """(together, alone, whether there was more than one query); None if no attention was computed since."""
        shown, self.shown = self.shown, None
        return shown


def watch(model: nn.Module, experts: Iterable[str]) -> dict[str, Received]:
    """Experts module -> what its decoder layer's attention shows from now on. Undone by `unwatch`."""
    ALL_ATTENTION_FUNCTIONS.get_interface = _get_interface
    found = {}
    for name in experts:
        found[name] = Received()
        for part in model.get_submodule(layer_of(name)).modules():
            part.received = found[name]
    return found


def unwatch(model: nn.Module) -> None:
    for module in model.modules():
        module.__dict__.pop("received", None)


def layer_of(name: str) -> str:
    """The decoder layer that a module is in: its name up to the first number."""
    parts = name.split(".")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdigit()) + 1])


def _get_interface(name: str, default: Callable) -> Callable:
    """As `AttentionInterface.get_interface`; the function shows its weights to the `Received` of the module, if it has one."""
    found = AttentionInterface.get_interface(ALL_ATTENTION_FUNCTIONS, name, default)

    @wraps(found)
    def watching(module: nn.Module, *args: Any, **options: Any):
        output = found(module, *args, **options)
        received = getattr(module, "received", None)
        if received is not None:
            _show(received, name, module, output[1], **dict(zip(("query", "key", "value", "attention_mask"), args, strict=False)), **options)
        return output

    return watching


@torch.no_grad()
def _show(received: Received, name: str, module: nn.Module, weights: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor,
          attention_mask: torch.Tensor | None = None, **options: Any) -> None:  # fmt: skip
    """weights: [B, H, Q, K or more] as the function ``name`` returned them."""
    if options.get("cache") is not None or (weights is None and name != "sdpa"):
        return  # a paged cache has the keys of many sequences
    keys = key.shape[2]
    parts = blocks(module, query, key, attention_mask, options) if weights is None else [weights.float().mean(1)[..., :keys]]
    received.put(parts, own_keys(query, key, attention_mask), keys, attention_mask)


def blocks(module: Any, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]
           ) -> Iterable[torch.Tensor]:  # fmt: skip
    """The weights that sdpa uses and does not return, float32 [B, q, K], averaged over heads. query [B, H, Q, D], key
    [B, H', K, D] where H' divides H, mask bool or additive [B or 1, 1 or H, Q, K]."""
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    key = key.repeat_interleave(heads // key.shape[1], dim=1).float()
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    for begin in range(0, queries, BLOCK):
        here = slice(begin, begin + BLOCK)
        scores = (query[:, :, here].float() @ key.transpose(2, 3)) * scaling
        if (bias := options.get("position_bias")) is not None:
            scores = scores + bias[:, :, here]
        allowed = None
        if mask is not None:
            part = mask[:, :, here, :keys]
            allowed = seen(part)
            if part.dtype != torch.bool:
                scores = scores + part
        elif causal and queries > 1:
            at = torch.arange(queries, device=query.device)[here, None]
            allowed = torch.arange(keys, device=query.device)[None] <= at
        if allowed is not None:
            scores = scores.masked_fill(~allowed, torch.finfo(torch.float32).min)
        weights = scores.softmax(-1)
        # A row that sees nothing is padding; its softmax is of no token.
        yield (weights if allowed is None else weights * allowed).mean(1)


def seen(mask: torch.Tensor) -> torch.Tensor:
    """bool: where a mask, bool or additive, lets a query see a key."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def own_keys(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[B, Q]: which key belongs to the query's own token. They are the last ones written: the last of all, or, where a mask
    says that a cache is longer than what it holds, the last that the last query sees."""
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    last = torch.full((batch,), keys - 1, device=query.device)
    if mask is not None and keys > queries:
        row = seen(mask[:, 0, -1, :keys]).expand(batch, keys)
        last = (row * torch.arange(1, keys + 1, device=row.device)).amax(-1).clamp_min(queries) - 1
    return last[:, None] - torch.arange(queries - 1, -1, -1, device=query.device)

