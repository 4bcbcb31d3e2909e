"""What leaving experts out costs, against the family's own code with fewer experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from roundtrip import tokens
from tiny import tiny_checkpoint

from moecompress.calibrate.capture import recording
from moecompress.calibrate.merging import RIDGE
from moecompress.calibrate.observe import seam_on
from moecompress.errors import UserError
from moecompress.model.experts import DOWN, inner, output, projections
from moecompress.model.walk import OpenModel, Walk
from moecompress.runtime.graft import keep_only, sprout
from moecompress.transform.shed import slicing, thinning

pytestmark = pytest.mark.usefixtures("quiet_and_single_threaded")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "deepseek_v2", "gpt_oss", "phimoe", "glm4_moe"])
@torch.no_grad()
def test_predicted_error_is_that_of_the_smaller_layer(family: str, tmp_path: Path) -> None:
    config = tiny_checkpoint(family, tmp_path)
    opened = OpenModel(tmp_path, torch.float32)
    smaller = slicing(opened)
    seam_on(opened)
    ids = tokens(config.get_text_config().vocab_size).ids
    with Walk(opened, [ids]) as walk:
        for layer in walk.layers():
            if layer not in opened.anatomy.moe:
                walk.step(0, walk.run(0))
                continue
            moe = opened.anatomy.moe[layer]
            block, experts = (opened.model.get_submodule(name) for name in (moe.module.rpartition(".")[0], moe.module))
            whole = run(walk, block, experts)
            found = thinning(smaller, opened, moe, whole.capture(torch.ones_like(ids, dtype=torch.bool)))
            hidden, chosen, weights = whole.parts[0]
            before = experts(hidden, chosen, weights).double()
            ways = list(zip(found.again.tolist(), found.merged.tolist(), strict=True))  # 4 experts, top 2: one may go
            again = [(True, False)] if family != "phimoe" else []
            assert ways == [(False, False), *again, (False, False), (False, True)]
            one = torch.arange(4)
            assert torch.equal(found.into[0], one) and float(found.error[0]) == 0 and torch.equal(found.growth[0], torch.ones(4).double())
            # Shared: the experts as they are, given other numbers and weights.
            into, share = found.into[-2], found.share[-2]
            assert ((into != one).sum() == 1) and (share[into == one] == 1).all()
            got = experts(hidden, into.clamp_min(0)[chosen], weights * share[chosen].float()).double()
            silent = experts(hidden, chosen, weights * (into == one)[chosen].float()).double()
            error = float((got - before).square().sum())
            assert error <= float(found.error[-2]) <= 1.5 * error  # on top comes a share for other texts
            assert error <= float((silent - before).square().sum()) * (1 + 1e-6), "worse than nobody in its place"
            # Merged: the same group, its serving expert's down matrix from normal equations in float64.
            assert torch.equal(found.into[-1], into) and found.error[-1] < found.error[-2]
            merged = by_hand(experts, moe.layout, hidden, chosen, weights, into, found.share[-1])
            assert float((merged - before).square().sum()) == pytest.approx(float(found.error[-1] - (found.error[-2] - error)), rel=1e-4)
            if not found.again.any():  # its router follows no known rule
                return
            kept = (found.into[1] >= 0).nonzero().flatten()
            keep_only(opened.model, moe.module, sprout(opened.model, smaller.keys, 3), kept)
            block, experts = (opened.model.get_submodule(name) for name in (moe.module.rpartition(".")[0], moe.module))
            left = run(walk, block, experts)
            hidden, chosen, weights = left.parts[0]
            error = float((experts(hidden, chosen, weights).double() - before).square().sum())
            assert error <= float(found.error[1]) <= 1.5 * error
            mass = torch.zeros(3, dtype=torch.float64).index_add(0, chosen.flatten(), weights.double().square().flatten())
            old = torch.zeros(4, dtype=torch.float64).index_add(0, whole.parts[0][1].flatten(), whole.parts[0][2].double().square().flatten())
            prior = 0.05 * old.mean()
            torch.testing.assert_close(found.growth[1, kept], (mass + prior) / (old[kept] + prior), rtol=1e-4, atol=1e-6)
            return


def by_hand(experts, layout, hidden, chosen, weights, into, share) -> torch.Tensor:
    """The layer's output once the expert that serves for another one is merged with it."""
    gone = int((into != torch.arange(len(into))).nonzero())
    head = int(into[gone])
    rows, wanted = [], []
    for expert in (head, gone):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        gate = weights[token, place].double()[:, None]
        a = inner(experts, layout, hidden[token], head).double()
        served = output(experts, layout, hidden[token], head).double()
        rows.append(share[expert] * gate * a)
        wanted.append(gate * (output(experts, layout, hidden[token], expert).double() - share[expert] * served))
    a, y = torch.cat(rows), torch.cat(wanted)
    ridge = RIDGE * float(a.square().sum()) / len(a)
    change = torch.linalg.solve(a.T @ a + ridge * torch.eye(a.shape[1]).double(), a.T @ y).T
    down = projections(experts, layout)[DOWN][head]
    old = down.clone()
    down += change.float()
    result = experts(hidden, into[chosen], weights * share[chosen].float()).double()
    down.copy_(old)
    return result


def run(walk: Walk, block, experts):
    with recording(block, experts) as recorder:
        walk.run(0)
    return recorder


@pytest.mark.parametrize(("family", "reason"), [("deepseek_v4", "holds whole numbers")])
def test_what_cannot_have_fewer_experts_is_refused(family: str, reason: str, tmp_path: Path) -> None:
    tiny_checkpoint(family, tmp_path)
    with pytest.raises(UserError, match=reason):
        slicing(OpenModel(tmp_path))
