"""Every family behind transformers' experts interface, against plain transformers; and the record of families."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import roundtrip
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, interface, tiny_checkpoint
from transformers import AutoModelForCausalLM

from moecompress.errors import UserError
from moecompress.model import families
from moecompress.model.walk import OpenModel

#: Taken all the way on every run, because they are common or show every layout there is.
ALWAYS = (
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "granitemoe", "phimoe", "deepseek_v2", "deepseek_v3",
    "glm4_moe", "gpt_oss", "ernie4_5_moe", "minimax", "dots1", "hunyuan_v1_moe", "lfm2_moe", "jamba", "qwen3_vl_moe",
    "nemotron_h",
)  # fmt: skip
OTHERS = [family for family in families.INTERFACE if family not in (*ALWAYS, *families.FAILS)]


pytestmark = pytest.mark.usefixtures("quiet_and_single_threaded")


@pytest.mark.parametrize("family", ALWAYS)
def test_family(family: str, tmp_path: Path) -> None:
    _whole_trip(family, tmp_path)


@pytest.mark.parametrize("family", OTHERS)
def test_family_quantizes_and_loads(family: str, tmp_path: Path) -> None:
    trip = roundtrip.start(family, tmp_path)
    roundtrip.quantizes(trip)


@pytest.mark.long
@pytest.mark.parametrize("family", OTHERS)
def test_family_in_full(family: str, tmp_path: Path) -> None:
    _whole_trip(family, tmp_path)


def _whole_trip(family: str, folder: Path) -> None:
    trip = roundtrip.start(family, folder)
    roundtrip.walks_as_the_model_runs(trip)
    logits = roundtrip.quantizes(trip)
    roundtrip.loads_every_way(trip, logits)
    roundtrip.exports(trip, logits)
    roundtrip.is_exact_at_16_bits(trip)


@pytest.mark.parametrize(("family", "reason"), {
    "diffusion_gemma": "experts in two stacks of layers",
    "ernie4_5_vl_moe": "two sets of experts",
    "openai_privacy_filter": "no language-model head",
}.items())  # fmt: skip
def test_unsupported_family_is_refused(family: str, reason: str, tmp_path: Path) -> None:
    assert family in families.FAILS
    tiny_checkpoint(family, tmp_path)
    with pytest.raises(UserError, match=reason):
        OpenModel(tmp_path)


# --- the record -----------------------------------------------------------------------------------------------------


def test_record_lists_what_transformers_has() -> None:
    if transformers.__version__ != families.TRANSFORMERS:
        pytest.skip(f"the record is of transformers {families.TRANSFORMERS}")
    assert {family: classes[0] for family, classes in interface().items()} == families.INTERFACE
    modeling = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    experts = {
        path.parent.name for path in modeling if re.search(r"^class \w+Experts\(nn", path.read_text(), re.MULTILINE)
    }
    assert experts - set(interface()) == set(families.OUTSIDE)


def test_record_says_what_is_tested_here() -> None:
    passing = {row["family"] for row in families.table() if row["passes"]}
    assert passing == {*ALWAYS, *OTHERS}
    assert all(row["note"] for row in families.table() if not row["passes"])
    assert set(families.NOTES) <= passing
    assert set(FAMILIES) <= set(families.INTERFACE)


def test_experts_outside_the_interface_are_refused(tmp_path: Path) -> None:
    config = transformers.JetMoeConfig(vocab_size=96, hidden_size=64, num_hidden_layers=1, intermediate_size=32)
    transformers.JetMoeForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not a Mixture-of-Experts model"):
        OpenModel(tmp_path)


# --- what single families show ----------------------------------------------------------------------------------------


def test_layers_that_the_model_ignores_are_carried_along(tmp_path: Path) -> None:
    """GLM-4.5 stores a multi-token-prediction layer that the model does not have."""
    tiny_checkpoint("glm4_moe", tmp_path / "original")
    file = tmp_path / "original" / "model.safetensors"
    extra = {"model.layers.46.eh_proj.weight": torch.randn(64, 128).bfloat16(),
             "model.layers.46.mlp.experts.0.up_proj.weight": torch.randn(32, 64).bfloat16()}  # fmt: skip
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    packed = tmp_path / "packed"
    job = roundtrip.pipeline.make_job(str(file.parent), roundtrip.SMALL, tokens=roundtrip.tokens(96))
    roundtrip.pipeline.quantize(job, packed)
    written = roundtrip.stored(packed)
    assert all(torch.equal(written[name], tensor) for name, tensor in extra.items())
    roundtrip.load(AutoModelForCausalLM, packed)
