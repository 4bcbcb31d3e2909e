"""The story: a checkpoint and a byte budget in, a smaller checkpoint with its proof out.

open → fewer experts (prune.py), if asked for → calibrate → plan → compress, the plan and a uniform one → load again, measure
and keep the better → repair routers and tune skipping, if asked for → write.
Every stage leaves its record in the work folder; a rerun with the same inputs goes on behind the last finished layer.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moecompress.allocate.candidates import Unit, unit_id
from moecompress.allocate.joint import Ladder, Level, joint_plan, smallest_joint
from moecompress.allocate.plan import Control, Plan, make_plan, smallest_bytes, uniform_plan
from moecompress.allocate.pmq import Factors
from moecompress.calibrate import prediction
from moecompress.calibrate.gradient import by_gradient, refuse_large
from moecompress.calibrate.observe import observe
from moecompress.calibrate.statistics import Statistics
from moecompress.compress import Shared, Work, compress, kept_experts, linear_schemes, rest_shards, role_bits
from moecompress.distill.repair import refuse_little_memory, repair_routers
from moecompress.errors import UserError
from moecompress.evaluate.divergence import Divergence, Trace, bootstrap, compare, trace
from moecompress.job import Job, finish, identity, open_work, refuse_full_disk, refuse_target, work_folder
from moecompress.job import make_job as make_job
from moecompress.model.anatomy import EXPERT, Anatomy
from moecompress.model.checkpoint import copy_companions, read_config, write_index, write_text
from moecompress.model.walk import OpenModel
from moecompress.pack.manifest import FOLDER, expert_bytes, fates
from moecompress.pack.scheme import DROPPED, NESTED, Scheme
from moecompress.pack.size import shard_bytes
from moecompress.progress import notice
from moecompress.prune import account, transformed, without_fates
from moecompress.recipe import Recipe, expert_of
from moecompress.route.folder import Wish, choose, learned, record_of, store
from moecompress.route.frontier import Bench
from moecompress.runtime.bank import bank_tensors
from moecompress.runtime.loading import prepare
from moecompress.runtime.registration import FORMAT_VERSION, METHOD
from moecompress.runtime.skipping import KEY
from moecompress.transform.shed import Slicing, thinning
from moecompress.transform.shrink import with_number

#: A plan for a target size is refined until less than this share of it is left over, or this often.
SIZE_SLACK, SIZE_ROUNDS = 0.001, 6
#: Above so many bits a weight, dropping experts has never been worth it, so "auto" does not measure it.
DROP_BELOW = 2.25


@dataclass(frozen=True)
class Result:
    """What a run did. ``chosen``: "plan", "bits" (all experts kept) or "uniform". ``measured``: label -> summary on held-out
    calibration text. Plan and statistics are of the model that transform steps left."""

    folder: Path | None
    plan: Plan
    statistics: Statistics
    chosen: str = "plan"
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)


# --- stages ---------------------------------------------------------------------------------------------------------


def calibrate(job: Job, work: Path) -> Statistics:
    thin = may_drop(job)
    if (work / "statistics.json").exists():
        statistics = Statistics.load(work)
        made = (statistics.fingerprint, statistics.schemes, statistics.harm)
        wanted = (job.calibration.fingerprint(), [s.name for s in job.schemes], job.recipe.allocate.harm)
        if made == wanted and statistics.thinned >= thin:
            return statistics
        shutil.rmtree(work)
    if job.recipe.allocate.harm == "gradient":
        refuse_large(job.opened, job.tokens.ids.shape[1])
    measure = partial(thinning, ways_of(job)) if thin else None
    statistics = observe(job.opened, job.calibration, job.schemes, job.settings, work, measure)
    if job.recipe.allocate.harm == "gradient":
        statistics = by_gradient(job.open(), job.calibration, statistics)
    statistics.save(work)
    return statistics


def ways_of(job: Job) -> Slicing | None:
    """How layers get fewer experts to route to; None where this family cannot, and only matrices can be shared."""
    try:
        return job.slicing
    except UserError as error:
        notice(f"this model's routers cannot do with fewer experts ({error.what}): experts that are left out are served by others")
        return None


def may_drop(job: Job) -> bool:
    """Is leaving experts out among the candidates?"""
    wish = job.recipe.allocate
    if wish.drop is False or wish.allocator != "global":
        return False
    if wish.drop is True:
        return True
    target = job.recipe.target
    if target.bits is None and target.size is None:  # statistics for no plan in particular
        return False
    budget = expert_budget(job)
    return budget is not None and 8 * budget < DROP_BELOW * job.given.opened.anatomy.expert_weights


def plan(job: Job, statistics: Statistics) -> tuple[Plan, Plan]:
    """The recipe's plan and the uniform plan of the same bytes."""
    made, others = plans(job, statistics)
    return made, others.get("uniform", made)


def plans(job: Job, statistics: Statistics) -> tuple[Plan, dict[str, Plan]]:
    """The recipe's plan, and others of the same target: "bits", if the plan leaves experts out and keeping all of them is
    possible, and "uniform"."""
    units, harm = units_of(job.opened, statistics)
    candidates = [Scheme.parse(name) for name in statistics.schemes]
    settings = job.recipe.allocate
    budget = expert_budget(job, statistics.schemes)
    of_all = least = smallest_bytes(units, candidates, harm)
    joint = may_drop(job) and statistics.thinned
    if settings.drop is True and not joint:
        raise UserError("The statistics do not say what dropping experts costs", expected="statistics made with allocate.drop=true",
                        remedy="calibrate again with this recipe, or leave allocate.drop out")  # fmt: skip
    header = 2 * 130 if job.recipe.target.size is not None else 0
    tables = sum(8 * moe.layout.experts + header for moe in job.opened.anatomy.moe.values())  # of who serves for whom
    if joint:
        of_some = smallest_joint(units, candidates, harm, ladder_of(statistics)) + tables
        joint, least = budget is not None and budget >= of_some, min(of_all, of_some)
    if budget is not None and budget < least:
        raise too_small(job, budget, least)
    factors = _factors(job.opened.anatomy, statistics) if settings.allocator == "pmq" else None
    seed = job.recipe.compute.seed

    def bits_alone(budget_bytes: int | None) -> Plan:
        return make_plan(units, candidates, harm, budget_bytes, settings, factors=factors, seed=seed)

    def jointly(budget_bytes: int | None) -> Plan:
        assert budget_bytes is not None
        return joint_plan(units, candidates, harm, ladder_of(statistics), budget_bytes - tables, settings, seed)

    def made_by(make: Callable[[int | None], Plan]) -> Plan:
        made = make(budget)
        if job.recipe.target.size is not None and budget is not None:
            made = use_whole_size(made, budget, job.recipe.target.size, make, lambda plan: written_bytes(job, plan))
        elif books and budget is not None:  # those that the plan does not need leave bytes to it
            made = use_whole_size(made, budget, budget + books, make, lambda plan: plan.bytes + shared_bytes_of(job.opened.anatomy, plan))
        return made

    books = shared_bytes(job.opened.anatomy, statistics.schemes)
    others: dict[str, Plan] = {}
    made = made_by(jointly if joint else bits_alone)
    if budget is None or budget >= of_all:
        bits = made_by(bits_alone) if joint else made
        if made.dropped:
            others["bits"] = bits
        else:
            made = bits
        # Every plan fits what all books leave; another one with the bytes of this plan may need more of them.
        allowed = budget if books and budget is not None else others.get("bits", made).target_bytes
        others["uniform"] = uniform_plan(units, candidates, harm, allowed)
    if made.dropped:
        made = replace(made, controls={name: Control(other.bytes, other.harm) for name, other in others.items()})
    return made, others


def ladder_of(statistics: Statistics) -> Ladder:
    """Layer -> the ways to thin it out, with predicted KL."""
    ladder: dict[int, list[Level]] = {}
    for index, layer in statistics.layers.items():
        found = layer.thinning
        assert found is not None
        ladder[index] = []
        for into, share, again, error, growth in zip(*vars(found).values(), strict=True):
            gone = (into != torch.arange(len(into))).nonzero().flatten()
            serving = zip(into[gone].tolist(), share[gone].tolist(), strict=True)
            ladder[index].append(Level(tuple(gone.tolist()), float(error) * layer.nats, growth.numpy(), () if again else tuple(serving)))
    return ladder


def quantize(job: Job, out: Path, *, fresh: bool = False, dry_run: bool = False) -> Result:
    """Compress ``job`` into the folder ``out``, which appears only when it is complete and verified."""
    refuse_target(out)
    work = work_folder(out)
    refuse_no_target(job.recipe)
    open_work(work, job.fingerprint(), fresh)
    job, steps = transformed(job, work)
    statistics = calibrate(job, work / "calibrate")
    chosen_plan, others = plans(job, statistics)
    if dry_run:
        return Result(None, chosen_plan, statistics, manifest={"steps": without_fates(steps)} if steps else {})
    tried = {"plan": chosen_plan}
    if job.recipe.allocate.compare == "uniform":
        tried |= {label: other for label, other in others.items() if other.assignments() != chosen_plan.assignments()}
    check_space(out, job, list(tried.values()))
    reference = job.given.reference
    measured: dict[str, Divergence] = {}
    manifests = {}
    for label, each in tried.items():
        folder = work / label
        manifests[label] = build(job, statistics, each, folder, label)
        measured[label] = load_and_measure(folder / "out", job.heldout, reference, job.opened.dtype)
    winner = min(measured, key=lambda label: float(measured[label].kl.mean()))
    summaries = {label: divergence.summary() for label, divergence in measured.items()}
    for label in [label for label in measured if label != "plan"]:
        difference = (measured["plan"].kl - measured[label].kl).mean(1)
        summaries[f"plan_minus_{label}"] = {
            "kl_mean": float(difference.mean()),
            "kl_interval_95": list(bootstrap(difference)),
        }
    if winner != "plan":
        better = {"uniform": "the uniform plan", "bits": "the plan that keeps all experts"}[winner]
        notice(f"{better} measured better than the allocated one; it is the one that was written")
    refuse_far(job, tried[winner], summaries[winner])
    ready, manifest = work / winner / "out", manifests[winner] | {"heldout": summaries, "chosen": winner}
    if job.recipe.repair.router:
        ready, manifest["repair"] = repaired(job, ready, summaries[winner], work / "repair")
    if job.recipe.route.policy != "none":
        manifest["routing"] = skipping(job, ready)
    if steps:
        manifest |= account(job, steps, manifest["tensors"])
    finish(ready, manifest, out)
    shutil.rmtree(work)
    return Result(out, tried[winner], statistics, winner, summaries, manifest)


def build(job: Job, statistics: Statistics, chosen: Plan, folder: Path, label: str) -> dict[str, Any]:
    """All files of a compressed checkpoint in ``folder``/out; returns its manifest without hashes."""
    opened, out = job.open(), folder / "out"
    q = job.recipe.quantize
    linears = linear_schemes(opened, role_bits(q.attention_bits, q.shared_bits, q.dense_bits))
    schemes = by_layer(opened.anatomy, chosen)
    done = compress(opened, job.calibration, schemes, linears, job.settings, Work(out, folder / "state"),
                    {"plan": "quantize", "uniform": "quantize, uniform plan"}.get(label, "quantize, all experts"),
                    job.slicing.keys if routed_again(opened.anatomy, chosen) else None, shared_by(opened.anatomy, chosen))  # fmt: skip
    shards = sorted(out.glob("model-*.safetensors"))
    write_index(out, shards)
    dtype = str(opened.stored_dtype).removeprefix("torch.")
    names: dict[str, list[str]] = {}
    for name, scheme in linears.items():
        names.setdefault(scheme.name, []).append(name)
    config: dict[str, Any] = dict(opened.checkpoint.config)
    fewer: dict[str, Any] = {}
    if done["kept"]:
        config, fewer = with_fewer(config, job, done["kept"])
    config["quantization_config"] = {"quant_method": METHOD, "version": FORMAT_VERSION, "dtype": dtype,
                                     "experts": done["contents"], "linears": names, "rotation_seed": job.settings.seed} | fewer  # fmt: skip
    write_text(out / "config.json", json.dumps(config, indent=2))
    copy_companions(job.folder, out)
    records = out / FOLDER
    records.mkdir(exist_ok=True)
    write_text(records / "plan.json", chosen.to_json())
    write_text(records / "recipe.yaml", job.recipe.to_yaml())
    statistics.save(records)
    weights = job.given.opened.anatomy.expert_weights
    stored = expert_bytes(shards)
    return {
        **identity(job),
        "total_bytes": sum(shard.stat().st_size for shard in shards),
        "expert_bytes": stored,
        "expert_weights": weights,
        "bits_per_weight": 8 * stored / weights,
        "target": job.recipe.target.model_dump(mode="json"),
        "unreached_experts": [f"L{layer:02d}.E{expert:03d}" for layer, expert in statistics.unreached()],
        "fallbacks": done["fallbacks"],
        "errors": done["errors"],
        "prediction": prediction.compare(_by_unit(opened.anatomy, done["measured"]), chosen, statistics),
        "schemes": done["schemes"],
        "dropped": {str(layer): gone for layer, gone in gone_experts(schemes).items()},
        "shared": {expert: list(by) for expert, by in sorted(chosen.shared.items())},
        "dictionary": against_entropy(opened.anatomy, done["archived"]),
        "tensors": fates(opened.anatomy, done["schemes"], gone_experts(schemes), done["changed"]),
    }  # fmt: skip


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
        one = found.setdefault(layer, Shared(torch.arange(experts), torch.ones(experts)))
        one.into[expert], one.factor[expert] = by, factor
    return found


def with_fewer(config: dict[str, Any], job: Job, kept: dict[int, list[int]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json of a model whose layers keep these experts, and what its quantization_config says of them. Where all layers keep
    equally many it is an ordinary config with another number."""
    if config.pop(KEY, None):
        notice("the model's routing policy was tuned for more experts and is left out; see `moecompress tune-routing`")
    moe, keys = job.opened.anatomy.moe, job.slicing.keys
    counts = {layer.module: len(kept[index]) if index in kept else layer.layout.experts for index, layer in moe.items()}
    if len(set(counts.values())) == 1:
        for key in keys:
            config = with_number(config, key, next(iter(counts.values())))
        return config, {}
    changed = {moe[index].module: len(left) for index, left in sorted(kept.items())}
    return config, {"fewer": {"keys": keys, "experts": changed}}


def refuse_far(job: Job, chosen: Plan, measured: dict[str, Any]) -> None:
    """UserError where the best result is further from the original than allocate.max_kl."""
    limit, kl = job.recipe.allocate.max_kl, measured["kl_mean"]
    if limit is None or kl <= limit:
        return
    harm: Counter[str] = Counter()
    for choice in chosen.choices:
        harm[choice.unit.split(".")[0]] += choice.harm  # type: ignore[assignment]
    layer, worst = max(harm.items(), key=lambda item: item[1])
    raise UserError("The result is too far from the original", expected=f"at most {limit:g} nats of KL on held-out text (allocate.max_kl)",
                    got=f"{kl:.4g} nats; {worst / max(chosen.harm, 1e-30):.0%} of the predicted harm is in layer {int(layer[1:])}",
                    remedy="raise the target, add candidates, or calibrate on text more like the model's use; with a larger "
                    "max_kl, or null, the same command goes on from here")  # fmt: skip


def against_entropy(anatomy: Anatomy, archived: dict[str, dict[str, Any]]) -> dict[str, float] | None:
    """What the dictionary code stores beside its levels, and what an entropy coder would: bits a weight, means over banks."""
    if not archived:
        return None
    layouts = {moe.module: moe.layout for moe in anatomy.moe.values()}
    stored = []
    for name, found in archived.items():
        module, _, projection = name.rpartition(".")
        rows, cols = layouts[module].shape(projection)
        stored.append((8 * Scheme.parse(found["scheme"]).price(rows, cols) - 32 * rows) / (rows * cols))
    return {"stored_bits": float(np.mean(stored)), "entropy_bits": float(np.mean([found["bits"] for found in archived.values()]))}


def skipping(job: Job, ready: Path) -> dict[str, Any]:
    """Tune the recipe's routing policy on the calibration text for the folder ``ready``, and write it into config.json."""
    wish, calibration = Wish(**job.recipe.route.model_dump()), job.calibration

    def opened() -> OpenModel:
        return OpenModel(ready, job.opened.dtype, job.trust_remote_code, prepare=prepare(ready, skipping=False))

    bench = Bench(opened, job.heldout, trace(opened(), job.heldout, "compressed on held-out text"))
    pruners, training = learned(ready, opened, calibration.ids, wish, job.trust_remote_code)
    chosen, points = choose(bench, calibration.batches, calibration.mask, wish, pruners)
    store(read_config(ready), chosen.policy, ready)
    after = load_and_measure(ready, job.heldout, job.given.reference, job.opened.dtype).summary()
    return record_of(chosen, points) | training | {"after": after}


def repaired(job: Job, ready: Path, before: dict[str, Any], work: Path) -> tuple[Path, dict[str, Any]]:
    """Repair the routers of the folder ``ready``; the folder to go on with, and what came of it. ``before``: its summary."""
    found, record = repair_routers(job, ready, work)
    after = before
    if found is not None:
        after = load_and_measure(found, job.heldout, job.given.reference, job.opened.dtype).summary()
    kept = after["kl_mean"] < before["kl_mean"]
    if not kept:
        notice("training the routers did not bring the model closer to the original on held-out text: they stay as they were")
    return found if found is not None and kept else ready, record | {"before": before, "after": after, "kept": kept}


def load_and_measure(folder: Path, batches: list[torch.Tensor], reference: Trace, dtype: torch.dtype) -> Divergence:
    """Load a written folder again, from its files alone, and compare it with the original."""
    return compare(OpenModel(folder, dtype, prepare=prepare(folder)), batches, reference, "compressed on held-out text")


# --- budgets --------------------------------------------------------------------------------------------------------


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
            p: [assigned[unit_id(layer, e, p)].fitted(moe.layout.shape(p)[1]) for e in range(moe.layout.experts)]
            for p in moe.layout.projections
        }
        for layer, moe in anatomy.moe.items()
    }


def _by_unit(anatomy: Anatomy, values: dict[str, float]) -> dict[str, float]:
    """What was recorded by module.expert.projection, by unit."""
    layer_of = {moe.module: layer for layer, moe in anatomy.moe.items()}
    parts = {name: name.rsplit(".", 2) for name in values}
    return {unit_id(layer_of[module], int(e), p): values[name] for name, (module, e, p) in parts.items()}


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
                bank = bank_tensors(linears[linear], 1, info.shape[0], info.shape[1], opened.stored_dtype)
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
                    bank = bank_tensors(scheme, count, *moe.layout.shape(projection), opened.stored_dtype)
                    tensors.update({f"{where}.{name}": tensor for name, tensor in bank.items()})
                    tensors[f"{where}.experts"] = (torch.int32, (count,))
        total += shard_bytes(tensors)
    return total


def index_bytes(anatomy: Anatomy) -> int:
    """int32 per expert and projection: which expert a matrix of a bank belongs to."""
    return sum(4 * moe.layout.experts * len(moe.layout.projections) for moe in anatomy.moe.values())


def shared_bytes(anatomy: Anatomy, schemes: list[str]) -> int:
    """What the matrices of a bank have in common (books), if every scheme is used in every layer and projection."""
    return sum(Scheme.parse(name).shared_bytes for name in schemes) * sum(len(moe.layout.projections) for moe in anatomy.moe.values())


def shared_bytes_of(anatomy: Anatomy, chosen: Plan) -> int:
    """The same for the schemes that a plan uses."""
    banks = (scheme for layer in by_layer(anatomy, chosen).values() for schemes in layer.values() for scheme in set(schemes))
    return sum(scheme.shared_bytes for scheme in banks)


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
    entries = 7 if any(scheme.outliers for scheme in known) else 6 if any(scheme.code == NESTED for scheme in known) else 4
    for moe in opened.anatomy.moe.values():
        per_bank = entries * (len(moe.module) + 130)
        names += len(moe.layout.projections) * min(len(schemes), moe.layout.experts) * per_bank + 130
    shards = opened.anatomy.num_layers + len(rest_shards(opened))
    return size + names + 100 * shards


def too_small(job: Job, budget: int, least: int) -> UserError:
    target = job.recipe.target
    if target.size is not None:
        smallest = target.size - budget + least
        return UserError("The target size cannot be reached", expected=f"at least {smallest:,} bytes with these candidates",
                         got=f"{target.size:,} bytes", remedy="raise the target, or add candidates with fewer bits")  # fmt: skip
    weights, anatomy = job.given.opened.anatomy.expert_weights, job.opened.anatomy
    extra = index_bytes(anatomy) + shared_bytes(anatomy, [scheme.name for scheme in job.schemes])
    return UserError("The target cannot be reached", expected=f"at least {8 * (least + extra) / weights:.4f} bits per expert weight",
                     got=target.bits, remedy="raise the target, or add candidates with fewer bits")  # fmt: skip


def _factors(anatomy: Anatomy, statistics: Statistics) -> Factors:
    """PMQ's factors from our statistics: the block error is the root of the expected squared error of all projections."""
    layers = list(statistics.layers.values())
    return Factors(
        frequency=np.stack([layer.counts.double().numpy() for layer in layers]),
        weight=np.stack([layer.gate_sum.numpy() for layer in layers]),
        error=np.stack([layer.harm.sum(1).sqrt().numpy() for layer in layers]),
    )


def check_space(out: Path, job: Job, tried: list[Plan]) -> None:
    """Refuse before the long part when the disk cannot hold the results and the state for resuming, or memory a repair."""
    if job.recipe.repair.router:
        refuse_little_memory(job, max(each.bytes for each in tried) + fixed_bytes(job, []))
    hidden = job.tokens.ids.numel() * 2 * job.opened.config.get_text_config().hidden_size * job.opened.dtype.itemsize
    refuse_full_disk(out, sum(each.bytes + fixed_bytes(job, []) for each in tried) + hidden,
                     "free space, choose another -o, or set allocate.compare=none")  # fmt: skip
