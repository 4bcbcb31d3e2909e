"""Squared gradients against autograd on plain transformers, and the KL that they predict against the KL that comes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from moecompress import pipeline, plans
from moecompress.calibrate import gradient
from moecompress.calibrate.statistics import LayerStatistics, Statistics
from moecompress.errors import UserError
from moecompress.job import Job
from moecompress.recipe import recipe_from

pytestmark = pytest.mark.usefixtures("quiet_and_single_threaded")

SETTINGS = ["calibration.sequences=18", "calibration.length=48", "calibration.heldout=2", "compute.micro_batch=8", "compute.dtype=float32",
            "target.bits=3.6", "allocate.compare=none"]  # fmt: skip


def job_of(model: Path, text: Path, *changes: str) -> Job:
    return pipeline.make_job(str(model), recipe_from([*SETTINGS, f"calibration.text={json.dumps(str(text))}", *changes]))


@pytest.fixture(scope="module")
def made(tiny_model: Path, text_file: Path, tmp_path_factory) -> tuple[Job, Statistics]:
    job = job_of(tiny_model, text_file, "allocate.harm=gradient")
    return job, pipeline.calibrate(job, tmp_path_factory.mktemp("work") / "calibrate")


def test_sensitivity_and_importance_are_those_of_a_loop(made, monkeypatch) -> None:
    job, statistics = made
    model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float32)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    calibration, seen = job.calibration, {}
    energy, mass = torch.zeros(3, 8).double(), torch.zeros(3, 8).double()
    for layer, decoder in enumerate(model.model.layers):
        decoder.mlp.gate.register_forward_hook(lambda _m, _i, output, layer=layer: seen.__setitem__(("route", layer), output))
        decoder.mlp.experts.register_forward_hook(lambda _m, _i, output, layer=layer: (output.retain_grad(), seen.__setitem__(("out", layer), output))[0])
    for ids, mask in zip(calibration.ids.split(1), calibration.mask.split(1), strict=True):
        logits = model(inputs_embeds=model.get_input_embeddings()(ids).requires_grad_()).logits[mask]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
        (-logits.log_softmax(-1).gather(1, drawn[:, None]).sum()).backward()
        for layer in range(3):
            _, weights, chosen = seen["route", layer]
            square = seen["out", layer].grad.double().square().mean(-1).reshape(-1)
            for token in mask.reshape(-1).nonzero().squeeze(1).tolist():
                for g, e in zip(weights[token].double(), chosen[token], strict=True):
                    energy[layer, e] += g * g * square[token]
                    mass[layer, e] += g * g
    for layer in range(3):
        mean = energy[layer].sum() / mass[layer].sum()
        found = statistics.layers[layer]
        assert found.sensitivity == pytest.approx(float(mean.detach()) / 2, rel=1e-3)
        own = (energy[layer] + 0.05 * energy[layer].mean()) / (mass[layer] + 0.05 * mass[layer].mean())
        assert torch.allclose(found.importance, own / mean, rtol=1e-3)


def test_predicted_divergence_is_the_one_that_comes(made) -> None:
    """Noise on the experts' output of one layer, too little to change anyone's choice of experts: KL is half the squared
    gradient times the squared error."""
    job, statistics = made
    model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float64, experts_implementation="eager")
    with torch.no_grad():
        ids = job.calibration.ids
        clean = model(ids).logits.log_softmax(-1)
        for layer in range(3):
            experts, noise = model.model.layers[layer].mlp.experts, {}

            def disturb(_m, _i, output, noise=noise, layer=layer):
                noise["it"] = 1e-5 * output.std() * torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(layer))
                return output + noise["it"]

            hook = experts.register_forward_hook(disturb)
            other = model(ids).logits.log_softmax(-1)
            hook.remove()
            kl = float((clean.exp() * (clean - other)).sum())
            predicted = statistics.layers[layer].sensitivity * float(noise["it"].square().sum())
            assert 0.6 < predicted / kl < 1.6


def test_an_expert_without_tokens_counts_as_the_layer_does() -> None:
    layer = LayerStatistics(torch.tensor([9, 0]), torch.ones(2), torch.ones(2), torch.ones(2, 1, 1), 9, 1.0)
    found = gradient.weighed(layer, torch.tensor([8.0, 0.0]).double(), torch.tensor([4.0, 0.0]).double())
    assert found.sensitivity == 1.0 and found.importance is not None and found.importance.tolist() == pytest.approx([1.0, 1.0])


def test_statistics_come_back_and_plans_use_them(made, tmp_path: Path) -> None:
    job, statistics = made
    statistics.save(tmp_path)
    again = Statistics.load(tmp_path)
    assert again.harm == "gradient"
    for layer, harm in again.predicted_harm().items():
        one = statistics.layers[layer]
        assert one.importance is not None and len(set(one.importance.tolist())) > 1
        assert torch.allclose(harm, one.harm * one.sensitivity / one.tokens * one.importance[:, None, None])
    forward = {index: LayerStatistics(**{**vars(one), "importance": None}) for index, one in statistics.layers.items()}
    other = Statistics(statistics.schemes, statistics.projections, forward, "", "")
    plain = {choice.unit: choice for choice in plans.plan(job, other)[0].choices}
    for choice in plans.plan(job, again)[0].choices:
        if choice.candidate == plain[choice.unit].candidate:
            importance = statistics.layers[int(choice.unit[1:3])].importance
            assert importance is not None
            assert choice.harm == pytest.approx(plain[choice.unit].harm * float(importance[int(choice.unit[5:8])]))


def test_commands(tiny_model: Path, text_file: Path, tmp_path: Path, quick, moecompress, monkeypatch) -> None:
    ran = moecompress("calibrate", tiny_model, "-o", tmp_path / "stats", "--harm", "gradient", *quick)
    assert ran.code == 0, ran.err
    assert moecompress("plan", tiny_model, "--stats", tmp_path / "stats", "--target-bits", 3.6, "--json", *quick).code == 0
    ran = moecompress("plan", tiny_model, "--stats", tmp_path / "stats", "--target-bits", 3.6, "--harm", "forward", *quick)
    assert ran.code == 2 and "other sensitivities" in ran.err
    monkeypatch.setattr(gradient.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    ran = moecompress("plan", tiny_model, "--target-bits", 3.6, "--harm", "gradient", *quick)
    assert ran.code == 2 and "too large for gradients" in ran.err
    with pytest.raises(UserError, match="harm"):
        recipe_from(["allocate.harm=backward"])
