"""Training experts as what quantizing will make of them: the model computes with rounded weights, and the gradient at a
rounded weight moves the float32 master behind it as if rounding were the identity (the straight-through estimator)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from moecompress.errors import UserError
from moecompress.model.anatomy import Anatomy, MoELayer
from moecompress.model.experts import ExpertsLayout, parameters_from, projections
from moecompress.pack.scheme import INT, SIGN, TERNARY, Scheme
from moecompress.quantize import gptq, grid, ternary

#: Columns that share a scale where only a number of bits is asked for, as in the default candidates of a recipe.
GROUP = 64
#: Widths of integers worth training for; their largest code is always in use, so a grid is found again in rounded weights.
BITS = (2, 3, 4)


def scheme_of(word: str) -> Scheme:
    """``ternary``, ``sign``, a number of bits (groups of 64), or the name of a scheme such as b3g128s. UserError for others."""
    scheme = Scheme(int(word), GROUP) if word in map(str, BITS) else Scheme.parse(word)
    if scheme.code in (TERNARY, SIGN) or (scheme.code == INT and scheme.bits in BITS and scheme.symmetric):
        return scheme
    raise UserError(f"experts cannot be trained as {word}", expected="ternary, sign, or symmetric integers of 2, 3 or 4 bits such as b3g64s",
                    remedy="pass --qat ternary or --qat 2")  # fmt: skip


def rounded(weights: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Matrices [E, o, i] rounded to nearest on ``scheme``'s grid, all inputs alike: float32 of the same shape.

    ternary: s · clip(round(W / s), −1, 1) with s = mean|W| of the matrix, as MoTE (arXiv:2506.14435) trains it; sign:
    ±mean|w| of the row; integers: the scale of least squared error of every group. Scales are rounded to what is stored.
    """
    if scheme.code in (TERNARY, SIGN):
        levels = ternary.fit(weights, "sign" if scheme.code == SIGN else "absmean")
        return ternary.values(ternary.rtn(weights, levels), levels)
    fitted = scheme.fitted(weights.shape[-1])
    alike = weights.new_ones(weights.shape[0], weights.shape[-1])
    found = grid.fit(weights, alike, int(fitted.bits), fitted.group, fitted.symmetric)
    return gptq.values(gptq.rtn(weights, found), found)


@dataclass(frozen=True)
class Rounding:
    """What the experts of ``layers`` become on the grid of ``scheme``; other parameters stay."""

    scheme: Scheme
    layers: tuple[MoELayer, ...]

    @classmethod
    def of(cls, anatomy: Anatomy, scheme: Scheme) -> Rounding:
        return cls(scheme, tuple(anatomy.moe.values()))

    def __call__(self, masters: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters by name, the experts rounded, one layer at a time."""
        others = dict(masters)
        for moe in self.layers:
            own = {name: others.pop(f"{moe.module}.{name}") for name in moe.layout.parameters}
            for name, tensor in _experts(own, moe.layout, self.scheme).items():
                yield f"{moe.module}.{name}", tensor
        yield from others.items()


def _experts(parameters: dict[str, torch.Tensor], layout: ExpertsLayout, scheme: Scheme) -> dict[str, torch.Tensor]:
    weights = projections(SimpleNamespace(**parameters), layout)
    return parameters_from({name: rounded(matrix.contiguous(), scheme) for name, matrix in weights.items()}, layout)
