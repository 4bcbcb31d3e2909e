"""Dropping or merging experts in every layer of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moecompress.calibrate.observe import Calibration
from moecompress.compress import Work
from moecompress.errors import UserError
from moecompress.model.walk import OpenModel
from moecompress.transform.methods import METHODS, Scene
from moecompress.transform.outputs import canonical, stored
from moecompress.transform.regroup import Regrouping, apply
from moecompress.transform.rewrite import Site, rewrite
from moecompress.transform.shrink import EXPERTS, experts_of, groups_of, refuse_count


@dataclass(frozen=True)
class Request:
    """method: a name of METHODS. count: experts that every layer keeps. protected: (layer, expert) that must stay."""

    method: str
    count: int
    protected: tuple[tuple[int, int], ...] = ()
    seed: int = 0

    @staticmethod
    def of(opened: OpenModel, method: str, keep: float, protected: tuple[tuple[int, int], ...] = (), seed: int = 0) -> Request:
        """keep: a share of the experts below 1, or a number of them. Raises UserError where that cannot be done."""
        if method not in METHODS:
            raise UserError(f"Unknown method {method!r}", expected=", ".join(METHODS))
        if keep >= 1 and keep != int(keep):
            raise UserError(f"Cannot keep {keep} experts", expected="a share below 1, or a whole number")
        experts, groups = experts_of(opened), groups_of(opened)
        # A share is rounded to what the groups of the router allow.
        count = groups * round(keep * experts / groups) if keep < 1 else int(keep)
        refuse_count(opened, count)
        for layer, expert in protected:
            if layer not in opened.anatomy.moe or not 0 <= expert < experts:
                raise UserError(f"There is no expert L{layer:02d}.E{expert:03d} to protect",
                                expected=f"layers {min(opened.anatomy.moe)} to {max(opened.anatomy.moe)}, experts 0 to {experts - 1}")  # fmt: skip
        request = Request(method, count, protected, seed)
        for layer in opened.anatomy.moe:
            own = request.protected_in(layer)
            fullest = max((sum(e * groups // experts == g for e in own) for g in range(groups)), default=0)
            if fullest > count // groups:
                raise UserError(f"Layer {layer} protects more experts than it keeps", expected=f"at most {count // groups}"
                                + (" a group" if groups > 1 else ""), got=fullest, remedy="keep more, or protect fewer")  # fmt: skip
        return request

    def protected_in(self, layer: int) -> list[int]:
        return sorted({expert for where, expert in self.protected if where == layer})


def transform(opened: OpenModel, calibration: Calibration, request: Request, work: Work,
              trust_remote_code: bool = False) -> dict[str, Any]:  # fmt: skip
    """Write a whole checkpoint with fewer experts, as `rewrite` does."""

    def change(site: Site) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        moe, found = site.moe, site.tensors
        biases = [tensor.flatten() for tensor in found.values() if tensor.numel() == moe.layout.experts]
        scene = Scene(site.module, moe.layout, site.capture, request.count, request.protected_in(moe.layer), biases,
                      groups_of(opened), request.seed + moe.layer, calibration.workspace_bytes)  # fmt: skip
        made = METHODS[request.method](scene)
        record = {"kept": made.keep.tolist(), "target": made.target.tolist(), "tokens": scene.routed.counts.tolist()}
        return regrouped(site, made), record

    return rewrite(opened, calibration, EXPERTS, request.count, change, work, request.method, "regrouped", trust_remote_code)


def regrouped(site: Site, made: Regrouping) -> dict[str, torch.Tensor]:
    """The layer's tensors that change, by parameter: merged experts, and the kept experts' slices of everything else."""
    moe, axes = site.moe, site.smaller.axes
    result = {name: tensor.index_select(axes[name], made.keep) for name, tensor in site.tensors.items()
              if not name.startswith(moe.module + ".")}  # fmt: skip
    new = stored(apply(made, canonical(site.module, moe.layout)), moe.layout)
    return result | {f"{moe.module}.{name}": tensor for name, tensor in new.items()}
