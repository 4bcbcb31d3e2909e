"""Thinner experts: the moments of some experts, with the best of their neurons only, and a down matrix that makes up for the others.

A matrix of a thinner expert is rounded like any other, from moments like any other's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from moecompress.calibrate.moments import ExpertMoments
from moecompress.model.experts import DOWN, ExpertsLayout
from moecompress.quantize.neurons import greedy_many, loss, repaired, take

#: The widths that an expert can be made to, as shares of its neurons; rounded to multiples of STEP, which suits every code's tiles.
SHARES, STEP = (0.75, 0.5, 0.25), 16


def widths_of(layout: ExpertsLayout) -> list[int]:
    """Numbers of neurons that a layer's experts may keep, falling, all of them left out."""
    widths = {STEP * max(1, round(share * layout.width / STEP)) for share in SHARES}
    return sorted((width for width in widths if width < layout.width), reverse=True)


def thinned(moments: ExpertMoments, widths: Sequence[int], damping: float, module: str, allow_fallback: bool = False
            ) -> Iterator[tuple[ExpertMoments, torch.Tensor]]:  # fmt: skip
    """All experts of a chunk at each of the falling ``widths``, and what that alone costs them: squared error of the output for
    each unit of Σ g² [n].

    Neurons go greedily, and down is refitted to those that stay (quantize/neurons.py; ``damping`` and UserError as there,
    ``module`` for its text), so gate and up are rows of what they were and what enters down are entries of what entered it.
    """
    down, inner = moments.weights[DOWN], moments.hessians["inner"]
    names = [f"{module}.{expert}" for expert in moments.experts]
    for keep in greedy_many(down, inner, widths, damping, names, allow_fallback=allow_fallback):
        new = repaired(down, inner, keep, damping, names, allow_fallback)
        weights = {name: new if name == DOWN else take(stack, keep, 1) for name, stack in moments.weights.items()}
        reach = new.square().sum(1) / take(down.square().sum(1), keep, 1).clamp_min(torch.finfo(torch.float32).tiny)  # (n, width)
        rows = {name: each if name == DOWN else take(each, keep, 1) * reach for name, each in moments.row_weight.items()}
        hessians = moments.hessians | {"inner": take(take(inner, keep, 1), keep, 2)}
        yield ExpertMoments(moments.experts, weights, hessians, rows, moments.mass, moments.drift, keep, moments.weights), loss(down, new, inner, keep).double()


def by_width(chunks: Iterable[ExpertMoments], widths: Mapping[int, int], damping: float, module: str, allow_fallback: bool
             ) -> Iterator[ExpertMoments]:  # fmt: skip
    """Moments of all experts, those that keep the same number of neurons together. widths: expert -> neurons, for the thinner ones."""
    for moments in chunks:
        groups = sorted({widths.get(expert, 0) for expert in moments.experts})
        # All copies first: who is done with some experts may give the memory of the whole chunk's weights back.
        parts = [moments.take([i for i, expert in enumerate(moments.experts) if widths.get(expert, 0) == width]) for width in groups]
        for width, some in zip(groups, parts, strict=True):
            yield next(thinned(some, [width], damping, module, allow_fallback))[0] if width else some


def widened(weights: Mapping[str, torch.Tensor], keep: torch.Tensor, layout: ExpertsLayout) -> dict[str, torch.Tensor]:
    """Matrices [out, in] of an expert that was left with the neurons ``keep`` [width], as those of one that has all, but zeros."""
    whole = {}
    for name, matrix in weights.items():
        whole[name] = matrix.new_zeros(layout.shape(name))
        if name == DOWN:
            whole[name][:, keep] = matrix
        else:
            whole[name][keep] = matrix
    return whole


def sorted_bias(bias: torch.Tensor, layout: ExpertsLayout, kept: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """The bias [E, m] of up, or [E, 2m] of gate and up, with what belongs to the ``kept`` neurons [width] of thinner experts first:
    the first rows of gate and up are those of these neurons."""
    order = torch.arange(layout.width).repeat(layout.experts, 1)
    for expert, keep in kept.items():
        gone = torch.ones(layout.width, dtype=torch.bool)
        gone[keep] = False
        order[expert] = torch.cat([keep, gone.nonzero().flatten()])
    if not layout.gated:
        return bias.gather(1, order)
    if layout.concatenated:
        return bias.gather(1, torch.cat([order, order + layout.width], 1))
    return bias.gather(1, torch.stack([2 * order, 2 * order + 1], 2).flatten(1))
