"""Whole checkpoints with fewer experts, against plain transformers running the original with those experts masked out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import roundtrip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import head_class, shake, tiny_checkpoint, tiny_config
from transformers import PreTrainedModel
from whole import accounts_for_everything, after_step, job_of

from moecompress.errors import UserError
from moecompress.model import families
from moecompress.model.experts import find_experts
from moecompress.transform import stage
from moecompress.transform.regroup import Regrouping, dropping

ALWAYS = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe", "gpt_oss")
#: Why a smaller number of experts is refused.
REFUSED = {"deepseek_v4": "holds whole numbers", "inkling": "would not follow", "zaya": "would not follow"}
#: Families whose router no rule of transform/routing.py describes: only NAEE needs one.
NO_RULE = ("gemma4", "phimoe")
OTHERS = [f for f in families.INTERFACE if f not in (*ALWAYS, *families.FAILS, *REFUSED)]


pytestmark = pytest.mark.usefixtures("quiet_and_single_threaded")


def prune(folder: Path, out: Path, method: str, keep: float = 3, protected=(), seed: int = 0) -> dict:
    names = [f"L{layer:02d}.E{expert:03d}" for layer, expert in protected]
    return after_step(folder, out, seed, method=method, keep=keep, **({"protect": names} if names else {}))


def with_selection_bias(folder: Path) -> None:
    """Give the biases that only choose experts (zero in a new model) values that matter."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "e_score_correction_bias" in name:
            tensors[name] = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)).to(tensor.dtype) / 4
    save_file(tensors, file, metadata={"format": "pt"})


@contextmanager
def masked(model: PreTrainedModel, gone: dict[str, list[int]]) -> Iterator[None]:
    """Router logits (and selection biases) of the experts ``gone`` (by block) are -inf, whatever the family makes of them."""
    linear, hooks = F.linear, []
    for block, experts in gone.items():
        routers = [m for m in model.get_submodule(block).modules() if getattr(m, "weight", None) is not None
                   and m.weight.ndim == 2 and m.weight.shape[0] == model.get_submodule(f"{block}.experts").num_experts]  # fmt: skip
        (router,) = routers

        def before(module, _inputs, experts=experts):
            F.linear = lambda x, w, b=None: linear(x, w, b).index_fill(-1, torch.tensor(experts), -torch.inf)
            if hasattr(module, "e_score_correction_bias"):
                module.e_score_correction_bias[experts] = -torch.inf

        def after(*_):
            F.linear = linear

        hooks += [router.register_forward_pre_hook(before), router.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def equals_the_masked_original(family: str, source: Path, out: Path, manifest: dict) -> None:
    ids = roundtrip.tokens(96).ids[:2]
    original, pruned = (roundtrip.load(head_class(family), folder) for folder in (source, out))
    blocks = [name.rpartition(".")[0] for name, _ in find_experts(original)]
    gone = {block: [e for e, new in enumerate(row["target"]) if new < 0]
            for block, row in zip(blocks, manifest["experts"].values(), strict=True)}  # fmt: skip
    untouched = roundtrip.plain(original, ids)
    with masked(original, gone):
        wanted = roundtrip.plain(original, ids)
    assert roundtrip.difference(wanted, untouched) > 1e-3, "the mask does nothing"
    roundtrip.assert_close(roundtrip.plain(pruned, ids), wanted, f"{family} with dropped experts")


# --- families -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALWAYS)
def test_dropping_is_masking(family: str, tmp_path: Path) -> None:
    source, out = tmp_path / "original", tmp_path / "out"
    tiny_checkpoint(family, source)
    with_selection_bias(source)
    layers = range(json.loads((source / "config.json").read_text())["num_hidden_layers"])
    first = 1 if family in ("deepseek_v3", "glm4_moe") else 0  # theirs is dense
    # The last expert stays, so that the places of others move.
    manifest = prune(source, out, "naee", protected=tuple((layer, 3) for layer in layers[first:]))
    equals_the_masked_original(family, source, out, manifest)
    accounts_for_everything(source, out, manifest)


@pytest.mark.parametrize("method", ["m-smoe", "hc-smoe", "ream"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_merged_checkpoints_load(family: str, method: str, tmp_path: Path) -> None:
    source, out = tmp_path / "original", tmp_path / "out"
    tiny_checkpoint(family, source)
    manifest = prune(source, out, method)
    accounts_for_everything(source, out, manifest)
    assert all(min(row["target"]) == 0 for row in manifest["experts"].values()), "merging drops no expert"
    original, merged = (roundtrip.load(head_class(family), folder) for folder in (source, out))
    (_, old), (_, new) = next(find_experts(original)), next(find_experts(merged))
    row = next(iter(manifest["experts"].values()))
    for index, expert in enumerate(row["kept"]):
        alone = row["target"].count(index) == 1
        assert torch.equal(new.down_proj[index], old.down_proj[expert]) == alone


def test_groups_of_experts_stay_groups(tmp_path: Path) -> None:
    """DeepSeek's router first picks groups of consecutive experts."""
    config = tiny_config("deepseek_v3")
    config.num_local_experts, config.n_group, config.topk_group, config.dtype = 8, 2, 1, torch.bfloat16
    model = head_class("deepseek_v3")._from_config(config)
    shake(model)
    model.save_pretrained(tmp_path / "original")
    with_selection_bias(tmp_path / "original")
    manifest = prune(tmp_path / "original", tmp_path / "out", "reap", 0.5)
    (row,) = manifest["experts"].values()
    assert sum(e < 4 for e in row["kept"]) == 2
    equals_the_masked_original("deepseek_v3", tmp_path / "original", tmp_path / "out", manifest)
    for method, keep, reason in (("naee", 4, "cannot keep the groups"), ("m-smoe", 4, "cannot keep the groups"),
                                 ("reap", 5, "in 2 groups"), ("reap", 2, "Cannot keep 2 of 8")):  # fmt: skip
        with pytest.raises(UserError, match=reason):
            prune(tmp_path / "original", tmp_path / "no", method, keep)
    with pytest.raises(UserError, match="protects more experts"):
        prune(tmp_path / "original", tmp_path / "no", "reap", 4, [(1, 0), (1, 1), (1, 2)])


@pytest.mark.long
@pytest.mark.parametrize("family", OTHERS)
def test_other_families(family: str, tmp_path: Path) -> None:
    source = tmp_path / "original"
    tiny_checkpoint(family, source)
    for method in ("reap", "ream") if family in NO_RULE else ("naee", "ream"):
        manifest = prune(source, tmp_path / method, method)
        accounts_for_everything(source, tmp_path / method, manifest)
        roundtrip.load(head_class(family), tmp_path / method)


@pytest.mark.parametrize("family", REFUSED)
def test_families_whose_experts_cannot_be_fewer_are_refused(family: str, tmp_path: Path) -> None:
    tiny_checkpoint(family, tmp_path / "original")
    with pytest.raises(UserError, match=REFUSED[family]):
        prune(tmp_path / "original", tmp_path / "out", "reap")
    assert not (tmp_path / "out").exists()


# --- the walk -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen") / "original"
    tiny_checkpoint("qwen3_moe", folder)
    return folder


def test_later_layers_see_what_the_changed_ones_deliver(qwen: Path, tmp_path: Path, monkeypatch) -> None:
    seen: list[torch.Tensor] = []

    def spy(scene) -> Regrouping:
        seen.append(scene.capture.hidden)
        return dropping([0, 1, 3], 4)

    monkeypatch.setitem(stage.METHODS, "random", spy)
    prune(qwen, tmp_path / "out", "random")
    model = roundtrip.load(head_class("qwen3_moe"), tmp_path / "out")
    got: list[torch.Tensor] = []
    list(find_experts(model))[-1][1].register_forward_pre_hook(lambda _m, inputs: got.append(inputs[0]))
    roundtrip.plain(model, job_of(qwen).calibration.ids)
    assert torch.allclose(seen[-1], torch.cat(got), atol=1e-5)


def test_killed_run_goes_on_behind_the_last_layer(qwen: Path, tmp_path: Path, monkeypatch) -> None:
    prune(qwen, tmp_path / "whole", "reap")
    calls = []

    def killed(scene) -> Regrouping:
        calls.append(scene)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return reap(scene)

    reap = stage.METHODS["reap"]
    monkeypatch.setitem(stage.METHODS, "reap", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(qwen, tmp_path / "again", "reap")
    assert not (tmp_path / "again").exists()
    prune(qwen, tmp_path / "again", "reap")
    assert len(calls) == 3, "the first layer was done again"
    for path in (tmp_path / "whole").rglob("*.*"):
        assert (tmp_path / "again" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


def test_layers_that_the_model_ignores_are_left_out(tmp_path: Path) -> None:
    """A multi-token-prediction layer has the old number of experts."""
    tiny_checkpoint("glm4_moe", tmp_path / "original")
    file = tmp_path / "original" / "model.safetensors"
    extra = {"model.layers.46.mlp.experts.3.up_proj.weight": torch.randn(32, 64).bfloat16()}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    manifest = prune(tmp_path / "original", tmp_path / "out", "frequency")
    assert [manifest["tensors"][name]["fate"] for name in extra] == ["left out"]
    assert not set(extra) & set(roundtrip.stored(tmp_path / "out"))


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "protected", "method", "reason"), [
    (2, [], "reap", "Cannot keep 2 of 4"), (4, [], "reap", "Cannot keep 4 of 4"), (0.25, [], "reap", "Cannot keep 1 of 4"),
    (3.5, [], "reap", "a whole number of experts"), (3, [], "magic", "one of reap, ean, .* got 'magic'"),
    (3, [(0, 4)], "reap", "no expert L00.E004"), (3, [(9, 0)], "reap", "no expert L09.E000"),
    (3, [(0, e) for e in range(4)], "reap", "protects more experts"), (3, [(0, 1)], "ream", "cannot protect"),
])  # fmt: skip
def test_impossible_wishes_are_refused(qwen: Path, tmp_path: Path, keep, protected, method: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        prune(qwen, tmp_path / "out", method, keep, protected)
    assert not (tmp_path / "out").exists()


def test_protected_experts_stay(qwen: Path, tmp_path: Path) -> None:
    dropped = {(int(layer), row["target"].index(-1))
               for layer, row in prune(qwen, tmp_path / "free", "frequency")["experts"].items()}  # fmt: skip
    manifest = prune(qwen, tmp_path / "out", "frequency", protected=tuple(sorted(dropped)))
    assert all(manifest["experts"][str(layer)]["target"][expert] >= 0 for layer, expert in dropped)


# --- the command ----------------------------------------------------------------------------------------------------


def test_command(tiny_model: Path, tmp_path: Path, moecompress: Callable, quick: list[str]) -> None:
    out = tmp_path / "half"
    ran = moecompress("prune", tiny_model, "-o", out, "--keep", 0.5, "--protect", "L01.E006", *quick)
    assert ran.code == 0, ran.err
    assert "KL" in ran.out and "reap: 4 experts a layer" in ran.out
    assert moecompress("prune", tiny_model, "-o", out, *quick).code == 2  # not empty
    assert "Not the name of an expert" in moecompress("prune", tiny_model, "-o", tmp_path / "x", "--protect", "7").err
    # What comes out is an ordinary checkpoint: plain transformers runs it, and quantize takes it.
    code = ("import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer; "
            f"model = AutoModelForCausalLM.from_pretrained({str(out)!r}); "
            f"ids = AutoTokenizer.from_pretrained({str(out)!r})('The text', return_tensors='pt').input_ids; "
            "assert model(input_ids=ids).logits.isfinite().all() and 'moecompress' not in sys.modules; "
            "print(model.model.layers[1].mlp.experts.down_proj.shape[0])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "4", done.stderr
    ran = moecompress("quantize", out, "-o", tmp_path / "packed", "--target-bits", 3.6, *quick,
                      "--set", "allocate.compare=none")  # fmt: skip
    assert ran.code == 0, ran.err
