"""Read-ME: experts of domains, judged by transformers and by synthetic texts that use different neurons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_convert_cli import app
from test_dense import logits, reload, tiny
from tiny import letters_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from moecompress.convert.dense import Shape
from moecompress.convert.read_me import activity, cluster, convert_read_me, divide, fit_domains, widths
from moecompress.errors import UserError


def domain(first: int, count: int = 12, length: int = 40) -> torch.Tensor:
    """Sequences of 20 tokens of their own."""
    return torch.randint(first, first + 20, (count, length), generator=torch.Generator().manual_seed(first))


def test_one_domain_that_keeps_all_is_the_dense_model(tmp_path: Path) -> None:
    for number, (cls, config) in enumerate(((LlamaForCausalLM, LlamaConfig), (Qwen3ForCausalLM, Qwen3Config))):
        dense = tiny(cls, config)
        before = {name: p.clone() for name, p in dense.state_dict().items()}
        domains = [domain(0)] if number == 0 else [domain(0), domain(20), domain(40)]
        report = convert_read_me(dense, domains, tmp_path / str(number), None, share=1.0, dtype=torch.float32)
        assert all(torch.equal(p, before[name]) for name, p in dense.state_dict().items())
        assert report["active_fraction"] == 1 and report["lost_fraction"] == 0
        moe, want = reload(tmp_path / str(number)), logits(dense, domain(0))
        assert moe.config.model_type == "glm4_moe" and moe.config.num_experts_per_tok == 1
        torch.testing.assert_close(logits(moe, domain(0)), want, atol=4e-3 * float(want.abs().max()), rtol=0)  # combine weights within 0.2 %
        assert report["perplexity"]["moe"] == pytest.approx(report["perplexity"]["dense"], rel=2e-3)


def test_activity_is_the_mean_of_what_enters_down() -> None:
    dense: Any = tiny(LlamaForCausalLM, LlamaConfig)
    inner = dense.model.layers[1].mlp
    kept: list[torch.Tensor] = []
    inner.register_forward_hook(lambda module, args, out: kept.append(args[0].clone()))
    found = activity(dense, [domain(0), domain(30, count=3)])
    assert found.shape == (2, 2, 96)
    rows = [x.flatten(0, 1).double() for x in kept]
    gate, up = inner.gate_proj.weight.double(), inner.up_proj.weight.double()
    for number, x in enumerate((torch.cat(rows[:2]), rows[2])):  # 12 sequences are two batches
        wanted = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)).abs().mean(0)
        torch.testing.assert_close(found[1, number], wanted, rtol=1e-4, atol=1e-6)


def test_division_is_sets_and_their_intersection() -> None:
    """Against Python's own sets; with fewer common neurons than are shared, and with more."""
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(3, 40, generator=generator).double()
    active[:, :6] += 2  # all domains use these
    sets = [set(row.topk(20).indices.tolist()) for row in active]
    common = set.intersection(*sets)
    found = divide(active, Shape(3, 1, 5, 15))
    assert found.common == len(common) >= 6 and set(found.shared.tolist()) <= common
    for own, expert in zip(sets, found.experts, strict=True):  # every domain has its whole set
        assert set(expert.tolist()) == own - set(found.shared.tolist())
    assert found.lost == 40 - len(set.union(*sets))
    found = divide(active, Shape(3, 1, 16, 4))
    assert common <= set(found.shared.tolist())
    for row, own, expert in zip(active, sets, found.experts, strict=True):
        left = sorted(own - set(found.shared.tolist()), key=lambda neuron: -float(row[neuron]))
        assert set(expert.tolist()) == set(left[:4])
    assert found.lost == 40 - len(set(found.shared.tolist()) | set(found.experts.flatten().tolist()))


def test_widths_follow_what_is_common() -> None:
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(2, 3, 768, generator=generator).double()
    apart = widths(active, 0.5)
    active[:, :, :300] += 5
    alike = widths(active, 0.5)
    assert apart == Shape(3, 1, 192, 192) and alike == Shape(3, 1, 288, 96)


def test_the_expert_of_the_right_domain_is_chosen(tmp_path: Path) -> None:
    """Tokens of different domains are different words, of embeddings far apart: the written router finds them in text it never saw."""
    dense = tiny(LlamaForCausalLM, LlamaConfig)
    with torch.no_grad():
        for number in range(3):
            dense.model.embed_tokens.weight[20 * number : 20 * number + 20] += 2 * torch.eye(3, 64)[number]
    report = convert_read_me(dense, [domain(0), domain(20), domain(40)], tmp_path, None, dtype=torch.float32)
    assert report["active_fraction"] == 0.5 and 0 < report["lost_fraction"] < 0.5
    assert report["stored_fraction"] == (report["shared_width"] + 3 * report["expert_width"]) / 96
    moe = reload(tmp_path)
    chosen: list[torch.Tensor] = []
    moe.model.layers[0].mlp.gate.register_forward_hook(lambda module, args, out: chosen.append(out[2]))
    for number in range(3):
        chosen.clear()
        logits(moe, domain(20 * number, count=20)[-4:])
        assert float((torch.cat(chosen) == number).float().mean()) > 0.95
    assert all(layer["error"] <= layer["error_before_refit"] for layer in report["layers"])
    worse = convert_read_me(dense, [domain(0), domain(20), domain(40)], tmp_path / "less", None, share=0.2, dtype=torch.float32)
    mean = [sum(layer["error"] for layer in each["layers"]) for each in (report, worse)]
    assert mean[0] < mean[1]


def test_logistic_regression_is_at_its_optimum() -> None:
    """Against autograd: the gradient of the regularised loss vanishes there."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator) * torch.tensor([1, 2, 3, 0.5, 1, 1]) + 1
    labels = (x[:, 0] + torch.randn(300, generator=generator) > 1).long() + (x[:, 1] > 2).long()
    routing = fit_domains(x, labels, 3)
    spread = x.std(0)
    weight, bias = (routing.weight * spread).requires_grad_(), (routing.bias + routing.weight @ x.mean(0)).requires_grad_()
    scores = (x - x.mean(0)) / spread @ weight.T + bias
    (torch.nn.functional.cross_entropy(scores, labels) + 0.5e-3 * weight.square().sum()).backward()
    assert float(weight.grad.abs().max()) < 1e-3 and float(bias.grad.abs().max()) < 1e-3


def test_clusters_find_the_domains() -> None:
    dense = tiny(LlamaForCausalLM, LlamaConfig)
    with torch.no_grad():
        dense.model.embed_tokens.weight[20:40] += 1
    mixed = torch.stack([row for pair in zip(domain(0), domain(20), strict=True) for row in pair])
    found = cluster(dense, mixed, 2)
    assert sorted(int((ids >= 20).float().mean()) for ids in found) == [0, 1] and [len(ids) for ids in found] == [12, 12]
    for count in (1, 13):
        with pytest.raises(UserError, match="cut into"):
            cluster(dense, mixed, count)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    dense = tiny(LlamaForCausalLM, LlamaConfig)
    bad: list[tuple[Any, float, str]] = [
        ([], 0.5, "too little text"), ([domain(0), domain(20, count=1)], 0.5, "too little text"), ([domain(0)], 0.0, "Impossible share"),
        ([domain(0)], 1.5, "Impossible share"), ([domain(0)], 0.005, "too few neurons"),
    ]  # fmt: skip
    for domains, share, words in bad:
        with pytest.raises(UserError, match=words):
            convert_read_me(dense, domains, tmp_path / "out", None, share=share)
    with pytest.raises(UserError, match="biases"):
        convert_read_me(tiny(LlamaForCausalLM, LlamaConfig, mlp_bias=True), [domain(0)], tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model with a tokenizer of letters, and two texts of other letters."""
    folder = tmp_path_factory.mktemp("dense")
    letters_model(folder)
    for name, letters in (("one", "abcdefg"), ("two", "stuvwxyz")):
        (folder / f"{name}.txt").write_text(" ".join(letters) * 1200)
    return folder


def test_command(folder: Path, tmp_path: Path) -> None:
    out, texts = tmp_path / "moe", ["--text", str(folder / "one.txt"), "--text", str(folder / "two.txt")]
    arguments = [str(folder), "-o", str(out), "--method", "read-me", "--sequences", "4", *texts]
    done = CliRunner().invoke(app(), [*arguments, "--json"], catch_exceptions=False)
    report = json.loads(done.stdout)
    assert done.exit_code == 0 and report["experts"] == 2 and report["top_k"] == 1 and len(report["perplexity"]["domains"]) == 2
    assert all(layer["right_domain"] > 0.95 for layer in report["layers"])
    assert reload(out).config.n_routed_experts == 2
    for arguments, words in (
        (["--method", "read-me", *texts[:2]], "needs domains"), (["--method", "read-me", "--domains", "2", *texts], "needs domains"),
        (["--method", "read-me", "--experts", "4", *texts], "--experts cannot"), (["--share", "0.5", *texts[:2]], "--share cannot"), (texts, "one text"),
        (["--method", "cmoe2"], "Unknown method"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            CliRunner().invoke(app(), [str(folder), "-o", str(tmp_path / "no"), *arguments], catch_exceptions=False)
    assert not (tmp_path / "no").exists()
