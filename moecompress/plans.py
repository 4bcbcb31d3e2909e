"""Plans: from statistics and a target to what every expert matrix becomes, and to the exact bytes that it takes.

A target in bytes is of all weight files, headers included; one in bits is of everything stored for the routed experts. Neither is
ever exceeded, and what one plan's headers, indices and books leave is given to its matrices.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from moecompress.allocate.candidates import Unit, unit_id
from moecompress.allocate.joint import Ladder, Level, joint_plan, smallest_joint
from moecompress.allocate.plan import Control, Plan, make_plan, smallest_bytes, uniform_plan
from moecompress.allocate.pmq import Factors
from moecompress.calibrate.statistics import Statistics
from moecompress.compress import kept_experts, linear_schemes, rest_shards, role_bits
from moecompress.errors import UserError
from moecompress.job import Job
from moecompress.model.anatomy import EXPERT, Anatomy
from moecompress.model.experts import DOWN, ExpertsLayout
from moecompress.model.walk import OpenModel
from moecompress.pack.scheme import DROPPED, NESTED, SHARED_BASIS, VECTOR, Scheme
from moecompress.pack.size import shard_bytes
from moecompress.progress import notice
from moecompress.recipe import Recipe, expert_of
from moecompress.rounding import Shared
from moecompress.transform.shed import Slicing

#: A plan for a target size is refined until less than this share of it is left over, or this often.
SIZE_SLACK, SIZE_ROUNDS = 0.001, 6
#: Above so many bits a weight, dropping experts has never been worth it, so "auto" does not measure it.
DROP_BELOW = 2.25

#: Where experts may become thinner, leaving some out must be predicted to do so much less harm than that alone: on a small trained
#: model 2 % less were predicted, and 2 to 4 % more measured.
LEFT_OUT_GAIN = 0.05


def plan(job: Job, statistics: Statistics) -> tuple[Plan, Plan]:
    """The recipe's plan and the uniform plan of the same bytes."""
    made, others = plan_and_others(job, statistics)
    return made, others.get("uniform", made)


def plan_and_others(job: Job, statistics: Statistics) -> tuple[Plan, dict[str, Plan]]:
    """The recipe's plan, and others of the same target: "whole", if the plan has thinner experts beside experts that are left
    out; "bits", if it leaves anything out and keeping all is possible; and "uniform"."""
    units, harm = units_of(job.opened, statistics)
    candidates = [Scheme.parse(name) for name in statistics.schemes]
    settings = job.recipe.allocate
    slimming = may_slim(job) and statistics.narrowed
    thinner, thin_harm = thinner_of(job.opened, statistics) if slimming else ([], harm[:, :0])
    budget = expert_budget(job, statistics.schemes)
    # Of a size, the headers of more banks may have to be paid for.
    joint_budget = expert_budget(job, [*statistics.schemes, *(scheme.name for scheme in thinner)])
    of_all = smallest_bytes(units, candidates, harm)
    dropping = may_drop(job) and statistics.thinned
    for wish, can, what in ((settings.drop, dropping, "drop"), (settings.slim, slimming, "slim")):
        if wish is True and not can:
            raise UserError(f"The statistics do not say what experts that {'are dropped' if what == 'drop' else 'become thinner'} cost",
                            expected=f"statistics made with allocate.{what}=true",
                            remedy=f"calibrate again with this recipe, or leave allocate.{what} out")  # fmt: skip
    header = 2 * 130 if job.recipe.target.size is not None else 0
    tables = sum(8 * moe.layout.experts + header for moe in job.opened.anatomy.moe.values()) if dropping else 0  # of who serves for whom
    ladder = ladder_of(statistics) if dropping else every_expert(statistics)
    every, every_harm = [*candidates, *thinner], np.concatenate([harm, thin_harm], 1)
    joint = dropping or slimming
    lacking = 0 if budget is None else of_all - budget
    if joint:
        more = 0 if joint_budget is None else smallest_joint(units, every, every_harm, ladder) + tables - joint_budget
        joint, lacking = joint_budget is not None and more <= 0, min(lacking, more)
    if lacking > 0:
        raise too_small(job, lacking)
    factors = _factors(job.opened.anatomy, statistics) if settings.allocator == "pmq" else None
    seed = job.recipe.compute.seed

    def bits_alone(budget_bytes: int | None) -> Plan:
        return make_plan(units, candidates, harm, budget_bytes, settings, factors=factors, seed=seed)

    def jointly(budget_bytes: int | None) -> Plan:
        assert budget_bytes is not None
        return joint_plan(units, every, every_harm, ladder, budget_bytes - tables, settings, seed)

    def all_kept(budget_bytes: int | None) -> Plan:
        assert budget_bytes is not None
        return joint_plan(units, every, every_harm, every_expert(statistics), budget_bytes, settings, seed)

    def as_wide(budget_bytes: int | None) -> Plan:
        assert budget_bytes is not None
        return joint_plan(units, candidates, harm, ladder, budget_bytes - tables, settings, seed)

    def made_by(make: Callable[[int | None], Plan], budget: int | None = budget) -> Plan:
        made = make(budget)
        if job.recipe.target.size is not None and budget is not None:
            made = use_whole_size(made, budget, job.recipe.target.size, make, lambda plan: written_bytes(job, plan))
        elif books and budget is not None:  # those that the plan does not need leave bytes to it
            made = use_whole_size(made, budget, budget + books, make, lambda plan: plan.bytes + shared_bytes_of(job.opened.anatomy, plan))
        return made

    books = shared_bytes(job.opened.anatomy, statistics.schemes)
    others: dict[str, Plan] = {}
    made = made_by(jointly, joint_budget) if joint else made_by(bits_alone)
    if made.dropped and slimming and joint_budget is not None and joint_budget >= smallest_joint(units, every, every_harm, every_expert(statistics)):
        kept = made_by(all_kept, joint_budget)
        made = kept if kept.harm <= (1 + LEFT_OUT_GAIN) * made.harm else made
    if made.slimmed and dropping and budget is not None and budget >= smallest_joint(units, candidates, harm, ladder) + tables:
        others["whole"] = made_by(as_wide)
        if others["whole"].harm <= made.harm:
            made = others.pop("whole")
        elif not others["whole"].dropped:
            del others["whole"]  # that is "bits"
    if budget is None or budget >= of_all:
        bits = made_by(bits_alone) if joint else made
        if (made.dropped or made.slimmed) and made.harm < bits.harm:
            others["bits"] = bits
        else:
            made = bits
        # Every plan fits what all books leave; another one with the bytes of this plan may need more of them.
        allowed = budget if books and budget is not None else others.get("bits", made).target_bytes
        others["uniform"] = uniform_plan(units, candidates, harm, allowed)
    if made.dropped or made.slimmed:
        made = replace(made, controls={name: Control(other.bytes, other.harm) for name, other in others.items()})
    return made, others


def ways_of(job: Job) -> Slicing | None:
    """How layers get fewer experts to route to; None where this family cannot, and only matrices can be shared."""
    try:
        return job.slicing
    except UserError as error:
        notice(f"this model's routers cannot do with fewer experts ({error.what}): experts that are left out are served by others")
        return None


def may_drop(job: Job) -> bool:
    """Is leaving experts out among the candidates?"""
    return _may(job, job.recipe.allocate.drop)


def may_slim(job: Job) -> bool:
    """Are thinner experts among the candidates?"""
    return job.recipe.allocate.granularity == "expert" and _may(job, job.recipe.allocate.slim)


def _may(job: Job, wish: bool | str) -> bool:
    if wish is False or job.recipe.allocate.allocator != "global":
        return False
    if wish is True:
        return True
    target = job.recipe.target
    if target.bits is None and target.size is None:  # statistics for no plan in particular
        return False
    budget = expert_budget(job)
    return budget is not None and 8 * budget < DROP_BELOW * job.given.opened.anatomy.expert_weights


def ladder_of(statistics: Statistics) -> Ladder:
    """Layer -> the ways to thin it out, with predicted KL."""
    ladder: dict[int, list[Level]] = {}
    for index, layer in statistics.layers.items():
        found = layer.thinning
        assert found is not None
        ladder[index] = []
        for into, share, again, error, growth, merged in zip(*vars(found).values(), strict=True):
            gone = (into != torch.arange(len(into))).nonzero().flatten()
            serving = zip(into[gone].tolist(), share[gone].tolist(), strict=True)
            ladder[index].append(Level(tuple(gone.tolist()), float(error) * layer.nats, growth.numpy(), () if again else tuple(serving),
                                       bool(merged)))  # fmt: skip
    return ladder


def every_expert(statistics: Statistics) -> Ladder:
    """The ladders of layers that leave no expert out."""
    return {index: [Level((), 0.0, np.ones(len(layer.counts)))] for index, layer in statistics.layers.items()}


def thinner_of(opened: OpenModel, statistics: Statistics) -> tuple[list[Scheme], np.ndarray]:
    """The candidates at every width that any layer's experts can be made to, and their predicted harm [units, candidates], that of
    thinning with the down matrices. Infinite where a layer has no such width, and of vectors and shared bases: each width would need
    its own."""
    found = statistics.predicted_narrowing()
    codes = [Scheme.parse(name) for name in statistics.schemes]
    widths = sorted({int(width) for one in found.values() for width in one.widths}, reverse=True)
    barred = np.array([np.inf if code.code in (VECTOR, SHARED_BASIS) else 0.0 for code in codes])
    rows = []
    for layer, one in found.items():
        layout = opened.anatomy.moe[layer].layout
        harm = np.full((layout.experts, len(layout.projections), len(widths), len(codes)), np.inf)
        at = [widths.index(int(width)) for width in one.widths]
        harm[:, :, at] = one.harm.numpy().swapaxes(1, 2) + barred
        harm[:, layout.projections.index(DOWN), at] += one.error.numpy()[:, :, None]
        rows.append(harm.reshape(layout.experts * len(layout.projections), -1))
    return [replace(code, width=width) for width in widths for code in codes], np.concatenate(rows)


def units_of(opened: OpenModel, statistics: Statistics) -> tuple[list[Unit], np.ndarray]:
    """All expert matrices and their predicted harm [units, candidates]."""
    size = opened.stored_dtype.itemsize
    units, rows = [], []
    for layer, harm in statistics.predicted_harm().items():
        layout = opened.anatomy.moe[layer].layout
        for expert in range(layout.experts):
            for p, projection in enumerate(layout.projections):
                units.append(
                    Unit(unit_id(layer, expert, projection), layer, expert, projection, *layout.shape(projection), size)
                )
                rows.append(harm[expert, p].numpy())
    return units, np.stack(rows)


def by_layer(anatomy: Anatomy, chosen: Plan) -> dict[int, dict[str, list[Scheme]]]:
    """The plan as layer -> projection -> scheme of each expert."""
    assigned = chosen.assignments()
    return {
        layer: {
            p: [_fitted(assigned[unit_id(layer, e, p)], moe.layout, p) for e in range(moe.layout.experts)] for p in moe.layout.projections
        }
        for layer, moe in anatomy.moe.items()
    }


def _fitted(scheme: Scheme, layout: ExpertsLayout, projection: str) -> Scheme:
    return scheme.fitted(layout.shape(projection, scheme.width)[1])


def slimmed_experts(schemes: dict[int, dict[str, list[Scheme]]]) -> dict[int, dict[int, int]]:
    """Layer -> expert -> neurons that a plan leaves it with, for the layers and experts where it takes some."""
    found = {layer: {e: scheme.width for e, scheme in enumerate(next(iter(s.values()))) if scheme.width} for layer, s in schemes.items()}
    return {layer: widths for layer, widths in found.items() if widths}


def _factors(anatomy: Anatomy, statistics: Statistics) -> Factors:
    """PMQ's factors from our statistics: the block error is the root of the expected squared error of all projections."""
    layers = list(statistics.layers.values())
    return Factors(
        frequency=np.stack([layer.counts.double().numpy() for layer in layers]),
        weight=np.stack([layer.gate_sum.numpy() for layer in layers]),
        error=np.stack([layer.harm.sum(1).sqrt().numpy() for layer in layers]),
    )


def gone_experts(schemes: dict[int, dict[str, list[Scheme]]]) -> dict[int, list[int]]:
    """Layer -> the experts that a plan leaves out, for the layers where it does."""
    gone = {layer: sorted(set(range(len(next(iter(s.values()))))) - set(kept_experts(s))) for layer, s in schemes.items()}
    return {layer: experts for layer, experts in gone.items() if experts}


def routed_again(anatomy: Anatomy, chosen: Plan) -> list[int]:
    """Layers whose routers know fewer experts."""
    return sorted(gone_experts(by_layer(anatomy, chosen)).keys() - shared_by(anatomy, chosen).keys())


def shared_by(anatomy: Anatomy, chosen: Plan) -> dict[int, Shared]:
    """Layers whose routers stay as they are, while others serve for the experts that are left out."""
    found: dict[int, Shared] = {}
    for name, (by, factor) in chosen.shared.items():
        layer, expert = expert_of(name)
        experts = anatomy.moe[layer].layout.experts
        one = found.setdefault(layer, Shared(torch.arange(experts), torch.ones(experts), layer in chosen.merged))
        one.into[expert], one.factor[expert] = by, factor
    return found


def merged_by(chosen: Plan) -> dict[int, dict[int, int]]:
    """Layer -> expert -> the one whose matrices are refitted to serve for it, too."""
    found: dict[int, dict[int, int]] = {layer: {} for layer in chosen.merged}
    for name, (by, _) in chosen.shared.items():
        layer, expert = expert_of(name)
        if layer in found and by >= 0:
            found[layer][expert] = by
    return found


# --- bytes ----------------------------------------------------------------------------------------------------------


def expert_budget(job: Job, schemes: list[str] | None = None) -> int | None:
    """Bytes that the matrices of all experts may take; indices and what the matrices of a bank share are excluded.
    ``schemes``: of the candidates (None: the recipe's)."""
    target, anatomy = job.recipe.target, job.opened.anatomy
    schemes = [scheme.name for scheme in job.schemes] if schemes is None else schemes
    if target.bits is not None:
        allowed = int(target.bits * job.given.opened.anatomy.expert_weights / 8)
        return allowed - index_bytes(anatomy) - shared_bytes(anatomy, schemes)
    if target.size is not None:
        return target.size - fixed_bytes(job, schemes)
    refuse_no_target(job.recipe)
    return None


def refuse_no_target(recipe: Recipe) -> None:
    own = recipe.allocate.allocator == "pmq" and recipe.allocate.layer_bits is not None
    if recipe.target.bits is None and recipe.target.size is None and not own:
        raise UserError("No target", expected="a size or a number of bits",
                        remedy="pass --target-size 80MB or --target-bits 2.5, or put target.size or target.bits in the recipe"
                        + ("; its transform steps alone are what `moecompress prune` does" if recipe.transform else ""))  # fmt: skip


def too_small(job: Job, lacking: int) -> UserError:
    """``lacking``: bytes of experts."""
    target, remedy = job.recipe.target, "raise the target, or add candidates with fewer bits"
    if target.size is not None:
        return UserError("The target size cannot be reached", expected=f"at least {target.size + lacking:,} bytes with these candidates",
                         got=f"{target.size:,} bytes", remedy=remedy)  # fmt: skip
    assert target.bits is not None
    least = math.ceil(1e4 * (target.bits + 8 * lacking / job.given.opened.anatomy.expert_weights)) / 1e4
    return UserError("The target cannot be reached", expected=f"at least {least:.4f} bits per expert weight", got=target.bits, remedy=remedy)


def use_whole_size(made: Plan, budget: int, size: int, make: Callable[[int], Plan], written: Callable[[Plan], int]) -> Plan:
    """``budget`` allowed for the longest headers and all the books that any plan needs; give what this plan's leave to its
    matrices. ``written``: all bytes of a plan, ``size`` at most."""
    best = made
    for _ in range(SIZE_ROUNDS):
        left = size - written(made)
        if 0 <= left < SIZE_SLACK * size:
            break
        # Too large: the next plan must be another one, so it may not even have this one's bytes.
        budget = budget + left if left >= 0 else min(budget + left, made.bytes - 1)
        made = make(budget)
        if written(made) <= size and made.bytes > best.bytes:
            best = made
    return best


def written_bytes(job: Job, chosen: Plan) -> int:
    """Exact bytes of all shards of a plan, headers included."""
    opened, q = job.opened, job.recipe.quantize
    linears = linear_schemes(opened, role_bits(q.attention_bits, q.shared_bits, q.dense_bits))
    schemes = by_layer(opened.anatomy, chosen)
    again, shared = routed_again(opened.anatomy, chosen), shared_by(opened.anatomy, chosen)
    axes = job.slicing.axes if again else {}
    kept = {layer: len(kept_experts(schemes[layer])) for layer in again}
    total = sum(shard_bytes({info.name: (info.dtype, info.shape) for info in batch}) for batch in rest_shards(opened))
    for layer in range(opened.anatomy.num_layers):
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for info in opened.anatomy.of_layer(layer):
            linear = info.target.removesuffix(".weight")
            if linear in linears:
                bank = linears[linear].tensors(1, info.shape[0], info.shape[1], opened.stored_dtype)
                tensors.update({f"{linear}.packed.{name}": tensor for name, tensor in bank.items()})
            elif info.role != EXPERT:
                left = kept.get(layer, 0) if info.target in axes else 0
                shape = tuple(left if left and i == axes[info.target] else n for i, n in enumerate(info.shape))
                tensors[info.name] = (info.dtype, shape)
        if layer in opened.anatomy.moe:
            moe = opened.anatomy.moe[layer]
            tensors[f"{moe.module}.down_proj"] = (torch.uint8, (1, 1, 1))
            if layer in shared:
                for name, dtype in (("into", torch.int32), ("share", torch.float32)):
                    tensors[f"{moe.module}.packed.{name}"] = (dtype, (moe.layout.experts,))
            for projection, chosen_schemes in schemes[layer].items():
                for scheme, count in Counter(s for s in chosen_schemes if s != DROPPED).items():
                    where = f"{moe.module}.packed.{projection}_banks.{scheme.name}"
                    bank = scheme.tensors(count, *moe.layout.shape(projection, scheme.width), opened.stored_dtype)
                    tensors.update({f"{where}.{name}": tensor for name, tensor in bank.items()})
                    tensors[f"{where}.experts"] = (torch.int32, (count,))
        total += shard_bytes(tensors)
    return total


def fixed_bytes(job: Job, schemes: list[str]) -> int:
    """Bytes of the shards that no plan changes: kept tensors, packed linears, indices; the files' headers and books at most."""
    opened, q = job.opened, job.recipe.quantize
    linears = linear_schemes(opened, role_bits(q.attention_bits, q.shared_bits, q.dense_bits))
    size, names = index_bytes(opened.anatomy) + shared_bytes(opened.anatomy, schemes), 0
    for info in opened.anatomy.tensors:
        linear = info.target.removesuffix(".weight")
        if linear in linears:
            size += linears[linear].price(*info.shape)
            names += 3 * (len(info.name) + 90)
        elif info.role != EXPERT:
            size += info.nbytes
            names += len(info.name) + 90
    known = [Scheme.parse(name) for name in schemes]
    entries = 7 if any(scheme.outliers or scheme.code == SHARED_BASIS for scheme in known) else 6 if any(scheme.code == NESTED for scheme in known) else 4
    for moe in opened.anatomy.moe.values():
        per_bank = entries * (len(moe.module) + 130)
        names += len(moe.layout.projections) * min(len(schemes), moe.layout.experts) * per_bank + 130
    shards = opened.anatomy.num_layers + len(rest_shards(opened))
    return size + names + 100 * shards


def index_bytes(anatomy: Anatomy) -> int:
    """int32 per expert and projection: which expert a matrix of a bank belongs to."""
    return sum(4 * moe.layout.experts * len(moe.layout.projections) for moe in anatomy.moe.values())


def shared_bytes(anatomy: Anatomy, schemes: list[str]) -> int:
    """What the matrices of a bank have in common (books, bases), if every scheme is used in every layer and projection."""
    cols = [moe.layout.shape(projection)[1] for moe in anatomy.moe.values() for projection in moe.layout.projections]
    whole = [scheme for scheme in map(Scheme.parse, schemes) if not scheme.width]  # thinner experts have nothing in common
    return sum(scheme.shared_bytes(one) for scheme in whole for one in cols)


def shared_bytes_of(anatomy: Anatomy, chosen: Plan) -> int:
    """The same for the schemes that a plan uses."""
    plan = by_layer(anatomy, chosen)
    return sum(scheme.shared_bytes(moe.layout.shape(projection)[1]) for layer, moe in anatomy.moe.items()
               for projection, schemes in plan[layer].items() for scheme in set(schemes))  # fmt: skip
