from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from moecompress.allocate.candidates import Candidate
from moecompress.errors import UserError
from moecompress.recipe import (
    STEPS,
    TRAINABLE,
    DistillStep,
    DropStep,
    MergeStep,
    Recipe,
    RouteRecipe,
    load_recipe,
    parse_size,
    recipe_from,
    step_methods,
)

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("14GB", 14 * 10**9),
        ("14GiB", 14 * 2**30),
        ("1.5 gib", 3 * 2**29),
        ("0.1GB", 10**8),
        ("7B", 7),
        ("12", 12),
        (12, 12),
        ("2TB", 2 * 10**12),
        ("3MiB", 3 * 2**20),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["14G", "big", "-3GB", "", "0", "1.2.3GB", True, "nan"])
def test_what_is_not_a_size(text: object) -> None:
    with pytest.raises(UserError):
        parse_size(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_says_its_name_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    again = load_recipe(written(tmp_path, recipe.to_yaml()))
    assert again == recipe and again.fingerprint() == recipe.fingerprint()
    for candidate in recipe.allocate.candidates or ():
        spec = Candidate(candidate.bits, candidate.group, candidate.symmetric, candidate.code, candidate.outliers, candidate.shares)
        assert Candidate.parse(spec.name) == spec
    header = path.read_text(encoding="utf-8").split("name:")[0]
    assert all(f"# {word}:" in header for word in ("command", "hardware", "size", "divergence"))


def test_there_are_recipes() -> None:
    general = {"demo", "balanced-3bit", "small-2bit"}
    papers = {"mc-moe", "mc-moe-odp", "mc-sharp", "reap", "ream", "naee", "hc-smoe", "m-smoe", "mc-smoe", "molae", "qmoe", "modes"}
    assert general | papers <= {path.stem for path in RECIPES}
    for path in RECIPES:
        if path.stem in papers:
            header = path.read_text(encoding="utf-8").split("name:")[0]
            assert "arXiv:" in header and "# What differs from the paper:\n" in header


def test_names_are_those_of_the_code() -> None:
    from moecompress.distill.folder import ROLES
    from moecompress.runtime.skipping import POLICIES
    from moecompress.transform.methods import METHODS
    from moecompress.transform.steps import RUN

    assert set(STEPS) == {*RUN, DistillStep}  # the latter is in distill/step.py
    assert tuple(ROLES) == TRAINABLE
    assert {name for name, kind in step_methods().items() if kind in (DropStep, MergeStep)} == set(METHODS)
    assert set(get_args(RouteRecipe.model_fields["policy"].annotation)) == {"none", *POLICIES}


def test_reading_recipes_needs_no_torch() -> None:
    code = "import sys, moecompress.recipe; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_steps(tmp_path: Path) -> None:
    path = written(tmp_path, "transform:\n  - {method: reap, keep: 0.75, protect: [L03.E017]}\n  - {method: ream, keep: 6, max_kl: null}\n")
    recipe = load_recipe(path)
    assert recipe.transform == (DropStep(method="reap", keep=0.75, protect=("L03.E017",)), MergeStep(method="ream", keep=6, max_kl=None))
    assert recipe.without_limits() == load_recipe(written(tmp_path, recipe.to_yaml())).without_limits()
    assert recipe.fingerprint() != load_recipe(path, ["transform=[]"]).fingerprint()
    assert recipe.transform[0].max_kl == 2 and not recipe_from().transform


def test_defaults() -> None:
    recipe = recipe_from()
    assert recipe == Recipe()
    assert recipe.allocate.candidates is None  # tests/test_pipeline.py says what that stands for
    assert recipe.target.bits is None and recipe.target.size is None


def test_fingerprint_sees_values_and_not_spelling(tmp_path: Path) -> None:
    short = load_recipe(written(tmp_path, "target: {size: 14GB}\n"))
    long = load_recipe(written(tmp_path, "# the same\ntarget:\n  size: 14000000000\nquantize: {damping: 0.010}\n"))
    assert short.fingerprint() == long.fingerprint()
    assert short.fingerprint() != load_recipe(tmp_path / "r.yaml", ["target.size=14GiB"]).fingerprint()


def test_errors_carry_line_and_column(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "target: {bits: 3}\nallocate:\n  solvr: milp\n  candidates:\n    - {bits: 2}\n    - {bits: 5, gruop: 3}\n"
        "quantize:\n  damping: -1\n",
    )
    said = complaint(path)
    assert f"{path}:3:3: unknown key 'allocate.solvr'; did you mean 'allocate.solver'?" in said
    assert f"{path}:6:8: allocate.candidates.1.bits" in said
    assert (
        f"{path}:6:17: unknown key 'allocate.candidates.1.gruop'; did you mean 'allocate.candidates.1.group'?" in said
    )
    assert f"{path}:8:3: quantize.damping" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bits: 3\n", "did you mean 'target.bits'"),
        ("zzz: 3\n", "known here: name, target"),
        ("target: {bits: 3, size: 14GB}\n", "either bits or size"),
        ("target: {size: 14G}\n", "not a size"),
        ("target: {bits: .nan}\n", ":1:10: target.bits"),
        ("target: {bits: true}\n", "should be a number"),
        ("calibration: {sequences: 4, heldout: 4}\n", "must be smaller than sequences"),
        ("calibration: {sequences: 2.5}\n", "valid integer"),
        ("calibration: 7\n", "should be a section with keys: text"),
        ("allocate: {candidates: []}\n", "at least 1 item"),
        ("allocate: {candidates: [{bits: 2}, {bits: 2}]}\n", "listed twice"),
        ("allocate: {candidates: [{group: 64}]}\n", "is missing"),
        ("allocate: {candidates: [{code: nested, bits: 2}]}\n", "should be 3 or 4"),
        ("allocate: {candidates: [{code: nested, bits: 4, symmetric: false}]}\n", "a nested candidate has no zeros"),
        ("allocate: {candidates: [{bits: 2, outliers: 0.1}]}\n", "should be 0.005, 0.01 or 0.02, or 0 for none"),
        ("allocate: {candidates: [{bits: 8, outliers: 0.01}]}\n", "only a candidate of 2, 3 or 4-bit integers has outliers"),
        ("allocate: {candidates: [{code: trellis, bits: 2, outliers: 0.01}]}\n", "only a candidate of 2, 3 or 4-bit integers has outliers"),
        ("allocate: {candidates: [{code: low-rank, sparse: 0.1}]}\n", "needs a rank above 0"),
        ("allocate: {candidates: [{code: low-rank, rank: 0.45, sparse: 0.1}]}\n", "twice the rank and sparse together below 1"),
        ("allocate: {candidates: [{code: low-rank, rank: 0.2505}]}\n", "candidates.0.rank: should be a share below 1, in thousandths"),
        ("allocate: {candidates: [{code: low-rank, rank: x}]}\n", "candidates.0.rank: should be a valid number"),
        ("allocate: {candidates: [{code: low-rank, rank: true}]}\n", "candidates.0.rank: should be a number, not true"),
        ("allocate: {candidates: [{code: low-rank, rank: 0.1, bits: 4}]}\n", "bits of a low-rank candidate follow"),
        ("allocate: {candidates: [{code: low-rank, rank: 0.1, group: 64}]}\n", "only a candidate of 2, 3, 4 or 8-bit integers has group"),
        ("allocate: {candidates: [{code: shared-basis, rank: 0.5}]}\n", "candidates.0.bits: is missing"),
        ("allocate: {candidates: [{code: shared-basis, bits: 4}]}\n", "shared bases needs a rank above 0"),
        ("allocate: {candidates: [{code: shared-basis, bits: 4, rank: 0.5, sparse: 0.1}]}\n", "has no sparse"),
        ("allocate: {candidates: [{code: shared-basis, bits: 16, rank: 0.5}]}\n", "should be 2, 3, 4 or 8"),
        ("allocate: {candidates: [{bits: 4, rank: 0.1}]}\n", "only a candidate {code: low-rank} has rank and sparse"),
        ("allocate: {candidates: [{bits: 16, group: 64}]}\n", "only a candidate of 2, 3, 4 or 8-bit integers"),
        ("allocate: {allocator: pmq, granularity: layer}\n", "decides per expert"),
        ("quantize: {hessian: g3}\n", "'1', 'g' or 'g2'"),
        ("transform: {method: reap, keep: 0.5}\n", ":1:1: transform: should be a list of steps"),
        ("transform: [reap]\n", ":1:13: transform.0: should be"),
        ("transform:\n  - {method: rap, keep: 3}\n", ":2:6: transform.0.method: should be one of reap, ean"),
        ("transform:\n  - {keep: 3}\n", ":2:5: transform.0.method: is missing"),
        ("transform:\n  - {method: reap}\n", ":2:5: transform.0.keep: is missing"),
        ("transform:\n  - {method: ream, keep: 3}\n  - {method: reap, kep: 3}\n",
         ":3:20: unknown key 'transform.1.kep'; did you mean 'transform.1.keep'?"),
        ("transform: [{method: reap, keep: 1.5}]\n", ":1:28: transform.0.keep: should be a share below 1, or a whole"),
        ("transform: [{method: reap, keep: true}]\n", "should be a number, not true"),
        ("transform: [{method: reap, keep: 0.5, protect: [E3]}]\n", "transform.0.protect.0: Not the name of an expert: 'E3'"),
        ("transform: [{method: ream, keep: 0.5, protect: [L00.E003]}]\n", "transform.0: ream merges experts and cannot protect"),
        ("route: {policy: odp}\n", "policy odp needs either skip or max_kl"),
        ("route: {policy: odp, skip: 0.1, max_kl: 0.1}\n", "policy odp needs either skip or max_kl"),
        ("route: {skip: 0.1}\n", "skip and max_kl need a policy"),
        ("route: {policy: odp, skip: 0.1, steps: 9}\n", "only policies otp and compressed-experts are trained"),
        ("route: {policy: odp, skip: 0.1, protect: 1}\n", ":1:33: route.protect: should be less than 1"),
        ("route: {policy: odp, skip: 1}\n", ":1:22: route.skip: should be less than 1"),
        ("name: a\nname: b\n", ":2:1: key 'name' appears twice"),
        ("name: [\n", "not valid YAML"),
        ("- a\n", "not a recipe"),
        ("", "an empty file"),
        ("name: !!python/object:os.system x\n", "not valid YAML"),
    ],
)
def test_what_a_recipe_must_not_say(tmp_path: Path, text: str, words: str) -> None:
    assert words in complaint(written(tmp_path, text))


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    path = written(tmp_path, "name: a\n")
    assert f"did you mean {path}?" in complaint(tmp_path / "rr.yaml")
    assert "no recipe at" in complaint(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00name")
    assert "UTF-8" in complaint(tmp_path / "b.yaml")


def test_empty_sections_mean_the_defaults_and_the_file_names_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, "quantize:\n  # damping: 0.1\ntarget: {bits: 3}\n"))
    assert recipe.quantize == Recipe().quantize and recipe.name == "r"


def test_overrides(tmp_path: Path) -> None:
    path = written(tmp_path, "target: {bits: 3}\nquantize: {hessian: 1}\n")
    recipe = load_recipe(
        path,
        ["quantize.damping=1e-3", "allocate.candidates=[{bits: 2}, {bits: 16}]", "target.size=14GiB", "name=mine"],
    )
    assert recipe.quantize.damping == 0.001 and recipe.quantize.hessian == "1" and recipe.name == "mine"
    assert [c.bits for c in recipe.allocate.candidates] == [2, 16]
    assert recipe.target.size == 14 * 2**30 and recipe.target.bits is None
    assert load_recipe(path, ["target.size=null"]).target.bits == 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "quantize.dampng=1",
            "--set quantize.dampng=1: unknown key 'quantize.dampng'; did you mean 'quantize.damping'?",
        ),
        ("quantize.damping=x", "--set quantize.damping=x: quantize.damping: should be a valid number"),
        ("name.first=x", "has no keys of its own"),
        ("quantize.damping", "cannot read --set"),
        ("=3", "cannot read --set"),
        ("target.bits=[", "not valid YAML"),
    ],
)
def test_wrong_overrides_are_named(tmp_path: Path, override: str, words: str) -> None:
    assert words in complaint(written(tmp_path, "name: a\n"), override)
