"""The story: a checkpoint and a byte budget in, a smaller checkpoint with its proof out.

open → fewer experts (prune.py), if asked for → calibrate → plan → compress, the plan and a uniform one → load again, measure
and keep the better → repair routers and tune skipping, if asked for → write.
Every stage leaves its record in the work folder; a rerun with the same inputs goes on behind the last finished layer.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from moecompress.allocate.candidates import unit_id
from moecompress.allocate.plan import Plan
from moecompress.calibrate import prediction
from moecompress.calibrate.gradient import by_gradient, refuse_large
from moecompress.calibrate.observe import observe
from moecompress.calibrate.statistics import Statistics, narrowing_of, thinning_of
from moecompress.compress import Work, compress, linear_schemes, role_bits
from moecompress.distill.repair import refuse_little_memory, repair_routers
from moecompress.errors import UserError
from moecompress.evaluate.divergence import Divergence, Trace, bootstrap, compare, trace
from moecompress.job import Job, finish, identity, open_work, refuse_full_disk, refuse_target, work_folder
from moecompress.job import make_job as make_job
from moecompress.model.anatomy import Anatomy
from moecompress.model.checkpoint import copy_companions, read_config, write_index, write_text
from moecompress.model.walk import OpenModel
from moecompress.pack.manifest import FOLDER, expert_bytes, fates, left_out
from moecompress.pack.scheme import Scheme
from moecompress.plans import (
    by_layer,
    fixed_bytes,
    gone_experts,
    may_drop,
    may_slim,
    merged_by,
    plan_and_others,
    refuse_no_target,
    routed_again,
    shared_by,
    slimmed_experts,
    ways_of,
)
from moecompress.progress import notice
from moecompress.prune import account, transformed, without_fates
from moecompress.route.folder import Wish, choose, learned, record_of, store, worth
from moecompress.route.frontier import Bench
from moecompress.runtime import pruner
from moecompress.runtime.loading import prepare
from moecompress.runtime.registration import FORMAT_VERSION, METHOD
from moecompress.runtime.skipping import forget_policy
from moecompress.transform.shed import thinning
from moecompress.transform.shrink import with_number

#: What a plan's bar of progress is called.
PROGRESS = {"uniform": "quantize, uniform plan", "bits": "quantize, all experts", "whole": "quantize, whole experts",
            "cross": "quantize, towards the original's outputs"}


@dataclass(frozen=True)
class Result:
    """What a run did. ``chosen``: "plan", "cross" (the plan, rounded towards the original's outputs), "whole" (no thinner experts),
    "bits" (all experts kept whole) or "uniform". ``measured``: label -> summary on held-out calibration text. Plan and statistics
    are of the model that transform steps left."""

    folder: Path | None
    plan: Plan
    statistics: Statistics
    chosen: str = "plan"
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)


# --- stages ---------------------------------------------------------------------------------------------------------


def calibrate(job: Job, work: Path) -> Statistics:
    thin, narrow = may_drop(job), may_slim(job)
    if job.without_trellis:
        notice("the compiled trellis encoder is missing, so the candidates are integers of 2 bits and more; install moecompress where a C++ "
               "compiler is")  # fmt: skip
    if (work / "statistics.json").exists():
        statistics = Statistics.load(work)
        made = (statistics.fingerprint, statistics.schemes, statistics.harm)
        wanted = (job.calibration.fingerprint(), [s.name for s in job.schemes], job.recipe.allocate.harm)
        if made == wanted and statistics.thinned >= thin and statistics.narrowed >= narrow:
            return statistics
        shutil.rmtree(work)
    elif any(needed and of(load_file(path)) is None for needed, of in ((thin, thinning_of), (narrow, narrowing_of))
             for path in work.glob("layer-*.safetensors")):  # fmt: skip
        shutil.rmtree(work)  # an older version began it, which measured less
    if job.recipe.allocate.harm == "gradient":
        refuse_large(job.opened, job.tokens.ids.shape[1])
    measure = partial(thinning, ways_of(job)) if thin else None
    statistics = observe(job.opened, job.calibration, job.schemes, job.settings, work, measure, narrow)
    if job.recipe.allocate.harm == "gradient":
        statistics = by_gradient(job.open(), job.calibration, statistics)
    statistics.save(work)
    return statistics


def quantize(job: Job, out: Path, *, fresh: bool = False, dry_run: bool = False) -> Result:
    """Compress ``job`` into the folder ``out``, which appears only when it is complete and verified."""
    refuse_target(out)
    work = work_folder(out)
    refuse_no_target(job.recipe)
    open_work(work, job.fingerprint(), fresh)
    job, steps = transformed(job, work)
    statistics = calibrate(job, work / "calibrate")
    chosen_plan, others = plan_and_others(job, statistics)
    if dry_run:
        return Result(None, chosen_plan, statistics, manifest={"steps": without_fates(steps)} if steps else {})
    cross = job.recipe.quantize.target == "cross"
    tried = {"cross" if cross else "plan": chosen_plan}
    if job.recipe.allocate.compare == "uniform":
        tried["plan"] = chosen_plan
        tried |= {label: other for label, other in others.items() if other.assignments() != chosen_plan.assignments()}
    check_space(out, job, list(tried.values()))
    reference = job.given.reference
    measured: dict[str, Divergence] = {}
    manifests = {}
    for label, each in tried.items():
        folder = work / label
        manifests[label] = build(job, statistics, each, folder, label, cross=label == "cross")
        measured[label] = load_and_measure(folder / "out", job.heldout, reference, job.opened.dtype)
    winner = min(measured, key=lambda label: float(measured[label].kl.mean()))
    summaries = {label: divergence.summary() for label, divergence in measured.items()}
    for label in [label for label in measured if label != "plan" and "plan" in measured]:
        difference = (measured["plan"].kl - measured[label].kl).mean(1)
        summaries[f"plan_minus_{label}"] = {
            "kl_mean": float(difference.mean()),
            "kl_interval_95": list(bootstrap(difference)),
        }
    if cross and "plan" in measured:
        notice(f"KL on held-out text: {summaries['cross']['kl_mean']:.5f} nats with experts rounded towards the original's outputs, "
               f"{summaries['plan']['kl_mean']:.5f} towards their own weights")  # fmt: skip
    if winner not in ("plan", "cross"):
        better = {"uniform": "the uniform plan", "bits": "the plan that keeps all experts",
                  "whole": "the plan that leaves no neurons of an expert out"}[winner]  # fmt: skip
        notice(f"{better} measured better than the allocated one; it is the one that was written")
    refuse_far(job, tried[winner], summaries[winner])
    ready, manifest = work / winner / "out", manifests[winner] | {"heldout": summaries, "chosen": winner}
    if job.recipe.repair.router:
        ready, manifest["repair"] = repaired(job, ready, summaries[winner], work / "repair")
    if job.recipe.route.policy != "none":
        manifest["routing"] = skipping(job, ready)
        if manifest["routing"]["kept"] and (ready / pruner.FILE).exists():
            manifest["total_bytes"] += (ready / pruner.FILE).stat().st_size
    if steps:
        manifest |= account(job, steps, manifest["tensors"])
    finish(ready, manifest, out)
    shutil.rmtree(work)
    return Result(out, tried[winner], statistics, winner, summaries, manifest)


def build(job: Job, statistics: Statistics, chosen: Plan, folder: Path, label: str, cross: bool | None = None) -> dict[str, Any]:
    """All files of a compressed checkpoint in ``folder``/out; returns its manifest without hashes. ``cross``: round towards the
    original's outputs; None: as the recipe says."""
    opened, out = job.open(), folder / "out"
    q = job.recipe.quantize
    cross = q.target == "cross" if cross is None else cross
    linears = linear_schemes(opened, role_bits(q.attention_bits, q.shared_bits, q.dense_bits))
    schemes = by_layer(opened.anatomy, chosen)
    done = compress(opened, job.calibration, schemes, linears, job.settings, Work(out, folder / "state"),
                    PROGRESS.get(label, "quantize"),
                    job.slicing.keys if routed_again(opened.anatomy, chosen) else None, shared_by(opened.anatomy, chosen),
                    job.open() if cross else None)  # fmt: skip
    shards = sorted(out.glob("model-*.safetensors"))
    write_index(out, shards)
    dtype = str(opened.stored_dtype).removeprefix("torch.")
    names: dict[str, list[str]] = {}
    for name, scheme in linears.items():
        names.setdefault(scheme.name, []).append(name)
    config: dict[str, Any] = dict(opened.checkpoint.config)
    fewer: dict[str, Any] = {}
    forget_policy(config, fewer=bool(done["kept"]), thinner=bool(slimmed_experts(schemes)))
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
        "candidates": statistics.schemes,
        "without_trellis": job.without_trellis,
        "unreached_experts": [f"L{layer:02d}.E{expert:03d}" for layer, expert in statistics.unreached()],
        "fallbacks": done["fallbacks"],
        "errors": done["errors"],
        "prediction": prediction.compare(_by_unit(opened.anatomy, done["measured"]), chosen, statistics),
        "schemes": done["schemes"],
        "dropped": {str(layer): gone for layer, gone in gone_experts(schemes).items()},
        "slimmed": {str(layer): {str(e): width for e, width in found.items()} for layer, found in slimmed_experts(schemes).items()},
        "shared": {expert: list(by) for expert, by in sorted(chosen.shared.items())},
        "left_out": left_out(gone_experts(schemes), chosen.shared, merged_by(chosen)),
        "dictionary": against_entropy(opened.anatomy, done["archived"]),
        "tensors": fates(opened.anatomy, done["schemes"], gone_experts(schemes), done["changed"], merged_by(chosen), slimmed_experts(schemes)),
    }  # fmt: skip


def with_fewer(config: dict[str, Any], job: Job, kept: dict[int, list[int]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json of a model whose layers keep these experts, and what its quantization_config says of them. Where all layers keep
    equally many it is an ordinary config with another number."""
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
        scheme = Scheme.parse(found["scheme"])
        rows, cols = layouts[module].shape(projection, scheme.width)
        stored.append((8 * scheme.price(rows, cols) - 32 * rows) / (rows * cols))
    return {"stored_bits": float(np.mean(stored)), "entropy_bits": float(np.mean([found["bits"] for found in archived.values()]))}


def skipping(job: Job, ready: Path) -> dict[str, Any]:
    """Tune the recipe's routing policy on the calibration text for the folder ``ready``, and write it into config.json."""
    wish, calibration = Wish(**job.recipe.route.model_dump()), job.calibration

    def opened() -> OpenModel:
        return OpenModel(ready, job.opened.dtype, job.trust_remote_code, prepare=prepare(ready, skipping=False))

    bench = Bench(opened, job.heldout, trace(opened(), job.heldout, "compressed on held-out text"))
    pruners, training = learned(ready, opened, calibration.ids, wish, job.trust_remote_code)
    chosen, points = choose(bench, calibration.batches, calibration.mask, wish, pruners)
    kept = worth(chosen, points)
    if kept:
        store(read_config(ready), chosen.policy, ready)
    else:
        notice("the vectors of compressed experts did not help on held-out text: all experts of a token compute, as without a policy")
    after = load_and_measure(ready, job.heldout, job.given.reference, job.opened.dtype).summary()
    return record_of(chosen, points) | training | {"after": after, "kept": kept}


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


def _by_unit(anatomy: Anatomy, values: dict[str, float]) -> dict[str, float]:
    """What was recorded by module.expert.projection, by unit."""
    layer_of = {moe.module: layer for layer, moe in anatomy.moe.items()}
    parts = {name: name.rsplit(".", 2) for name in values}
    return {unit_id(layer_of[module], int(e), p): values[name] for name, (module, e, p) in parts.items()}


def check_space(out: Path, job: Job, tried: list[Plan]) -> None:
    """Refuse before the long part when the disk cannot hold the results and the state for resuming, or memory a repair."""
    if job.recipe.repair.router:
        refuse_little_memory(job, max(each.bytes for each in tried) + fixed_bytes(job, []))
    streams = 2 if job.recipe.quantize.target == "cross" else 1
    hidden = streams * job.tokens.ids.numel() * 2 * job.opened.config.get_text_config().hidden_size * job.opened.dtype.itemsize
    refuse_full_disk(out, sum(each.bytes + fixed_bytes(job, []) for each in tried) + hidden,
                     "free space, choose another -o, or set allocate.compare=none")  # fmt: skip
