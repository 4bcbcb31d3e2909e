"""QMoE's ternary grid in the words of its dictionary (arXiv:2310.16795), at a price known beforehand.

How many words a matrix needs is known once it is rounded, but a plan must know before. So every matrix has room for a fixed
number of words, and its thresholds, half of the row's extremes with QMoE, are widened until so many weights are zeros that
the words fit. The dictionary belongs to that zero rate. A matrix that needs less is padded.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moecompress.pack import dictionary, rans
from moecompress.pack.dictionary import DictionaryBank, needed, rate_prices
from moecompress.quantize import ternary

if TYPE_CHECKING:
    from moecompress.quantize.encode import Inputs

#: Thresholds grow by this power of (words needed / room) until the words fit; then the middle between is tried.
POWER = 0.8
#: Enough of the room used; and how often rounding is tried to reach that (not to make the words fit, which always ends).
FULL, TRIALS, FINAL_TRIALS = 0.97, 8, 3
#: Rows of a large matrix that its thresholds are first looked for with.
SOME = 32


@dataclass(frozen=True)
class Words:
    """error: [n], as of `ternary.Ternary`. archived_bits: a weight, of the trits at their entropy (some of the matrices)."""

    bank: DictionaryBank
    error: torch.Tensor
    archived_bits: float


def encode(weights: torch.Tensor, inputs: Inputs | None, bits: float, refits: int) -> Words:
    """weights: float32 [n, o, i]; bits: a weight, of the words; inputs and refits as for `ternary.encode`."""
    prices, room = rate_prices(bits), dictionary.room(weights.shape[1], weights.shape[2], bits)
    wide = widening(weights, bits)
    if weights.shape[1] > 2 * SOME:  # rows are rounded on their own: some of them tell about where the others will fit
        some = weights[:, :: weights.shape[1] // SOME]
        _, wide = _fitted(some, inputs, prices, room * some.shape[1] // weights.shape[1], refits, wide, TRIALS)
    coded, _ = _fitted(weights, inputs, prices, room, refits, wide, FINAL_TRIALS)
    archived = rans.archive(coded.trits[: rans.MATRICES_AT_ONCE]).bits_per_weight
    return Words(dictionary.pack(coded.trits, coded.levels, prices, room), coded.error, archived)


def _fitted(weights: torch.Tensor, inputs: Inputs | None, prices: tuple[int, int], room: int, refits: int, narrow: torch.Tensor,
            trials: int) -> tuple[ternary.Ternary, torch.Tensor]:  # fmt: skip
    """Matrices whose words have room, and the thresholds of each [n], times QMoE's: ``narrow``, or wider by what it takes."""
    coded = ternary.encode(weights, inputs, "qmoe", refits, narrow)
    trits, levels, error = coded.trits, coded.levels, coded.error
    need = needed(trits, prices)  # with the thresholds `narrow`
    narrow, used, enough = narrow.clone(), need.clone(), torch.full_like(narrow, torch.inf)  # `enough`: so wide that words fit
    for trial in itertools.count(1):
        unfinished = (used > room) | ((used < FULL * room) & enough.isfinite() & torch.tensor(trial < trials))
        some = unfinished.nonzero().squeeze(1)
        if not len(some):
            break
        further = narrow[some] * (need[some] / room) ** POWER * (1 + 0.01 * trial)  # in the end all are zeros, and those fit
        wide = torch.where(enough[some].isinf(), further, (narrow[some] * enough[some]).sqrt())
        found = ternary.encode(weights[some], inputs and inputs.take(some.tolist()), "qmoe", refits, wide)
        words = needed(found.trits, prices)
        fits = words <= room
        narrow[some[~fits]], need[some[~fits]] = wide[~fits], words[~fits]
        took = some[fits]  # nearer to full than what fitted before
        enough[took], used[took] = wide[fits], words[fits]
        trits[took], levels[took], error[took] = found.trits[fits], found.levels[fits], found.error[fits]
    return ternary.Ternary(trits, levels, error), enough.where(enough.isfinite(), narrow)


def widening(weights: torch.Tensor, bits: float) -> torch.Tensor:
    """What to multiply QMoE's thresholds of each matrix by [n], at least 1, so that rounding to nearest makes the zeros that
    the dictionary expects. Error feedback makes fewer: it adds the errors of others to every weight."""
    low, high = ternary.fit(weights, "qmoe").thresholds.split(1, -1)
    reach = torch.where(weights < 0, weights / low, weights / high).flatten(1)  # 1: at the threshold
    place = min(reach.shape[1] - 1, reach.shape[1] * dictionary.ZEROS[bits] // 1000)
    return reach.kthvalue(place + 1).values.nan_to_num(1.0).clamp_min(1.0)


def nearest(weights: torch.Tensor, bits: float, refits: int) -> torch.Tensor:
    """Weights as plain rounding would leave them."""
    coded = ternary.encode(weights, None, "qmoe", min(refits, 1), widening(weights, bits))
    return ternary.values(coded.trits, ternary.Levels(coded.levels.float(), coded.levels.float()))
