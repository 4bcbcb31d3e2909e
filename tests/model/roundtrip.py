"""One tiny checkpoint through everything. Each stage raises AssertionError where results are not what they must be."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import head_class, tiny_checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from moecompress import pipeline
from moecompress.calibrate.data import TokenBatches
from moecompress.export.dense import export
from moecompress.model.walk import OpenModel, Walk
from moecompress.pack.manifest import read_manifest
from moecompress.recipe import Recipe, recipe_from
from moecompress.runtime import loading

#: Names on disk of routers, projections of MLA latents, norms, tables, and what chooses tokens, whatever the family.
KEPT = re.compile(
    r"router|mlp\.gate\.weight|norm|embed|lm_head|kv_a|kv_b|q_a_proj|q_b_proj|A_log|conv1d|indexer|compressor"
)
EXPERTS = re.compile(r"experts\.(gate_up_proj|up_proj|down_proj)$")
#: Families whose text model does not say that it leaves out the checkpoint's vision and audio tensors.
NO_TEXT_PART = ("dots3_note",)
#: Largest difference of logits, relative to the largest logit: the same sums in another order, in float32.
TOLERANCE = 2e-5


def _recipe(*settings: str) -> Recipe:
    return recipe_from(["calibration.sequences=3", "calibration.heldout=1", "calibration.length=24",
                        "allocate.compare=none", "compute.micro_batch=1", *settings])  # fmt: skip


SMALL = _recipe("target.bits=3.6", "quantize.shared_bits=4", "allocate.candidates=[{bits: 2, group: 32}, "
                "{bits: 3, group: 32}, {bits: 4, group: 32}, {bits: 8, group: 32}, {bits: 16}]")  # fmt: skip
EXACT = _recipe("target.size=1GB", "allocate.candidates=[{bits: 16}]", "quantize.attention_bits=16",
                "quantize.shared_bits=16", "quantize.dense_bits=16")  # fmt: skip


@dataclass(frozen=True)
class Trip:
    """A checkpoint and what plain transformers makes of it. ids [2, L]; logits [2, L, V] in float32;
    expert_weights: how many weights its routed text experts have."""

    family: str
    head: type[PreTrainedModel]
    folder: Path
    tokens: TokenBatches
    logits: torch.Tensor
    expert_weights: int

    @property
    def source(self) -> Path:
        return self.folder / "original"

    @property
    def packed(self) -> Path:
        return self.folder / "packed"

    @property
    def ids(self) -> torch.Tensor:
        return self.tokens.ids[:2]


def start(family: str, folder: Path) -> Trip:
    head = head_class(family)
    config = tiny_checkpoint(family, folder / "original")
    ours = tokens(config.get_text_config().vocab_size)
    model = load(head, folder / "original")
    named = [(name, tensor.numel()) for name, tensor in model.named_parameters() if EXPERTS.search(name)]
    weights = sum(count for name, count in named if not re.search("shared|vision", name))
    return Trip(family, head, folder, ours, plain(model, ours.ids[:2]), weights)


def walks_as_the_model_runs(trip: Trip) -> None:
    assert_close(walked(OpenModel(trip.source, torch.float32), trip.ids), trip.logits, "walk of the original")
    half = plain(load(trip.head, trip.source, torch.bfloat16), trip.ids)
    assert_close(walked(OpenModel(trip.source), trip.ids), half, "walk of the original in bfloat16")


def quantizes(trip: Trip) -> torch.Tensor:
    """Quantize and load again; returns the logits of the packed model."""
    result = pipeline.quantize(pipeline.make_job(str(trip.source), SMALL, tokens=trip.tokens), trip.packed)
    assert result.manifest["bits_per_weight"] <= 3.6
    check_fates(trip)
    logits = plain(load(trip.head, trip.packed), trip.ids)
    assert difference(logits, trip.logits) > 1e-3, (
        "the packed model computes what the original does: nothing is quantized"
    )
    again = OpenModel(trip.packed, torch.float32, prepare=loading.prepare(trip.packed))
    assert_close(walked(again, trip.ids), logits, "walk of the packed model")
    return logits


def check_fates(trip: Trip) -> None:
    """Every input tensor is accounted for; experts are packed, all of them; what must be kept is kept, bit for bit."""
    inputs, outputs = stored(trip.source), stored(trip.packed)
    fates = read_manifest(trip.packed)["tensors"]
    assert set(fates) == set(inputs)
    experts = {name for name, fate in fates.items() if fate["role"] == "expert"}
    assert all(fates[name]["fate"] == "quantized" for name in experts)
    assert sum(inputs[name].numel() for name in experts) == trip.expert_weights > 0
    for name, fate in fates.items():
        if KEPT.search(name) and name not in experts:
            assert fate["fate"] == "kept", f"{name} ({fate['role']}) was quantized"
        if fate["fate"] == "kept":
            assert torch.equal(outputs[name], inputs[name]), f"{name} was changed"
        else:
            assert name not in outputs or outputs[name].numel() == 1


def loads_every_way(trip: Trip, logits: torch.Tensor) -> None:
    """By moecompress, by AutoModelForCausalLM, in bfloat16, and after save_pretrained."""
    ours = loading.load(trip.packed, torch.float32)
    assert type(ours) is trip.head and torch.equal(plain(ours, trip.ids), logits)
    if type(ours.config) in AutoModelForCausalLM._model_mapping and trip.family not in NO_TEXT_PART:
        auto = load(AutoModelForCausalLM, trip.packed)  # of some families the text part alone
        assert_close(plain(auto, trip.ids), logits, "packed model by AutoModelForCausalLM")
    ours.save_pretrained(trip.folder / "again")
    again = plain(load(trip.head, trip.folder / "again"), trip.ids)
    assert torch.equal(again, logits), "save_pretrained changed the packed model"
    half = plain(load(trip.head, trip.packed, torch.bfloat16), trip.ids)
    walk = OpenModel(trip.packed, prepare=loading.prepare(trip.packed))
    assert_close(walked(walk, trip.ids), half, "walk of the packed model in bfloat16")


def exports(trip: Trip, logits: torch.Tensor) -> None:
    export(trip.packed, trip.folder / "dense", "float32")
    assert set(stored(trip.folder / "dense")) == set(stored(trip.source)), "the dense export has other names"
    dense = plain(load(trip.head, trip.folder / "dense"), trip.ids)
    assert_close(dense, logits, "dense export", 1e-4)


def is_exact_at_16_bits(trip: Trip) -> None:
    out = trip.folder / "exact"
    pipeline.quantize(pipeline.make_job(str(trip.source), EXACT, tokens=trip.tokens), out)
    assert_close(plain(load(trip.head, out), trip.ids), trip.logits, "16-bit candidates")


# --- means ----------------------------------------------------------------------------------------------------------


def tokens(vocabulary: int) -> TokenBatches:
    ids = torch.randint(5, vocabulary, (3, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    return TokenBatches.of(ids, mask)


@torch.no_grad()
def walked(opened: OpenModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a layer walk, one sequence a lane."""
    lanes = list(ids.split(1))
    with Walk(opened, lanes) as walk:
        for layer in walk.layers():
            outputs = [walk.run(lane) for lane in range(len(lanes))]
            if layer == opened.anatomy.num_layers - 1:
                return torch.cat([walk.logits(lane, output) for lane, output in enumerate(outputs)])
            for lane, output in enumerate(outputs):
                walk.step(lane, output)
    raise AssertionError("a model without layers")


@torch.no_grad()
def plain(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the model's own forward, one sequence at a time as in `walked`."""
    return torch.cat([model(input_ids=one, use_cache=False).logits for one in ids.split(1)])


def load(head, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' own loading; asserts that it found every tensor and no other."""
    model, info = head.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key], f"{key}: {sorted(info[key])[:4]}"
    return model.eval()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def assert_close(got: torch.Tensor, wanted: torch.Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    assert difference(got, wanted) <= tolerance, (
        f"{what}: logits differ by {difference(got, wanted):.1e} of the largest"
    )
