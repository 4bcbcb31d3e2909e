"""Which neurons of an expert to keep, and how its down matrix makes up for the others. Functions on tensors.

The neurons of an expert are its inner channels: a row of gate and of up, a column of down. n experts, d outputs, m neurons.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moecompress.quantize.hessian import factor

#: At most so often does `greedy` look for the next neurons to leave out. With 64 looks its error is within 1 % of one look a
#: neuron, and the time for wide experts is that of a few products of their Hessians.
STEPS = 64


def activation(down: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """[n, m]: what leaving out one neuron c alone adds to the squared error of an expert's output, E[a_c²] · ‖down[:, c]‖².

    down: [n, d, m]. inner: [n, m, m] second moments of what enters down, weighted by the squared combine weight.
    """
    return inner.diagonal(dim1=-2, dim2=-1) * down.square().sum(1)


def best(values: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` neurons with the highest values [n, m] of each expert, ascending: int64 [n, count]. Of equals, the first."""
    return values.double().sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values


def greedy(down: torch.Tensor, inner: torch.Tensor, count: int, damping: float, names: list[str], steps: int = STEPS) -> torch.Tensor:
    """`greedy_many` of one width: int64 [n, count]."""
    return greedy_many(down, inner, [count], damping, names, steps)[0]


def greedy_many(down: torch.Tensor, inner: torch.Tensor, counts: Sequence[int], damping: float, names: list[str], steps: int = STEPS,
                allow_fallback: bool = False) -> list[torch.Tensor]:  # fmt: skip
    """Neurons to keep, ascending: int64 [n, count] for each of the falling ``counts``. Backward: again and again the neuron goes
    whose absence costs least once the others are refitted (optimal brain surgeon, Hassibi and Stork 1993, on the columns of
    down).

    With H⁻¹ and D of the neurons that are left, that cost is ‖D[:, c]‖² / (H⁻¹)_cc. Of D only DᵀD is needed. Above ``steps``
    neurons to leave out, several go at a time. Arguments as of `repaired`; the ridge is that of all neurons.
    """
    upper, _ = factor(inner, damping, names, allow_fallback)
    inverse, gram = upper.transpose(1, 2) @ upper, down.transpose(1, 2) @ down  # (n, m, m)
    width = left = down.shape[-1]
    alive = torch.ones(len(down), width, dtype=torch.bool)
    least = torch.finfo(torch.float32).tiny
    found = []
    for count in counts:
        while left > count:
            cost = gram.diagonal(dim1=1, dim2=2).clamp_min(0) / inverse.diagonal(dim1=1, dim2=2).clamp_min(least)
            going = min(left - count, -(-(width - counts[-1]) // steps))
            gone = cost.masked_fill(~alive, torch.inf).topk(going, largest=False).indices
            columns, effect = take(inverse, gone, 2), take(gram, gone, 2)  # (n, m, b)
            refit = torch.linalg.solve(take(columns, gone, 1), columns.transpose(1, 2))  # (n, b, m)
            half = (effect - refit.transpose(1, 2) @ take(effect, gone, 1) / 2) @ refit
            gram -= half + half.transpose(1, 2)
            inverse -= columns @ refit
            alive.scatter_(1, gone, False)
            left -= going
        found.append(alive.nonzero()[:, 1].view(len(down), count))
    return found


def repaired(down: torch.Tensor, inner: torch.Tensor, keep: torch.Tensor, damping: float, names: list[str],
             allow_fallback: bool = False) -> torch.Tensor:  # fmt: skip
    """down [n, d, count] of the kept neurons that comes nearest to what all neurons gave: float32.

    Ridge regression of the lost part on the kept activations: D[:, keep] + D[:, gone] H[gone, keep] (H[keep, keep] + λI)⁻¹
    with λ = damping · mean diag H. It minimises the expected squared error of the output plus λ times the squared change, so
    where the data say nothing, down stays as it is. Arguments as of `activation`; names: of the experts, for errors.
    """
    gone = complement(keep, down.shape[-1])
    cross = take(take(inner, gone, 1), keep, 2)  # (n, m - count, count)
    upper, _ = factor(take(take(inner, keep, 1), keep, 2), damping, names, allow_fallback)
    lost = take(down, gone, 2) @ cross @ upper.transpose(1, 2) @ upper
    return take(down, keep, 2) + lost


def error(down: torch.Tensor, new: torch.Tensor, inner: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """[n]: squared error of the experts' outputs, relative to their squared size. new: [n, d, count]; others as of `repaired`."""
    size = ((down @ inner) * down).sum((1, 2))
    return loss(down, new, inner, keep) / size.clamp_min(torch.finfo(torch.float32).tiny)


def loss(down: torch.Tensor, new: torch.Tensor, inner: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """[n]: squared error of the experts' outputs for each unit of the weight that ``inner`` is a mean over."""
    change = down.scatter_add(2, keep[:, None].expand_as(new), -new)
    return ((change @ inner) * change).sum((1, 2))


def complement(keep: torch.Tensor, width: int) -> torch.Tensor:
    """The neurons that are not in ``keep`` [n, count], ascending: int64 [n, width - count]."""
    gone = torch.ones(len(keep), width, dtype=torch.bool).scatter(1, keep, False)
    return gone.nonzero()[:, 1].view(len(keep), width - keep.shape[1])


def take(tensor: torch.Tensor, index: torch.Tensor, axis: int) -> torch.Tensor:
    """``tensor`` [n, ...] with the entries ``index`` [n, count] of ``axis``, other ones for each expert."""
    shape = [1] * tensor.ndim
    shape[0], shape[axis] = index.shape
    wanted = list(tensor.shape)
    wanted[axis] = index.shape[1]
    return tensor.gather(axis, index.view(shape).expand(wanted))
