"""Switch Transformers, an encoder and a decoder with top-1 experts: walked, quantized with QMoE's method and loaded again,
all against the modules that transformers itself has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from moecompress.errors import UserError
from moecompress.evaluate.divergence import compare, trace
from moecompress.model.walk import OpenModel
from moecompress.runtime.loading import prepare

ROOT = Path(__file__).parents[2]
CAPACITY = 12  # of 40 tokens a sequence: some are over it and go to no expert


@pytest.fixture(scope="module")
def switch(tmp_path_factory, tokenizer_folder) -> Path:
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=512, d_model=64, d_kv=16, d_ff=128, num_layers=4, num_decoder_layers=4, num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2, num_heads=4, num_experts=4, expert_capacity=CAPACITY, decoder_start_token_id=0,
        initializer_factor=1.0, dtype=torch.float32,
    )  # fmt: skip
    model = SwitchTransformersForConditionalGeneration(config)
    with torch.no_grad():
        model.shared.weight.mul_(0.2)
    folder = tmp_path_factory.mktemp("switch") / "model"
    model.save_pretrained(folder)
    for path in tokenizer_folder.iterdir():
        shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory, switch, text_file, moecompress) -> Path:
    folder = tmp_path_factory.mktemp("packed_switch") / "out"
    ran = moecompress("quantize", switch, "-o", folder, "--recipe", ROOT / "recipes" / "qmoe.yaml", "--target-bits", 2.5, "--text", text_file,
                      "--set", "calibration.sequences=8", "--set", "calibration.length=40", "--set", "calibration.heldout=2", "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.json()["measured"]["plan"]["kl_mean"] > 0
    return folder


def ids(count: int = 3) -> torch.Tensor:
    return torch.randint(1, 500, (count, 40), generator=torch.Generator().manual_seed(1))


def plain(folder: Path) -> torch.nn.Module:
    return SwitchTransformersForConditionalGeneration.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, decoder_input_ids=tokens, use_cache=False).logits


def test_every_tensor_has_a_role_and_a_layer(switch):
    anatomy = OpenModel(switch).anatomy
    assert anatomy.num_layers == 8 and sorted(anatomy.moe) == [1, 3, 5, 7]
    assert anatomy.moe[5].module == "decoder.block.1.layer.2.mlp.experts"
    assert anatomy.expert_weights == 4 * 4 * 2 * 64 * 128
    assert set(anatomy.linears.values()) == {"attention", "dense_ffn"}
    roles = {info.target: info.role for info in anatomy.tensors}
    assert roles["encoder.block.1.layer.1.mlp.router.classifier.weight"] == "router"
    with pytest.raises(UserError, match="encoder and a decoder"):
        _ = anatomy.stack


def test_the_walk_computes_what_transformers_computes(switch):
    model, tokens = plain(switch), ids()
    reference = trace(OpenModel(switch), list(tokens.split(2)))
    with torch.no_grad():
        there = model.lm_head(torch.cat(reference.hidden))
    assert torch.allclose(there, logits(model, tokens), atol=1e-4)
    assert bool((reference.chosen[1] == 4).any()) and bool((reference.chosen[1] < 4).any())  # some over capacity


def test_packed_folder_loads_and_computes_with_its_own_weights(packed, switch):
    """The packed model against transformers' own modules, filled with the weights that the banks stand for."""
    loaded, model, tokens = AutoModelForSeq2SeqLM.from_pretrained(packed).eval(), plain(switch), ids()
    for name, module in loaded.named_modules():
        if hasattr(module, "packed") and not hasattr(module, "in_features"):
            for projection, old in (("up", "wi"), ("down", "wo")):
                for expert, weight in enumerate(module.packed.dequantized(projection, torch.float32)):
                    assert len(weight.unique(dim=-1)) and all(len(row.unique()) <= 3 for row in weight)
                    getattr(model.get_submodule(name)[f"expert_{expert}"], old).weight.data.copy_(weight)
        elif hasattr(module, "packed"):
            model.get_submodule(name).weight.data.copy_(module.packed.dequantized(torch.float32)[0])
    wanted, got = logits(model, tokens), logits(loaded, tokens)
    assert torch.allclose(got, wanted, atol=2e-3 * float(wanted.abs().max()))
    assert not torch.allclose(got, logits(plain(switch), tokens), atol=1e-2 * float(wanted.abs().max()))
    made = loaded.generate(input_ids=tokens[:1], max_new_tokens=4, do_sample=False)
    assert made.shape == (1, 5)


def test_divergence_is_that_of_the_decoders_logits(packed, switch):
    tokens = ids(2)
    found = compare(OpenModel(packed, prepare=prepare(packed)), list(tokens.split(1)), trace(OpenModel(switch), list(tokens.split(1))))
    p, q = (logits(m.eval(), tokens).log_softmax(-1) for m in (plain(switch), AutoModelForSeq2SeqLM.from_pretrained(packed)))
    assert torch.allclose(found.kl, (p.exp() * (p - q)).sum(-1), atol=1e-3)


def test_saved_again_and_evaluated(packed, switch, tmp_path, text_file, moecompress):
    AutoModelForSeq2SeqLM.from_pretrained(packed).save_pretrained(tmp_path / "again")
    tokens = ids(1)
    first, second = (logits(AutoModelForSeq2SeqLM.from_pretrained(f).eval(), tokens) for f in (packed, tmp_path / "again"))
    assert torch.equal(first, second)
    ran = moecompress("evaluate", packed, "--reference", switch, "--text", text_file, "--sequences", 2, "--length", 40, "--json")
    assert ran.code == 0, ran.err
    assert ran.json()["kl_mean"] > 0
    manifest = json.loads((packed / "moecompress" / "manifest.json").read_text())
    assert 0 < manifest["dictionary"]["entropy_bits"] < manifest["dictionary"]["stored_bits"]


def test_pruning_it_is_refused(switch, tmp_path, text_file, moecompress):
    ran = moecompress("prune", switch, "-o", tmp_path / "out", "--method", "reap", "--keep", 0.5, "--text", text_file,
                      "--set", "calibration.sequences=4", "--set", "calibration.length=40", "--set", "calibration.heldout=2")  # fmt: skip
    assert ran.code == 2 and "Traceback" not in ran.err and "not supported yet" in ran.err
