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


def moved(weights: torch.Tensor, current: torch.Tensor, share: float) -> torch.Tensor:
    """Ternary matrices ``current`` [E, o, i] a step closer to ``weights``: few trits change, then the scale is fitted to them.

    After PV-Tuning (arXiv:2405.14852): of the trits that rounding would change, only those that are furthest off may, at most
    ``share`` of a matrix; then s = Σ w t / Σ t² is the scale of least squared error. Differs: the paper moves scales by their
    own gradient; here both trits and scale follow the masters, which the gradient moved.
    """
    scale = current.abs().amax((1, 2), keepdim=True).clamp_min(ternary.SMALLEST)
    trits = (current / scale).round()
    wanted = (weights / scale).round().clamp(-1, 1)
    distance = torch.where(wanted != trits, (weights - current).abs(), 0.0).flatten(1)
    count = max(1, int(share * distance.shape[1]))
    far = distance.topk(count, dim=1)
    chosen = torch.zeros_like(distance, dtype=torch.bool).scatter_(1, far.indices, far.values > 0).view_as(weights)
    trits = torch.where(chosen, wanted, trits)
    fitted = (weights * trits).sum((1, 2), keepdim=True) / trits.square().sum((1, 2), keepdim=True).clamp_min(1)
    return fitted.clamp_min(0).bfloat16().float() * trits


@dataclass(frozen=True)
class Rounding:
    """What the experts of ``layers`` become on the grid of ``scheme``; other parameters stay.

    share: None where every step rounds anew; else `moved` goes on from what the model has.
    """

    scheme: Scheme
    layers: tuple[MoELayer, ...]
    share: float | None = None

    @property
    def names(self) -> list[str]:
        """Of the parameters that are rounded."""
        return [f"{moe.module}.{name}" for moe in self.layers for name in moe.layout.parameters]

    def __call__(self, masters: Mapping[str, torch.Tensor], current: Mapping[str, torch.Tensor] | None = None
                 ) -> Iterator[tuple[str, torch.Tensor]]:  # fmt: skip
        """Parameters by name, the experts rounded, one layer at a time. current: rounded ones to go on from, if there are."""
        others = dict(masters)
        for moe in self.layers:
            names = {name: f"{moe.module}.{name}" for name in moe.layout.parameters}
            new = _canonical({name: others.pop(full) for name, full in names.items()}, moe.layout)
            if self.share is None or current is None:
                found = {name: rounded(matrix, self.scheme) for name, matrix in new.items()}
            else:
                old = _canonical({name: current[full].detach().float() for name, full in names.items()}, moe.layout)
                found = {name: moved(matrix, old[name], self.share) for name, matrix in new.items()}
            for name, tensor in parameters_from(found, moe.layout).items():
                yield names[name], tensor
        yield from others.items()


def _canonical(parameters: dict[str, torch.Tensor], layout: ExpertsLayout) -> dict[str, torch.Tensor]:
    return {name: matrix.contiguous() for name, matrix in projections(SimpleNamespace(**parameters), layout).items()}


def refuse_share(scheme: Scheme, share: float | None) -> None:
    """UserError where only a share of the codes may change, but codes cannot be told from values."""
    if share is not None and scheme.code != TERNARY:
        raise UserError("Only ternary experts can change a share of their codes at a time", expected="--qat ternary", got=f"--qat {scheme.name}",
                        remedy="leave --qat-share out")  # fmt: skip


def rounding_of(anatomy: Anatomy, word: str, share: float | None) -> Rounding:
    """For `train.Settings.qat` and ``qat_share``."""
    return Rounding(scheme_of(word), tuple(anatomy.moe.values()), share)
