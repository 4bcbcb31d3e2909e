"""What calibration saw: routing, coverage, predicted harm of every candidate, sensitivity of every layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file

from moecompress.errors import UserError
from moecompress.model.checkpoint import write_shard, write_text

#: An expert is called thinly covered below this many tokens per input channel of its widest matrix.
THIN = 1.0
#: Share of the mean gate mass that every expert gets on top of its own, so that one that calibration text hardly used
#: is not treated as worthless on other text.
PRIOR_MASS = 0.05


def gate_mass(gate_square: torch.Tensor) -> torch.Tensor:
    """What the error of an expert weighs: [E], Σ g² and a little of the mean."""
    return gate_square + PRIOR_MASS * gate_square.mean()


@dataclass(frozen=True)
class Thinning:
    """What leaving experts out of a layer of E experts does, in n ways (the first leaves none out).

    into: int64 [n, E] who serves the tokens that chose an expert: itself; another one, whose output times share [n, E]
    stands for the expert's; -1: nobody, or, where again (bool [n]), those that the router chooses without it. error:
    float64 [n] squared error of the layer's expert output, summed over the calibration tokens. growth: float64 [n, E] by
    what Σ g² of an expert grows. merged: bool [n], are those who serve for others refitted to it (merging.py)?
    """

    into: torch.Tensor
    share: torch.Tensor
    again: torch.Tensor
    error: torch.Tensor
    growth: torch.Tensor
    merged: torch.Tensor


@dataclass(frozen=True)
class Narrowing:
    """What thinner experts of a layer of E experts lose, at W widths (P projections and C candidates as of `LayerStatistics`).

    widths: int64 [W] neurons that are kept. error: float64 [E, W] squared error of the layer's expert output with one expert
    that thin, nothing rounded, summed over the calibration tokens. harm: float64 [E, W, P, C] what rounding its matrices adds.
    """

    widths: torch.Tensor
    error: torch.Tensor
    harm: torch.Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """One MoE layer, E experts, P projections, C candidates.

    counts: int64 [E] tokens. gate_sum, gate_square: float64 [E], Σ g and Σ g². harm: float64 [E, P, C], expected squared
    error of the layer's expert output, summed over the calibration tokens. tokens: how many tokens the layer saw.
    sensitivity: nats of final KL (summed over tokens) per unit of squared error of the layer's expert output.
    importance: float64 [E], the same of each expert's part in it, relative to the layer's; None where it was not looked at.
    thinning, narrowing: None if it was not measured.
    """

    counts: torch.Tensor
    gate_sum: torch.Tensor
    gate_square: torch.Tensor
    harm: torch.Tensor
    tokens: int
    sensitivity: float
    importance: torch.Tensor | None = None
    thinning: Thinning | None = None
    narrowing: Narrowing | None = None

    @property
    def unit_error(self) -> torch.Tensor:
        """[E, P, C] expected squared error of an expert's output per unit of Σ g²."""
        return self.harm / self.mass[:, None, None]

    @property
    def mass(self) -> torch.Tensor:
        """[E] what errors of an expert weigh."""
        return gate_mass(self.gate_square).clamp_min(1e-30)

    @property
    def nats(self) -> float:
        """Predicted KL in nats per token, per unit of squared error."""
        return self.sensitivity / max(1, self.tokens)


@dataclass(frozen=True)
class Statistics:
    schemes: list[str]
    projections: list[str]
    layers: dict[int, LayerStatistics]
    fingerprint: str
    text: str
    harm: str = "forward"  # where sensitivities come from

    @property
    def thinned(self) -> bool:
        """Was it measured what leaving experts out does?"""
        return all(layer.thinning is not None for layer in self.layers.values())

    @property
    def narrowed(self) -> bool:
        """Was it measured what thinner experts do?"""
        return all(layer.narrowing is not None for layer in self.layers.values())

    def unreached(self) -> list[tuple[int, int]]:
        """(layer, expert) pairs that no calibration token chose."""
        return [(index, int(e)) for index, layer in self.layers.items() for e in (layer.counts == 0).nonzero()]

    def coverage(self, width: int) -> list[dict]:
        """Per layer: least, median and most tokens of an expert, and how many experts are unreached or thinly covered."""
        rows = []
        for index, layer in self.layers.items():
            counts = layer.counts.double()
            rows.append({"layer": index, "tokens": layer.tokens, "least": int(counts.min()), "median": int(counts.median()),
                         "most": int(counts.max()), "unreached": int((counts == 0).sum()),
                         "thin": int((counts < THIN * width).sum())})  # fmt: skip
        return rows

    def predicted_harm(self) -> dict[int, torch.Tensor]:
        """Layer -> [E, P, C] predicted KL in nats per token."""
        return {index: layer.harm * layer.nats * (1.0 if layer.importance is None else layer.importance[:, None, None])
                for index, layer in self.layers.items()}  # fmt: skip

    def predicted_narrowing(self) -> dict[int, Narrowing]:
        """Layer -> the same of thinner experts, in predicted KL in nats per token."""
        found = {}
        for index, layer in self.layers.items():
            assert layer.narrowing is not None
            nats = torch.ones(len(layer.counts)) * layer.nats * (1.0 if layer.importance is None else layer.importance)
            one = layer.narrowing
            found[index] = Narrowing(one.widths, one.error * nats[:, None], one.harm * nats[:, None, None, None])
        return found

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for index, layer in self.layers.items():
            for name in ("counts", "gate_sum", "gate_square", "harm"):
                tensors[f"{index}.{name}"] = getattr(layer, name)
            if layer.importance is not None:
                tensors[f"{index}.importance"] = layer.importance
            for kind, found in (("thinning", layer.thinning), ("narrowing", layer.narrowing)):
                if found is not None:
                    tensors |= {f"{index}.{kind}.{name}": tensor for name, tensor in vars(found).items()}
        write_shard(folder / "statistics.safetensors", tensors)
        record = {"version": 1, "schemes": self.schemes, "projections": self.projections, "fingerprint": self.fingerprint,
                  "text": self.text, "harm": self.harm, "layers": {str(i): {"tokens": s.tokens, "sensitivity": s.sensitivity}
                                                for i, s in self.layers.items()}}  # fmt: skip
        write_text(folder / "statistics.json", json.dumps(record, indent=1))

    @staticmethod
    def load(folder: Path) -> Statistics:
        path = folder / "statistics.json"
        if not path.exists():
            raise UserError(
                f"No statistics in {folder}",
                expected="statistics.json",
                remedy="make them with `moecompress calibrate`",
            )
        record = json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(folder / "statistics.safetensors")
        layers = {
            int(index): LayerStatistics(
                tensors[f"{index}.counts"], tensors[f"{index}.gate_sum"], tensors[f"{index}.gate_square"],
                tensors[f"{index}.harm"], values["tokens"], values["sensitivity"],
                tensors.get(f"{index}.importance"), thinning_of(tensors, f"{index}."), narrowing_of(tensors, f"{index}."),
            )
            for index, values in record["layers"].items()
        }  # fmt: skip
        return Statistics(record["schemes"], record["projections"], layers, record["fingerprint"], record["text"],
                          record.get("harm", "forward"))  # fmt: skip


def thinning_of(tensors: Mapping[str, torch.Tensor], prefix: str = "") -> Thinning | None:
    """From the tensors whose names begin with ``prefix`` and "thinning."; None where some are missing: nothing, or not all ways, was
    measured."""
    found = _below(tensors, f"{prefix}thinning.")
    return Thinning(**found) if found.keys() == {field.name for field in fields(Thinning)} else None


def narrowing_of(tensors: Mapping[str, torch.Tensor], prefix: str = "") -> Narrowing | None:
    """The same for "narrowing."."""
    found = _below(tensors, f"{prefix}narrowing.")
    return Narrowing(**found) if found else None


def _below(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
