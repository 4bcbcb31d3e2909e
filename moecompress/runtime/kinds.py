"""Which tokens are of images or videos, told to the experts by the token numbers that the model is called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

#: Fields of a multimodal config that hold the number of the token that an image's or video's features replace.
FIELDS = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")


class Kinds:
    """``ids``: token numbers [B, L] of the call that is going on; None if the model was called with embeddings."""

    def __init__(self, placeholders: list[int]):
        self.placeholders, self.ids = torch.tensor(placeholders), None

    def vision(self, tokens: int) -> torch.Tensor | None:
        """bool [T]; None where the kinds are not known."""
        if self.ids is None or self.ids.numel() != tokens:
            return None
        return torch.isin(self.ids.reshape(-1), self.placeholders.to(self.ids.device))


def placeholders(model: Any) -> list[int]:
    """Numbers of the tokens that stand for images and videos; empty for a model of text."""
    return sorted({number for field in FIELDS if isinstance(number := getattr(model.config, field, None), int)})


def watch(model: nn.Module) -> Kinds:
    """What the model is called with from now on (a layer walk tells it too, `Walk.run`). Undone by `unwatch`."""
    unwatch(model)
    kinds = Kinds(placeholders(model))

    def listen(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        kinds.ids = ids if isinstance(ids, torch.Tensor) and not ids.is_floating_point() else None

    model.__dict__["kinds"] = kinds, model.register_forward_pre_hook(listen, with_kwargs=True)
    return kinds


def unwatch(model: nn.Module) -> None:
    if "kinds" in model.__dict__:
        model.__dict__.pop("kinds")[1].remove()
