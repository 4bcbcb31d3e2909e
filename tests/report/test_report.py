"""The report: whole in itself, true to the folder, and clear about what it cannot read."""

from __future__ import annotations

import base64
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors import safe_open
from typer import Typer
from typer.testing import CliRunner

from moecompress.allocate.plan import Choice, Plan
from moecompress.calibrate.statistics import LayerStatistics, Statistics
from moecompress.errors import UserError
from moecompress.report import plots, write_report
from moecompress.report.records import errors_by_layer, fates_by_role, points, read_evaluation, read_records

EVALUATION = {
    "model": "models/other<script>", "text": "texts/stories.txt", "sequences": 4, "context_length": 64, "kl_mean": 0.25,
    "kl_interval_95": [0.2, 0.3], "perplexity": 12.5, "reference_perplexity": 10.25, "total_bytes": 123_456,
    "bits_per_weight": 2.5, "tokens_per_second": 31.5,
}  # fmt: skip


class Page(HTMLParser):
    """Tags, the addresses they point to, and the words between them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.parts: list[str] = []
        self.feed(text)
        self.words = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.parts.append(data)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation") / "other.json"
    path.write_text(json.dumps(EVALUATION))
    return path


@pytest.fixture(scope="module")
def page(packed_tiny: Path, evaluation: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    output = tmp_path_factory.mktemp("page") / "report.html"
    assert write_report(packed_tiny, [evaluation], output) == output
    return Page(output.read_text(encoding="utf-8"))


@pytest.fixture
def copy_of_packed(packed_tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed_tiny, tmp_path / "packed"))


def change_manifest(folder: Path, **changes: object) -> None:
    path = folder / "moecompress" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_nothing_is_fetched(page: Page) -> None:
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.tags.count("img") == 5
    for address in page.addresses:
        kind, _, data = address.partition(",")
        assert kind == "data:image/svg+xml;base64"
        for element in ElementTree.fromstring(base64.b64decode(data)).iter():
            links = [value for key, value in element.attrib.items() if key.rpartition("}")[2] == "href"]
            assert all(link.startswith(("#", "data:")) for link in links)


def test_numbers_are_those_of_the_folder(page: Page, packed_tiny: Path, tiny_model: Path) -> None:
    manifest = json.loads((packed_tiny / "moecompress" / "manifest.json").read_text())
    kept = manifest["heldout"][manifest["chosen"]]
    assert f"KL {kept['kl_mean']:.5f}" in page.words
    assert f"{manifest['bits_per_weight']:.3f} bits per weight" in page.words
    assert f"{manifest['chosen']} (kept)" in page.words
    rows = fates_by_role(read_records(packed_tiny))
    assert sum(row["count"] for row in rows) == len(manifest["tensors"])
    assert sum(row["before"] for row in rows) == tensor_bytes(tiny_model)
    experts = next(row for row in rows if row["role"] == "expert")
    assert experts["after"] == manifest["expert_bytes"]
    kept_rows = [row for row in rows if row["fate"] == "kept"]
    assert kept_rows and all(row["before"] == row["after"] for row in kept_rows)
    # What no input tensor became is the marker that plain transformers trips over, a few bytes a layer.
    assert 0 <= tensor_bytes(packed_tiny) - sum(row["after"] for row in rows) < 1000


def tensor_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            total += sum(shard.get_tensor(name).nbytes for name in shard.keys())  # noqa: SIM118
    return total


def test_evaluations_are_shown_and_escaped(page: Page, packed_tiny: Path, evaluation: Path) -> None:
    assert "other<script> stories.txt 4 × 64 0.25000 0.20000 … 0.30000 12.500 10.250 2.500" in page.words
    shown = points(read_records(packed_tiny, [evaluation]))
    assert [point["kind"] for point in shown] == ["original", "plan", "uniform", "evaluation"]
    assert shown[0]["bytes"] > shown[1]["bytes"]
    assert shown[-1]["label"] == "other<script>, stories.txt"


def test_an_evaluation_of_token_ids_has_no_text(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_text(json.dumps({key: value for key, value in EVALUATION.items() if key != "text"}))
    assert read_evaluation(path)["text"] == "unnamed text"


def test_errors_are_sorted_by_kind_and_layer(packed_tiny: Path) -> None:
    records = read_records(packed_tiny)
    errors = errors_by_layer(records.manifest, records.statistics.projections)
    assert list(errors) == ["expert gate", "expert up", "expert down", "attention"]
    assert list(errors["attention"]) == [0, 1, 2]
    assert sorted(errors["attention"][1]) == sorted(
        error for name, error in records.manifest["errors"].items() if name.startswith("model.layers.1.self_attn")
    )
    assert sum(len(v) for kind in errors.values() for v in kind.values()) == len(records.manifest["errors"])


def test_unreached_fallbacks_and_a_better_uniform_plan_are_named(copy_of_packed: Path, tmp_path: Path) -> None:
    path = copy_of_packed / "moecompress" / "manifest.json"
    row = next(iter(json.loads(path.read_text())["heldout"].values()))
    change_manifest(copy_of_packed, heldout={"plan": row, "uniform": row}, chosen="uniform",
                    unreached_experts=["L01.E004", "L01.E007", "L02.E000"],
                    fallbacks=["model.layers.1.mlp.experts.4.down"])  # fmt: skip
    page = Page(write_report(copy_of_packed, output=tmp_path / "r.html").read_text())
    assert "the uniform plan measured better" in page.words
    assert "layer experts 1 4, 7 2 0 " in page.words
    assert "model.layers.1.mlp.experts.4.down" in page.words


def test_works_where_nothing_was_compared(copy_of_packed: Path, tmp_path: Path) -> None:
    path = copy_of_packed / "moecompress" / "manifest.json"
    heldout = json.loads(path.read_text())["heldout"]
    row = next(iter(heldout.values()))
    change_manifest(copy_of_packed, heldout={"plan": row}, chosen="plan")
    assert "uniform one of the same target" not in write_report(copy_of_packed, output=tmp_path / "a.html").read_text()


def test_predictions_are_shown_where_there_are_some(page: Page, packed_tiny: Path, copy_of_packed: Path, tmp_path: Path) -> None:
    prediction = json.loads((packed_tiny / "moecompress" / "manifest.json").read_text())["prediction"]
    assert f"rank correlation: {prediction['spearman']:.3f}" in page.words
    assert all(f"{scheme} {ratio:.2f}" in page.words for scheme, ratio in prediction["ratio"].items())
    change_manifest(copy_of_packed, prediction=None)  # made by an earlier version
    assert "Do the predictions hold?" not in write_report(copy_of_packed, output=tmp_path / "r.html").read_text()


@pytest.mark.parametrize("kept", [True, False])
def test_a_repair_is_shown_and_its_result_is_what_counts(copy_of_packed: Path, tmp_path: Path, kept: bool) -> None:
    manifest = json.loads((copy_of_packed / "moecompress" / "manifest.json").read_text())
    before = manifest["heldout"][manifest["chosen"]]
    after = before | {"kl_mean": 0.000123} if kept else before
    change_manifest(copy_of_packed, repair={"steps": 7, "weights": 1536, "before": before, "after": after, "kept": kept})
    page = Page(write_report(copy_of_packed, output=tmp_path / "r.html").read_text())
    assert f"KL {after['kl_mean']:.5f}" in page.words
    assert ("they were kept" in page.words) == kept and ("the routers are as they were" in page.words) != kept
    assert next(p for p in points(read_records(copy_of_packed)) if p["kind"] == manifest["chosen"])["kl"] == after["kl_mean"]


def test_default_place_is_beside_the_folder_and_bytes_repeat(copy_of_packed: Path) -> None:
    first = write_report(copy_of_packed)
    assert first == copy_of_packed.with_name("packed.html")
    before = first.read_bytes()
    assert write_report(copy_of_packed).read_bytes() == before
    assert str(copy_of_packed).encode() not in before


def test_command(copy_of_packed: Path, evaluation: Path, tmp_path: Path) -> None:
    from moecompress.cli import report

    app = Typer()
    app.command()(report.command)
    output = tmp_path / "page.html"
    ran = CliRunner().invoke(app, [str(copy_of_packed), "--evaluation", str(evaluation), "-o", str(output), "--json"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout) == {"output": str(output), "bytes": output.stat().st_size}


@pytest.mark.parametrize("content", ["not json", "[]", '{"model": "m"}', json.dumps(EVALUATION | {"kl_mean": None})])
def test_not_an_evaluation(packed_tiny: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "e.json"
    path.write_text(content)
    with pytest.raises(UserError, match="is not an evaluation"):
        write_report(packed_tiny, [path], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_not_a_compressed_folder(tiny_model: Path, copy_of_packed: Path) -> None:
    with pytest.raises(UserError, match="has no manifest"):
        write_report(tiny_model)
    (copy_of_packed / "moecompress" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        write_report(copy_of_packed)


def test_missing_plan(copy_of_packed: Path) -> None:
    (copy_of_packed / "moecompress" / "plan.json").unlink()
    with pytest.raises(UserError, match=r"plan\.json is missing"):
        write_report(copy_of_packed)


def test_missing_packages_are_named(packed_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"matplotlib and jinja2[\s\S]*pip install 'moecompress\[report\]'"):
        write_report(packed_tiny)


# --- plots on shapes that the tiny model does not have ---------------------------------------------------------------


def statistics(counts: dict[int, list[int]]) -> Statistics:
    layers = {
        index: LayerStatistics(torch.tensor(row), torch.zeros(len(row)), torch.zeros(len(row)),
                               torch.zeros(len(row), 3, 1), max(1, sum(row)), 0.1 * index)
        for index, row in counts.items()
    }  # fmt: skip
    return Statistics(["b3g64s"], ["gate", "up", "down"], layers, "", "")


@pytest.mark.parametrize(
    "counts",
    [{0: [0, 0]}, {1: [5, 0], 3: [7, 1, 2]}, {layer: list(range(200)) for layer in range(60)}, {2: [1, 1, 1]}],
    ids=["nothing reached", "ragged", "large", "all equal"],
)
def test_expert_use_of_any_shape(counts: dict[int, list[int]]) -> None:
    svg = plots.expert_use(statistics(counts))
    ElementTree.fromstring(svg)
    assert ("no token reached" in svg) == any(0 in row for row in counts.values())


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (3, 40), (70, 8)])
def test_bits_of_any_shape(layers: int, experts: int) -> None:
    generator = np.random.default_rng(0)
    names, sizes = ("b2g64s", "b16"), (20, 128)
    choices = []
    for layer in range(layers):
        for expert in range(experts):
            for projection in ("up", "down"):
                pick = generator.integers(2)
                choices.append(Choice(f"L{layer:02d}.E{expert:03d}.{projection}", names[pick], 8, 8, sizes[pick], 0.0))
    svg = plots.bits(Plan("global", "lagrangian", "expert", 10**9, names, tuple(choices)))
    ElementTree.fromstring(svg)
    for name in {choice.candidate for choice in choices}:
        assert name in svg


def test_a_lossless_result_can_be_drawn() -> None:
    point = {"kind": "plan", "label": "plan", "bytes": 10, "kl": 0.0, "interval": [0.0, 0.0]}
    ElementTree.fromstring(plots.size_against_divergence([point]))


def test_predictions_of_any_number_of_schemes() -> None:
    for schemes in (1, 9):
        units = {f"L00.E{e:03d}.{p}": {"scheme": f"s{e % schemes}", "predicted": 0.1 + e, "measured": 0.0 if e == 3 else 0.2 * e}
                 for e in range(12) for p in ("up", "down")}  # fmt: skip
        svg = plots.prediction(units)
        ElementTree.fromstring(svg)
        assert all(f"s{number}, down" in svg for number in range(schemes))
