"""The page: records into numbers and plots, those into the template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from moecompress.prune import worst_layer
from moecompress.report import plots
from moecompress.report.records import (
    Records,
    errors_by_layer,
    experts_by_layer,
    fates_by_role,
    points,
    slimmed,
    total_of,
)


def render(records: Records) -> str:
    """The whole report as HTML: no scripts, nothing fetched, the same bytes for the same records."""
    environment = Environment(loader=PackageLoader("moecompress", "report"), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.filters |= {"size": plots.size_text, "name": lambda path: Path(path).name}
    return environment.get_template("report.html").render(content(records))


def content(records: Records) -> dict[str, Any]:
    """Everything that the template shows."""
    manifest, heldout = records.manifest, records.manifest["heldout"]
    measured = {label: row for label, row in heldout.items() if "perplexity" in row}
    router = {label: row["router_agreement_by_layer"] for label, row in measured.items()}
    router = {label: layers for label, layers in router.items() if layers}
    pictures = {
        "expert_use": plots.expert_use(records.statistics),
        "bits": plots.bits(records.plan),
        "errors": plots.errors(errors_by_layer(manifest, records.statistics.projections), records.statistics, router),
        "size": plots.size_against_divergence(points(records)),
    }
    prediction, repair = manifest.get("prediction"), manifest.get("repair")
    if prediction and prediction["units"]:
        pictures["prediction"] = plots.prediction(prediction["units"])
    return {
        "name": records.name,
        "manifest": manifest,
        "plan": records.plan,
        "recipe": records.recipe,
        "chosen": repair["after"] if repair and repair["kept"] else heldout[manifest["chosen"]],
        "measured": measured,
        "steps": [step | {"worst": worst_layer(step)} for step in manifest.get("steps", [])],
        "prediction": prediction,
        "repair": repair,
        "routing": manifest.get("routing"),
        "difference": heldout.get("plan_minus_uniform"),
        "sizes": {label: total_of(records, label) for label in measured},
        "slimmed": slimmed(manifest),
        "neurons": max((choice.rows for choice in records.plan.choices if not choice.unit.endswith(".down")), default=0),
        "evaluations": records.evaluations,
        "fates": fates_by_role(records),
        "unreached": experts_by_layer(manifest["unreached_experts"]),
        "pictures": {name: plots.data_uri(svg) for name, svg in pictures.items()},
    }
