"""A checkpoint in, the same checkpoint with a routing policy out: tune, measure on held-out text, write."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moecompress.calibrate.data import TokenBatches, split_heldout, token_batches
from moecompress.errors import UserError
from moecompress.evaluate.divergence import compare, trace
from moecompress.job import finish, refuse_target, work_folder
from moecompress.model.anatomy import top_k_of
from moecompress.model.checkpoint import INDEX, Checkpoint, copy_companions, give_name, resolve, write_text
from moecompress.model.skeleton import compute_dtype, load_tokenizer
from moecompress.model.walk import OpenModel
from moecompress.pack.manifest import FOLDER, MANIFEST, read_manifest
from moecompress.route import vectors
from moecompress.route.calibrate import observe, policy_of
from moecompress.route.frontier import Bench, Point, by_harm, by_share, speeds
from moecompress.route.otp import Training, learn
from moecompress.runtime import pruner
from moecompress.runtime.loading import prepare, verify_files
from moecompress.runtime.skipping import KEY, LEARNED, PROTECT, RENORMALISE, Policy
from moecompress.runtime.vectors import Vectors

#: What otp's masks are trained to skip where a KL says how much is allowed.
OTP_SHARE = 0.25


@dataclass(frozen=True)
class Wish:
    """A policy and how much it may skip; the fields of `RouteRecipe`. main: see `route.vectors.Training`."""

    policy: str
    skip: float | None = None
    max_kl: float | None = None
    renormalise: bool | None = None
    protect: float | None = None
    steps: int | None = None
    main: int | None = None


def route(model: str, output: Path, policy: str, share: float | None = None, text: str = "builtin", sequences: int = 32,
          length: int = 512, heldout: int = 8, renormalise: bool | None = None, reference: str | None = None, dtype: str = "auto",
          trust_remote_code: bool = False, tokens: TokenBatches | None = None, max_kl: float | None = None,
          speed: bool = False, protect: float | None = None, steps: int | None = None, main: int | None = None) -> dict[str, Any]:  # fmt: skip
    """See `moecompress tune-routing --help`. ``tokens``: instead of ``text``. KL is of ``reference`` (the model itself,
    waking all experts, if None) ‖ model, in nats. ``speed``: load the model and time it at every point of the curve.
    ``protect``: share of tokens that lose no expert (None: as the policy's paper). ``steps``: of training otp and
    compressed-experts. ``main``: of compressed-experts, experts of a token that compute."""
    wish = Wish(policy, share, max_kl, renormalise, protect, steps, main)
    refuse_wish(wish)
    refuse_target(output)
    folder = resolve(model)
    verify_files(folder)
    original = folder if reference is None else resolve(reference)
    if tokens is None:
        tokens = token_batches(load_tokenizer(folder, trust_remote_code), text, sequences, length)
    used, unseen = split_heldout(tokens, heldout)
    precision = compute_dtype(original, dtype)

    def opened(where: Path) -> OpenModel:
        return OpenModel(where, precision, trust_remote_code, prepare=prepare(where, skipping=False))

    batches = list(unseen.ids.split(1))
    known = trace(opened(original), batches, "all experts on held-out text")
    before: dict[str, Any] = {} if reference is None else {"before": compare(opened(folder), batches, known, "before").summary()}
    bench = Bench(partial(opened, folder), batches, known)
    pruners, training = learned(folder, partial(opened, folder), used.ids, wish, trust_remote_code)
    chosen, points = choose(bench, used.ids.split(1), used.mask, wish, pruners)
    record = record_of(chosen, points) | training | before
    if not worth(chosen, points):
        raise UserError("The vectors of compressed experts do not help here",
                        expected=f"a KL on held-out text below {points[0].kl:.5f} nats, which skipping without them costs", got=f"{chosen.kl:.5f}",
                        remedy="train on more text (--sequences, --length) or longer (--steps), or choose another policy")  # fmt: skip
    write(folder, output, chosen.policy, record)
    start = {"skipped": 0.0, "calibration_skipped": 0.0, "kl_mean": before["before"]["kl_mean"] if before else 0.0}
    curve = [start, *record["curve"]]
    if speed:
        found = speeds(folder, [point.policy for point in points], unseen.ids[0], trust_remote_code)
        curve = [row | {"tokens_per_second": rate} for row, rate in zip(curve, found, strict=True)]
    thresholds = {name: rule.threshold for name, rule in chosen.policy.layers.items()}
    return {"output": str(output), **record, "curve": curve, "thresholds": thresholds}


def learned(folder: Path, opened: Callable[[], OpenModel], ids: torch.Tensor, wish: Wish, trust_remote_code: bool = False
            ) -> tuple[dict[str, Any] | None, dict[str, Any]]:  # fmt: skip
    """What otp or compressed-experts trains on token ids [N, L], by experts module, and its record; nothing for the other
    policies. opened: gives the model in ``folder``."""
    if wish.policy not in LEARNED:
        return None, {}
    renormalise = RENORMALISE[wish.policy] if wish.renormalise is None else wish.renormalise
    skeleton = opened()
    layers = [moe.module for moe in skeleton.anatomy.moe.values()]
    if wish.policy == vectors.POLICY:
        main = vectors.main_experts(top_k_of(skeleton.model), wish.main)
        made = vectors.Training(main, wish.steps or vectors.Training.steps, renormalise=renormalise)
        found, record = vectors.learn(folder, layers, ids, made, skeleton.dtype, trust_remote_code)
        return found, {"training": record, "vectors_bytes": sum(one.stored_bytes for one in found.values())}
    share = OTP_SHARE if wish.skip is None else wish.skip
    training = Training(share, wish.steps or Training.steps, renormalise=renormalise)
    pruners, record = learn(folder, layers, ids, training, skeleton.dtype, trust_remote_code)
    return pruners, {"training": record}


def refuse_wish(wish: Wish) -> None:
    """UserError if the wish has what its policy does not know, or lacks what it needs."""
    given = [name for name, value in (("--skip", wish.skip), ("--max-kl", wish.max_kl)) if value is not None]
    if wish.policy == vectors.POLICY:
        if given:
            raise UserError(f"{wish.policy} skips all but a number of experts", expected="--main, or nothing for half of them", got=" and ".join(given),
                            remedy=f"leave {given[0]} out")  # fmt: skip
    elif wish.main is not None:
        raise UserError(f"Policy {wish.policy} has no main experts", expected=f"--main only with {vectors.POLICY}", got=wish.main)
    elif len(given) != 1:
        raise UserError("How much may be skipped?", expected="a share (--skip) or a divergence (--max-kl)",
                        got="neither" if not given else "both")  # fmt: skip


def worth(chosen: Point, points: Sequence[Point]) -> bool:
    """Whether the vectors of compressed experts bring the model closer on held-out text than skipping alone, which ``points`` begins
    with; True for other policies."""
    return chosen.policy.policy != vectors.POLICY or chosen.kl < points[0].kl


def choose(bench: Bench, batches: Sequence[torch.Tensor], mask: torch.Tensor, wish: Wish, pruners: dict[str, Any] | None = None
           ) -> tuple[Point, list[Point]]:  # fmt: skip
    """Tune a policy on token ids ``batches`` (``mask``: those that count) for a share or, without one, for a KL; and all that was
    measured. ``pruners``: what was `learned`. For compressed-experts there is nothing to tune: without vectors, and with them."""
    refuse_wish(wish)
    policy = wish.policy
    protect = PROTECT.get(policy, 0.0) if wish.protect is None else wish.protect
    seen = observe(bench.opened(), batches, mask, policy == "modes", protect, policy, pruners)
    if policy == vectors.POLICY:
        assert pruners is not None
        main = vectors.main_experts(max(one.weights.shape[1] for one in seen.values()), wish.main)
        blank = {name: Vectors.from_tensors({key: torch.ones_like(value) for key, value in one.state_dict().items()}) for name, one in pruners.items()}
        points = [bench.measure(policy_of(policy, seen, dict.fromkeys(seen, main), wish.renormalise, pruners=each)) for each in (blank, pruners)]
        return points[1], points
    if wish.max_kl is not None:
        return by_harm(bench, policy, seen, wish.max_kl, wish.renormalise, pruners)
    assert wish.skip is not None
    return by_share(bench, policy, seen, wish.skip, wish.renormalise, pruners)


def record_of(chosen: Point, points: Sequence[Point]) -> dict[str, Any]:
    """What a manifest keeps: nothing in it depends on when it was measured."""
    guards = Counter(rule.guard.by for rule in chosen.policy.layers.values() if rule.guard is not None)
    protected = {"protected_by": {f"{by}": count for by, count in sorted(guards.items())}} if guards else {}
    return {
        "policy": chosen.policy.policy, "renormalise": chosen.policy.renormalise, "calibration_skipped": chosen.policy.skip,
        "skipped": chosen.skipped, **protected, "after": chosen.divergence, "curve": [point.row() for point in points],
    }  # fmt: skip


def store(config: dict[str, Any], policy: Policy, folder: Path) -> None:
    """``config`` with ``policy`` in it, as the config.json of ``folder``, and the file of what it learned."""
    if policy.pruners:
        policy = policy.model_copy(update={"learned": pruner.write(folder, policy.pruners)})
    else:
        (folder / pruner.FILE).unlink(missing_ok=True)  # of an older policy
    write_text(folder / "config.json", json.dumps(config | {KEY: policy.model_dump()}, indent=2))


def write(folder: Path, output: Path, policy: Policy, measured: dict[str, Any]) -> None:
    """The same files, with ``policy`` in config.json; shards are hard links where the file system allows them."""
    checkpoint = Checkpoint(folder)
    work = work_folder(output)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for shard in {entry.file for entry in checkpoint.entries.values()}:
        link(shard, work / shard.name)
    copy_companions(folder, work)
    if (folder / INDEX).exists():
        shutil.copyfile(folder / INDEX, work / INDEX)
    if (folder / FOLDER).is_dir():
        shutil.copytree(folder / FOLDER, work / FOLDER)
    store(checkpoint.config, policy, work)
    if (folder / FOLDER / MANIFEST).exists():
        finish(work, read_manifest(folder) | {"routing": measured}, output)
        return
    give_name(work, output)


def link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
