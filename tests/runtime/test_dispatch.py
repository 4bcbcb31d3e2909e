"""Going expert by expert gives what transformers' own loop gives, for packed and plain experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moecompress.model.experts import layout_of, projections
from moecompress.model.skeleton import compute_dtype
from moecompress.model.walk import OpenModel, Walk
from moecompress.runtime.dispatch import by_expert

QWEN = Qwen3MoeConfig(hidden_size=32, moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2)
OSS = GptOssConfig(hidden_size=32, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2)


@pytest.mark.parametrize(("kind", "config"), [(Qwen3MoeExperts, QWEN), (GptOssExperts, OSS)])
def test_equals_eager(kind, config) -> None:
    torch.manual_seed(0)
    config._experts_implementation = "eager"
    module = kind(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    layout = layout_of(module)
    stored = projections(module, layout)
    hidden, weights = torch.randn(90, 32), torch.rand(90, 2)
    chosen = torch.stack([torch.randperm(3)[:2] for _ in range(90)])  # nobody wants the last expert
    with torch.no_grad():
        found = by_expert(module, layout, lambda name, e, x, _: x @ stored[name][e].T, hidden, chosen, weights)
        assert torch.allclose(found, module(hidden, chosen, weights), atol=1e-5)


def test_packed_expert_by_expert_equals_bank_by_bank(packed_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moecompress.runtime import dispatch

    model = AutoModelForCausalLM.from_pretrained(packed_tiny, dtype=torch.float32)
    ids = torch.arange(4 * 100).view(4, 100) % 512
    with torch.no_grad():
        found = model(ids).logits
        monkeypatch.setattr(dispatch, "CROWDED", 10**9)
        assert torch.allclose(found, model(ids).logits, atol=1e-4)


def test_a_remembered_run_equals_a_fresh_one(tiny_model: Path) -> None:
    opened = OpenModel(tiny_model, compute_dtype(tiny_model, "auto"))
    experts = opened.model.get_submodule(opened.anatomy.moe[0].module)
    with Walk(opened, [torch.arange(40).view(2, 20), torch.arange(40, 80).view(2, 20)]) as walk:
        next(walk.layers())
        fresh = [walk.run(lane) for lane in range(2)]
        calls = []
        attention = opened.layers[0].self_attn
        attention.q_proj.register_forward_hook(lambda *_: calls.append(1))
        with walk.remembering(experts):
            first = [walk.run(lane) for lane in range(2)]
            assert len(calls) == 2
            experts.down_proj.data.mul_(0.5)
            second = [walk.run(lane) for lane in range(2)]
            assert len(calls) == 2  # attention was not computed again
        changed = [walk.run(lane) for lane in range(2)]
    for lane in range(2):
        assert torch.equal(fresh[lane], first[lane])
        assert torch.equal(changed[lane], second[lane])
        assert not torch.allclose(first[lane], second[lane])
