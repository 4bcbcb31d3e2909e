"""Vector codes: weighted k-means for a book that all experts of a layer and projection share, then assignment with feedback.

(VPTQ, arXiv:2409.17066: k-means weighted by the Hessian's diagonal, then GPTQ with vectors; AQLM, arXiv:2401.06118: vectors
along the inputs and one scale a row. Both learn one book a matrix, which a small expert cannot pay for. What is left out of
both: residual books, and tuning books, scales and norms by gradients.)
Shapes: n experts, o rows, i columns, d weights in a vector, K entries.
"""

from __future__ import annotations

import torch

from moecompress.pack.vector import RATES, VectorBank, entries, pack
from moecompress.quantize.trellis import CHUNK, block_feedback

#: Vectors that a book is trained on, for each of its entries and at least.
PER_ENTRY, AT_LEAST = 32, 1 << 16
#: Rounds of k-means; where an error is only predicted, fewer, on fewer vectors.
ROUNDS, QUICK_ROUNDS, QUICK_PER_ENTRY = 12, 5, 16
#: Distances that are computed at a time.
DISTANCES = 1 << 24
SMALLEST = 1e-30


def sample(weights: torch.Tensor, importance: torch.Tensor, bits: float, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """``count`` vectors [N, d] (or all, if there are fewer), in random order, of matrices [n, o, i], each row divided by its
    scale, and what their squared errors cost, [N, d].

    importance: [n, i], usually the diagonal of the Hessian.
    """
    d, (experts, rows, cols) = RATES[bits][0], weights.shape
    whole = cols // d
    if not whole:  # narrower than a vector
        weights, importance, whole = padded(weights, d), padded(importance, d), 1
    generator = torch.Generator().manual_seed(seed)
    total = experts * rows * whole
    many = total > 8 * count  # a permutation of them all would be large then, and twins are rare
    pick = torch.randint(0, total, (count,), generator=generator) if many else torch.randperm(total, generator=generator)[:count]
    row, first = pick // whole, pick % whole * d
    at = first[:, None] + torch.arange(d)
    scale = row_scales(weights).float().flatten()[row, None]
    values = weights.flatten(0, 1)[row[:, None], at] / scale
    return values, importance[(row // rows)[:, None], at].clamp_min(SMALLEST) * scale.square()


def train(values: torch.Tensor, importance: torch.Tensor, bits: float, rounds: int = ROUNDS) -> torch.Tensor:
    """A book bfloat16 [K, d] of vectors [N, d] whose squared errors cost ``importance`` [N, d]: k-means."""
    size = entries(bits)
    # The sample came in random order, so its first vectors are as good a start as any.
    book = values[torch.arange(size) % len(values)].clone()
    importance = importance / importance.mean()
    for _ in range(rounds):
        code, cost = assign(values, importance, book)
        top = torch.zeros_like(book).index_add_(0, code, importance * values)
        bottom = torch.zeros_like(book).index_add_(0, code, importance)
        used = torch.zeros(size).index_add_(0, code, torch.ones(len(code))) > 0
        book = torch.where(used[:, None], top / bottom.clamp_min(SMALLEST), book)
        unused = (~used).nonzero().flatten()[: len(values)]
        book[unused] = values[cost.topk(len(unused)).indices]  # entries that nobody wants go where the error is largest
    return book.to(torch.bfloat16)


def assign(values: torch.Tensor, importance: torch.Tensor, book: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The entry with the least cost for every vector, int64 [N], and that cost [N]."""
    right = torch.cat([book.square(), -2 * book], 1).T
    codes, costs = [], []
    for v, h in zip(*(t.split(max(1, DISTANCES // len(book))) for t in (values, importance)), strict=True):
        best = (torch.cat([h, h * v], 1) @ right).min(1)
        codes.append(best.indices)
        costs.append(best.values + (h * v * v).sum(1))
    return torch.cat(codes), torch.cat(costs)


def size_of_sample(bits: float) -> int:
    """Vectors to train a book on."""
    return max(AT_LEAST, PER_ENTRY * entries(bits))


def row_scales(weights: torch.Tensor) -> torch.Tensor:
    """bfloat16 [n, o]: root mean square of every row."""
    return weights.square().mean(-1).sqrt().clamp_min(SMALLEST).to(torch.bfloat16)


def padded(tensor: torch.Tensor, d: int) -> torch.Tensor:
    """The last dimension filled up with zeros to a multiple of d."""
    return torch.nn.functional.pad(tensor, (0, -tensor.shape[-1] % d))


def encode(weights: torch.Tensor, hessian: torch.Tensor, lower: torch.Tensor | None, book: torch.Tensor, bits: float, refine: int = 0
           ) -> VectorBank:  # fmt: skip
    """Matrices [n, o, i] with entries of ``book`` [K, d]; hessian [n, i, i] damped, lower: its Cholesky factor, None: no feedback.

    ``refine``: rounds of a least-squares row scale and one sweep over all vectors, each to its best entry given the others.
    """
    cols, d = weights.shape[-1], RATES[bits][0]
    values, target = book.float(), padded(weights, d)
    scale = row_scales(weights)
    hessian = _square(hessian, d)
    codes = _search(target / scale.float().unsqueeze(-1), hessian, None if lower is None else _square(lower, d), values)
    pulled = target @ hessian
    for _ in range(refine):
        scale = _refit(pulled, hessian, values[codes].flatten(-2), scale)
        codes = _descend(target / scale.float().unsqueeze(-1), hessian, codes, values)
    scale = _refit(pulled, hessian, values[codes].flatten(-2), scale)
    return pack(codes, scale, book, bits, cols)


def expected_error(weights: torch.Tensor, hessian: torch.Tensor, lower: torch.Tensor, row_weight: torch.Tensor, bits: float) -> torch.Tensor:
    """Expected output error float64 [n] of weights [n, o, i], without assigning: the error of a quick book on vectors it has
    not seen, by the pivots of the blockwise LDL factorisation. row_weight [n, o]."""
    d = RATES[bits][0]
    values, importance = sample(weights, hessian.diagonal(dim1=-2, dim2=-1), bits, QUICK_PER_ENTRY * entries(bits))
    size = max(1, 4 * (len(values) - 1) // 5)
    book = train(values[:size], importance[:size], bits, QUICK_ROUNDS).float()
    _, cost = assign(values[size:], importance[size:], book)
    share = (cost.sum(dtype=torch.float64) / importance[size:].sum(dtype=torch.float64)).clamp_min(0)
    factor = _square(lower, d)
    pivots = sum(factor[:, j : j + d, j : j + d].square().sum((1, 2), dtype=torch.float64) for j in range(0, factor.shape[-1], d))
    return (row_weight * weights.square().mean(-1)).sum(1, dtype=torch.float64) * pivots * share


def _square(matrix: torch.Tensor, d: int) -> torch.Tensor:
    """[n, i, i] with the diagonal continued to a multiple of d, so low that what is padded costs next to nothing."""
    extra = -matrix.shape[-1] % d
    if not extra:
        return matrix
    small = 1e-4 * matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    matrix = torch.nn.functional.pad(matrix, (0, extra, 0, extra))
    matrix[:, -extra:, -extra:] = torch.eye(extra) * small[:, None, None]
    return matrix


def _nearest(wanted: torch.Tensor, root: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """Entries int64 [n, o] that leave the least |(wanted − entry) root|², wanted [n, o, d], root [n, d, d]."""
    entry = book @ root  # (n, K, d)
    length, entry = entry.square().sum(-1)[:, None], entry.transpose(1, 2)
    slabs = (wanted @ root).split(max(1, DISTANCES // (len(root) * len(book))), 1)
    return torch.cat([torch.baddbmm(length, slab, entry, alpha=-2).argmin(-1) for slab in slabs], 1)


def _search(units: torch.Tensor, hessian: torch.Tensor, lower: torch.Tensor | None, book: torch.Tensor) -> torch.Tensor:
    """Entries [n, o, M] of normalised weights [n, o, i], vector after vector from the last, errors spread over those before."""
    d, cols = book.shape[1], units.shape[-1]
    feedback = None if lower is None else block_feedback(lower, d)
    off, codes = torch.zeros_like(units), []
    for begin in reversed(range(0, cols, CHUNK)):
        end = min(begin + CHUNK, cols)
        pulled = units[..., begin:end].clone()
        if feedback is not None and end < cols:  # the far columns at once, the near ones vector by vector
            pulled += off[..., end:] @ feedback[:, end:, begin:end]
        for first in reversed(range(begin, end, d)):
            part = slice(first, first + d)
            wanted = pulled[..., first - begin : first - begin + d]
            if feedback is not None and lower is not None:
                wanted = wanted + off[..., first + d : end] @ feedback[:, first + d : end, part]
                root = lower[:, part, part]
            else:
                root = torch.linalg.cholesky(hessian[:, part, part])
            codes.append(_nearest(wanted, root, book))
            off[..., part] = units[..., part] - book[codes[-1]]
    return torch.stack(codes[::-1], -1)


def _descend(units: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """One sweep: each vector moves to its best entry given all others."""
    d, codes = book.shape[1], codes.clone()
    pull = (units - book[codes].flatten(-2)) @ hessian  # minus half the gradient
    for number in range(codes.shape[-1]):
        part = slice(number * d, number * d + d)
        block, now = hessian[:, part, part], book[codes[..., number]]
        root = torch.linalg.cholesky(block)
        wanted = now + torch.cholesky_solve(pull[..., part].transpose(1, 2), root).transpose(1, 2)
        codes[..., number] = _nearest(wanted, root, book)
        # Vectors before are done for this sweep: their pulls are not needed any more.
        pull[..., part.stop :] -= (book[codes[..., number]] - now) @ hessian[:, part, part.stop :]
    return codes


def _refit(pulled: torch.Tensor, hessian: torch.Tensor, units: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The row scales of least error under the Hessian, bfloat16 [n, o]; pulled: weights times hessian. Rows that would turn keep theirs."""
    best = (pulled * units).sum(-1) / ((units @ hessian) * units).sum(-1).clamp_min(SMALLEST)
    return torch.where(torch.isfinite(best) & (best > 0), best, scale.float()).to(torch.bfloat16)
