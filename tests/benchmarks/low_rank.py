"""Do merged experts need a lower rank than the experts they were made of (MC-SMoE, arXiv:2310.01334)? On a checkpoint of yours.

    python tests/benchmarks/low_rank.py MODEL --text corpus.txt -o low_rank.json --plot low_rank.png

Every layer's experts are merged as `moecompress prune --method m-smoe` would, on calibration text. Compared are the experts
as they were, the members of groups alone, their heads alone (the most used ones, which a merge weighted by use mostly is), the
merged ones with and without their neurons lined up, and Gaussian noise: by the relative squared error of every rank, of the
entries and (gate and up) of the output on the layer's inputs; by the rank that leaves 10 %; and by the stable rank, which is
what the paper looks at. Beside that, of the experts as they were: what gate and up lose with one basis for all (MoLAE,
arXiv:2503.23100) and with their own, at equal numbers of stored values.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import torch

from moecompress import pipeline
from moecompress.calibrate.observe import seam_on
from moecompress.compress import capture_layer
from moecompress.model.experts import DOWN, projections
from moecompress.model.walk import OpenModel, Walk
from moecompress.quantize.hessian import moment
from moecompress.recipe import recipe_from
from moecompress.transform.low_rank import needed_rank, residuals, shared_rank, shared_residuals, stable_rank
from moecompress.transform.methods import METHODS, Scene
from moecompress.transform.regroup import Regrouping, apply
from moecompress.transform.stage import Request

KINDS = ("all experts", "members of groups", "heads of groups", "merged, in line", "merged, not in line", "noise")
#: The error at which ranks are compared, and the ranks (as shares) at which errors are.
ERROR, SHARES = 0.1, (0.125, 0.25, 0.5)


def sides(weights: dict[str, torch.Tensor], made: Regrouping) -> dict[str, dict[str, torch.Tensor]]:
    """Kind -> projection -> matrices [n, o, i]. Only groups of several experts count as merged."""
    sizes = made.target.bincount(minlength=len(made.keep))
    groups = (sizes > 1).nonzero().flatten()
    members = torch.isin(made.target, groups)
    loose = Regrouping(made.target, made.keep, made.share)
    generator = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(w[:4].shape, generator=generator) for name, w in weights.items()}
    found = {"all experts": weights, "noise": noise}
    for kind, some in (("members of groups", members), ("heads of groups", made.keep[groups])):
        found[kind] = {name: w[some] for name, w in weights.items()}
    for kind, grouping in (("merged, in line", made), ("merged, not in line", loose)):
        found[kind] = {name: w[groups] for name, w in apply(grouping, weights).items()}
    return found


def sharing(weights: dict[str, torch.Tensor], inputs: torch.Tensor) -> dict[str, dict[str, list[float]]]:
    """Projection -> share of the rank -> relative squared error of the output, with own bases and with a shared one."""
    found: dict = {}
    for name, w in weights.items():
        if name != DOWN:
            count, rows, cols = w.shape
            energy = ((w.double() @ inputs.double()) * w.double()).sum((1, 2))
            own, shared = energy @ residuals(w, inputs) / energy.sum(), shared_residuals(w, inputs)
            ranks = [round(share * min(rows, cols)) for share in SHARES]
            found[name] = {
                str(share): [float(own[rank]), float(shared[min(shared_rank(rank, count, rows, cols), len(shared) - 1)])]
                for share, rank in zip(SHARES, ranks, strict=True)
            }
    return found


def measure(opened: OpenModel, calibration, request: Request) -> tuple[dict, list[dict]]:
    """Kind -> (projection, weighting) -> residuals [n, r + 1] of all layers, and a record a layer."""
    seam_on(opened)
    curves: dict[str, dict[str, list[torch.Tensor]]] = defaultdict(lambda: defaultdict(list))
    layers = []
    with Walk(opened, calibration.batches) as walk:
        for layer in walk.layers():
            moe = opened.anatomy.moe.get(layer)
            if moe is not None:
                capture = capture_layer(walk, moe, calibration)
                module = opened.model.get_submodule(moe.module)
                made = METHODS[request.method](Scene(module, moe.layout, capture, request.count))
                inputs = moment(capture.hidden[capture.keep])
                record: dict = {"layer": layer, "groups": made.target.bincount().tolist(), "stable_rank": {}}
                weights = {name: w.float() for name, w in projections(module, moe.layout).items()}
                record["own_and_shared_basis"] = sharing(weights, inputs)
                for kind, matrices in sides(weights, made).items():
                    for name, w in matrices.items():
                        if not len(w):
                            continue
                        curves[kind][f"{name}, entries"].append(residuals(w))
                        if name != DOWN:
                            curves[kind][f"{name}, output"].append(residuals(w, inputs))
                        record["stable_rank"].setdefault(name, {})[kind] = float(stable_rank(w).mean())
                layers.append(record)
            if layer < len(opened.layers) - 1:
                walk.hand_on([walk.run(lane) for lane in range(len(walk.waiting))])
    return {kind: {name: torch.cat(parts) for name, parts in found.items()} for kind, found in curves.items()}, layers


def summary(curves: dict) -> dict:
    result: dict = {}
    for kind, found in curves.items():
        for name, residual in found.items():
            full = residual.shape[1] - 1
            result.setdefault(name, {})[kind] = {
                "matrices": len(residual), "full_rank": full,
                "rank_for_10_percent": float(needed_rank(residual, ERROR).double().mean()),
                "error_at": {str(share): float(residual[:, round(share * full)].mean()) for share in SHARES},
            }  # fmt: skip
    return result


def plot(curves: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(curves["all experts"])
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.5), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for kind in KINDS:
            if name in curves[kind]:
                axis.plot(curves[kind][name].mean(0), label=kind, linestyle=":" if kind == "noise" else "-")
        axis.set(title=name, xlabel="rank", ylabel="relative squared error", ylim=(0, 1))
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--method", default="m-smoe", choices=["m-smoe", "ream"])
    parser.add_argument("--keep", type=float, default=0.5, help="experts that a layer keeps, a share or a number")
    parser.add_argument("-o", "--output", type=Path, help="where the JSON goes, beside stdout")
    parser.add_argument("--plot", type=Path, help="a picture")
    arguments = parser.parse_args()
    recipe = recipe_from([f"calibration.text={json.dumps(arguments.text)}", f"calibration.sequences={arguments.sequences}"])
    job = pipeline.make_job(arguments.model, recipe)
    with torch.no_grad():
        curves, layers = measure(job.open(), job.calibration, Request.of(job.opened, arguments.method, arguments.keep))
    record = {"method": arguments.method, "keep": arguments.keep, "summary": summary(curves), "layers": layers}
    text = json.dumps(record)
    print(text)
    if arguments.output:
        arguments.output.write_text(text)
    if arguments.plot:
        plot(curves, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
