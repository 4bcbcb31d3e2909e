"""MC-MoE's bit allocation (PMQ, arXiv:2410.06270): one small integer program a layer, solved exactly.

For layer l, expert i and width j the harm is

    c[l, i, j] = φ[l, i]^α · w[l, i]^β · ε[l, i, j]^γ

φ: share of the layer's expert choices that fell on i; w: i's share of the layer's summed routing weights; both sum to 1
over the experts of a layer, as in the authors' code. ε: Frobenius norm of the change of the block's output when only
expert i is rounded to j bits. ε is *not* normalised, so that the objective can be summed over layers, and one number
compares allocators: the sum of c over all experts of all layers.

Every layer has at least one expert at the widest and one at the second-widest candidate. Two variants differ:

* ``paper``: as above, and the bits of a layer sum to *exactly* the budget;
* ``code`` (the authors' script): ε is raised to α (γ is not used), c is multiplied by 1000, and the bits of a layer sum
  to *at most* the budget.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moecompress.errors import UserError

Variant = Literal["paper", "code"]

#: columns of the dynamic program above which bytes are counted in coarser steps, rounded up
_MOST_STEPS = 30_000


@dataclass(frozen=True)
class Factors:
    """What PMQ looks at. Layers in the order of the model, L of them with E experts each.

    ``frequency`` (L, E): tokens per expert. ``weight`` (L, E): routing weight, mean or sum over the tokens; only the
    shares within a layer matter. ``error`` (L, E, c): change of the block's output per candidate.
    """

    frequency: np.ndarray
    weight: np.ndarray
    error: np.ndarray

    def __post_init__(self) -> None:
        shape = np.shape(self.frequency)
        if len(shape) != 2 or np.shape(self.weight) != shape or np.shape(self.error)[:2] != shape:
            raise UserError(
                "the factors do not fit together",
                expected="frequency (L, E), weight (L, E), error (L, E, candidates)",
                got=f"{shape}, {np.shape(self.weight)}, {np.shape(self.error)}",
            )
        for name, value in (("frequency", self.frequency), ("weight", self.weight), ("error", self.error)):
            if not (np.isfinite(value).all() and (np.asarray(value) >= 0).all()):
                raise UserError(f"the factors' {name} has entries that are negative or not numbers")


def pmq_cost(
    factors: Factors, *, alpha: float = 1.0, beta: float = 1.5, gamma: float = 1.0, variant: Variant = "paper"
) -> np.ndarray:
    """float64 (L, E, c): the harm of every expert at every candidate (see the head of this file)."""
    token_share = _shares(factors.frequency)
    weight_share = _shares(factors.weight)
    importance = (token_share**alpha * weight_share**beta)[:, :, None]  # (L, E, 1)
    if variant == "code":
        return 1000.0 * importance * factors.error**alpha
    return importance * factors.error**gamma


def solve_layer(
    cost: np.ndarray, weight: np.ndarray, budget: int, *, exactly: bool, both_ends: bool = True
) -> np.ndarray:
    """Least-cost choice int64 (n,) of one candidate per expert, by dynamic programming over the budget; exact.

    ``cost`` float64 (n, c); ``weight`` int64 (n, c), in bits or bytes, candidates from narrow to wide; the chosen
    weights sum to ``budget`` (``exactly``) or at most to it. ``both_ends``: at least one expert at the widest and one
    at the second-widest candidate (only if there are that many). UserError if nothing fits.
    """
    count, candidates = cost.shape
    base = weight.min(axis=1, keepdims=True)
    steps, unit = weight - base, 1  # weight above the narrowest
    span = min(budget - int(base.sum()), int(steps.max(axis=1).sum()))
    if not exactly and span >= 0:
        unit = max(int(np.gcd.reduce(steps, axis=None)), 1)
        unit *= -(-span // (unit * _MOST_STEPS)) or 1
        steps, span = -(-steps // unit), span // unit
    # State: flag bit 0: the widest was used; bit 1: the second-widest.
    flag_of = np.zeros(candidates, dtype=np.int64)
    if both_ends and candidates >= 2 and count >= 2:
        flag_of[-1], flag_of[-2] = 1, 2
    wanted = int(flag_of.sum())
    states = wanted + 1
    if span < 0:
        raise _too_tight(weight, budget, exactly, wanted > 0)
    best = np.full((states, span + 1), np.inf)
    best[0, 0] = 0.0
    taken = np.full((count, states, span + 1), -1, dtype=np.int8)  # candidate of expert i on the best way to a state
    came = np.zeros((count, states, span + 1), dtype=np.int8)  # and the flags before it
    for i in range(count):
        after = np.full_like(best, np.inf)
        for j in range(candidates):
            step = int(steps[i, j])
            if step > span or not np.isfinite(cost[i, j]):
                continue
            for flags in range(states):
                to = flags | int(flag_of[j])
                value = best[flags, : span + 1 - step] + cost[i, j]
                better = value < after[to, step:]
                after[to, step:][better] = value[better]
                taken[i, to, step:][better] = j
                came[i, to, step:][better] = flags
        best = after
    if exactly and budget - int(base.sum()) != span:
        raise _too_tight(weight, budget, exactly, wanted > 0)
    at = span if exactly else int(best[wanted].argmin())
    if not np.isfinite(best[wanted, at]):
        raise _too_tight(weight, budget, exactly, wanted > 0)
    choice, flags = np.zeros(count, dtype=np.int64), wanted
    for i in reversed(range(count)):
        choice[i] = taken[i, flags, at]
        flags, at = int(came[i, flags, at]), at - int(steps[i, choice[i]])
    return choice


def solve_per_layer(cost: np.ndarray, bits: Sequence[int], layer_budget: int, *, exactly: bool) -> np.ndarray:
    """Choice int64 (L, E): every layer has ``layer_budget`` bits, summed over its experts (PMQ)."""
    weight = np.broadcast_to(np.asarray(bits, dtype=np.int64), cost.shape[1:])
    return np.stack([solve_layer(layer, weight, layer_budget, exactly=exactly) for layer in cost])


def solve_all_layers(cost: np.ndarray, bits: Sequence[int], total_budget: int) -> np.ndarray:
    """Choice int64 (L, E) of least cost within ``total_budget`` bits over all layers, with no rule per layer; exact.

    At the same total it is never worse than ``solve_per_layer``, whose answers it is free to give.
    """
    flat = cost.reshape(-1, cost.shape[-1])
    weight = np.broadcast_to(np.asarray(bits, dtype=np.int64), flat.shape)
    return solve_layer(flat, weight, total_budget, exactly=False, both_ends=False).reshape(cost.shape[:2])


def layer_budget(layer_bits: float, experts: int) -> int:
    """Whole bits of a layer of ``experts`` experts, from ``layer_bits`` per 8 experts."""
    return math.floor(layer_bits * experts / 8 + 1e-9)


# --- from a file ----------------------------------------------------------------------------------------------------


def read_factors(path: str | Path) -> tuple[Factors, list[int]]:
    """Factors and the widths of their errors, from JSON with the keys ``frequency``, ``routing_weight`` (lists of
    L lists of E numbers) and ``loss_at_1_2_3_bits`` (L × E × 3; other widths in the key for other files)."""
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no factors at {path}") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not a file of PMQ factors", expected="JSON", got=str(error)) from None
    keys = [re.fullmatch(r"loss_at_(\d+(?:_\d+)*)_bits", key) for key in record] if isinstance(record, dict) else []
    found = [match for match in keys if match]
    if len(found) != 1 or not {"frequency", "routing_weight"} <= set(record):
        raise UserError(
            f"{path} is not a file of PMQ factors",
            expected="the keys frequency, routing_weight and one such as loss_at_1_2_3_bits",
            got=", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__,
        )
    bits = [int(width) for width in found[0][1].split("_")]
    try:
        arrays = [np.asarray(record[key], dtype=np.float64) for key in ("frequency", "routing_weight", found[0][0])]
    except (TypeError, ValueError):
        raise UserError(f"{path}: the lists of numbers are ragged or hold something else") from None
    factors = Factors(*arrays)
    if factors.error.ndim != 3 or factors.error.shape[2] != len(bits) or bits != sorted(set(bits)):
        raise UserError(f"{path}: {found[0][0]} must be (L, E, {len(bits)}), widths rising", got=factors.error.shape)
    return factors, bits


def solve_factors(
    path: str | Path,
    *,
    allocator: Literal["pmq", "global", "uniform"] = "pmq",
    layer_bits: float | None = None,
    target_bits: float | None = None,
    alpha: float = 1.0,
    beta: float = 1.5,
    gamma: float = 1.0,
    variant: Variant = "paper",
) -> dict[str, Any]:
    """Solve the program of a factors file; plain data for ``--json``.

    The budget is ``target_bits`` on average, or ``layer_bits`` per 8 experts (16: an average of 2); give one.
    ``pmq`` spends it in every layer alike, ``global`` over all layers at once. ``uniform`` gives every expert the same
    width (a whole ``target_bits``), as a yardstick. Widths are nominal here: the file holds no sizes, and scales
    are not counted.

    Returns ``bits`` (L lists of E widths), ``objective`` (comparable between allocators of one variant with the
    same exponents), ``objective_per_layer``, ``average_bits``, ``budget`` and what was asked for.
    """
    if (layer_bits is None) == (target_bits is None):
        raise UserError("a plan from factors needs one budget", expected="either --layer-bits or --target-bits")
    factors, bits = read_factors(path)
    layers, experts = factors.frequency.shape
    cost = pmq_cost(factors, alpha=alpha, beta=beta, gamma=gamma, variant=variant)
    average = float(target_bits if target_bits is not None else layer_bits / 8)  # type: ignore[operator]
    per_layer = layer_budget(8 * average, experts)
    exactly = allocator == "pmq" and variant == "paper"
    if allocator == "pmq":
        choice = solve_per_layer(cost, bits, per_layer, exactly=exactly)
        budget = per_layer * layers
    elif allocator == "global":
        # A layer's budget is whole bits; over all layers the same average may allow a few more.
        budget = per_layer * layers if layer_bits is not None else math.floor(average * layers * experts + 1e-9)
        choice = solve_all_layers(cost, bits, budget)
    else:
        if average not in bits:
            raise UserError("a uniform plan from factors needs a width of the file", expected=bits, got=average)
        budget = round(average * layers * experts)
        choice = np.full((layers, experts), bits.index(int(average)))
    chosen_cost = np.take_along_axis(cost, choice[:, :, None], axis=2)[:, :, 0]  # (L, E)
    widths = np.asarray(bits)[choice]
    return {
        "allocator": allocator,
        "variant": variant,
        "alpha": alpha,
        "beta": beta,
        "gamma": gamma,
        "constraint": "=" if exactly else "<=",
        "budget": budget,
        "average_bits": float(widths.mean()),
        "objective": math.fsum(chosen_cost.ravel()),
        "objective_per_layer": [math.fsum(row) for row in chosen_cost],
        "bits": widths.tolist(),
    }


def _shares(value: np.ndarray) -> np.ndarray:
    total = np.asarray(value, dtype=np.float64).sum(axis=1, keepdims=True)
    if (total <= 0).any():
        raise UserError(f"no token reached any expert of layer number {int(np.argmin(total))}")
    return value / total


def _too_tight(weight: np.ndarray, budget: int, exactly: bool, both_ends: bool) -> UserError:
    low, high = int(weight.min(axis=1).sum()), int(weight.max(axis=1).sum())
    rule = "; at least one expert at the widest and one at the second-widest candidate" if both_ends else ""
    return UserError(
        "no allocation meets the budget of a layer",
        expected=f"{'a total' if exactly else 'at least'} {'from ' if exactly else ''}{low:,}"
        + (f" to {high:,}" if exactly else "") + rule,
        got=f"{budget:,}",
        remedy="change the budget of a layer (layer_bits, the target) or the candidates",
    )  # fmt: skip
