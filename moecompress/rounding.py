"""All experts of one layer: rounded chunk by chunk, measured, and put into the banks that take their module's place."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch

from moecompress.calibrate.bases import Users, layer_directions
from moecompress.calibrate.capture import Capture, route
from moecompress.calibrate.moments import ExpertMoments, chunk_size, entering_down, expert_moments
from moecompress.calibrate.observe import Calibration
from moecompress.calibrate.prediction import WATCHED, decoded, output_errors, sampled
from moecompress.calibrate.thinner import by_width, sorted_bias, widened
from moecompress.model.anatomy import MoELayer
from moecompress.model.experts import DOWN
from moecompress.model.memory import forget
from moecompress.model.walk import OpenModel
from moecompress.pack.scheme import DROPPED, SHARED_BASIS, VECTOR, Scheme
from moecompress.quantize import cross, vector
from moecompress.quantize.encode import Encoded, Inputs, Settings, encode, study
from moecompress.runtime.bank import PackedBank, make_bank
from moecompress.runtime.packed import pack_experts_in_place


@dataclass(frozen=True)
class Shared:
    """Whose matrices serve each of a layer's E experts. into: int64 [E], -1: nobody's; factor: float32 [E] of their output.
    merged: are they refitted to serve all?"""

    into: torch.Tensor
    factor: torch.Tensor
    merged: bool = False

    def apply(self, capture: Capture) -> Capture:
        """What the experts that are left are given; E: nobody is."""
        into = torch.where(self.into < 0, len(self.into), self.into)
        weights = capture.weights * self.factor[capture.chosen].to(capture.weights.dtype)
        return replace(capture, chosen=into[capture.chosen], weights=weights)


class ExpertRounding:
    """The experts of a layer on their way into banks. Banks are as large as they will be from the start; what was rounded is
    taken from the module chunk by chunk."""

    def __init__(self, opened: OpenModel, moe: MoELayer, capture: Capture, schemes: dict[str, list[Scheme]], calibration: Calibration,
                 settings: Settings, numbers: list[int], before: torch.Tensor | None = None):  # fmt: skip
        """schemes: by projection, of each expert. numbers: of the experts in the input, for the record. before: [T, d], what the
        experts are given in the original model, where they are rounded towards what they gave there (quantize/cross.py)."""
        self.opened, self.moe, self.layout, self.capture = opened, moe, moe.layout, capture
        self.schemes, self.calibration, self.settings, self.numbers, self.before = schemes, calibration, settings, numbers, before
        self.experts: Any = opened.model.get_submodule(moe.module)
        #: (projection, name of a scheme) -> the experts in that bank, in its order
        self.members: dict[tuple[str, str], list[int]] = defaultdict(list)
        for projection in self.layout.projections:
            for expert, scheme in enumerate(schemes[projection]):
                if scheme != DROPPED:
                    self.members[projection, scheme.name].append(expert)
        self.banks = {key: self._empty(*key, len(found)) for key, found in self.members.items()}
        self.widths = {e: scheme.width for e, scheme in enumerate(schemes[self.layout.projections[0]]) if scheme.width}
        #: thinner expert -> the neurons that it is left with
        self.neurons: dict[int, torch.Tensor] = {}
        self.routed = route(capture, self.layout.experts)
        self.watched = {e for e in sampled(self.routed, WATCHED) if schemes[self.layout.projections[0]][e] != DROPPED}
        self.chunk = chunk_size(self.layout, calibration.workspace_bytes, before is not None)
        self.books = self._books() | layer_directions(self.experts, self.layout, capture, calibration.hessian, calibration.shrink,
                                                      self.chunk, self._bases(), settings.damping)  # fmt: skip
        self.record: dict[str, Any] = {"errors": {}, "measured": {}, "archived": {}, "fallbacks": []}

    def round_all(self) -> None:
        for moments in self._moments(self.before):
            if moments.keep is not None:
                self.neurons |= dict(zip(moments.experts, moments.keep, strict=True))
            self._measure(moments.experts, self._round(moments))
            for name in self.layout.parameters:
                forget(self.experts._parameters[name][moments.experts[0] : moments.experts[-1] + 1])

    def pack(self, sliced: dict[str, torch.Tensor], shared: Shared | None) -> dict[str, torch.Tensor]:
        """Swap the module's weights for the banks; returns their tensors by name. ``sliced`` gets biases that moved with the
        neurons of thinner experts."""
        self._sort_bias(sliced, shared)
        module = self.moe.module
        contents: dict[str, dict[str, int]] = {p: {} for p in self.layout.projections}
        for (projection, name), found in sorted(self.members.items()):
            contents[projection][name] = len(found)
        packed = pack_experts_in_place(self.experts, contents, self.opened.stored_dtype, self.settings.seed)
        tensors = {f"{module}.down_proj": self.experts.down_proj.detach()}
        if shared is not None:
            packed.into, packed.share = shared.into.to(torch.int32), shared.factor.float()
            tensors |= {f"{module}.packed.into": packed.into, f"{module}.packed.share": packed.share}
        for (projection, name), bank in self.banks.items():
            bank.register_buffer("experts", torch.tensor(self.members[projection, name], dtype=torch.int32))
            packed.banks(projection)[name] = bank
            where = f"{module}.packed.{projection}_banks.{name}"
            tensors.update({f"{where}.{key}": value for key, value in bank.named_buffers()})
        self.record |= {"contents": {module: contents}, "schemes": {
            self._name(e, p): scheme.name for p in self.layout.projections for e, scheme in enumerate(self.schemes[p])}}  # fmt: skip
        return tensors

    def _moments(self, original: torch.Tensor | None = None):
        """Of all experts, those that keep the same number of neurons together."""
        c = self.calibration
        every = expert_moments(self.experts, self.layout, self.capture, c.hessian, c.shrink, self.chunk, original=original)
        return by_width(every, self.widths, self.settings.damping, self.moe.module, self.settings.allow_fallback)

    def _round(self, moments: ExpertMoments) -> dict[str, torch.Tensor]:
        """Round a chunk's experts into their banks; returns what they were rounded towards."""
        names = [f"{self.moe.module}.{self.numbers[e]}" for e in moments.experts]
        used = [Scheme.parse(name) for name in {name for _, name in self.members}]
        inputs: dict[str, Inputs] = {}
        targets = dict(moments.weights)
        for projection in self.layout.projections:
            source = moments.source(projection)
            if self.before is not None and projection == DOWN:
                moments = self._behind_rounded(moments, targets, self.before)
            if source not in inputs:
                inputs[source] = study(moments.hessians[source], names, self.settings, used)
                if self.before is not None:
                    mend = cross.mending(moments.hessians[source], moments.drift[source], self.settings.damping)
            if self.before is not None:
                own = moments.weights[projection]
                targets[projection] = cross.target(own, mend if projection == DOWN else own @ mend)
            self._fill(projection, moments, inputs[source], targets[projection])
        fallen = {i for one in inputs.values() for i in one.fallen.nonzero().flatten().tolist() if not self._gone(moments.experts[i])}
        self.record["fallbacks"] += sorted(names[i] for i in fallen)
        return targets

    def _gone(self, expert: int) -> bool:
        return self.schemes[self.layout.projections[0]][expert] == DROPPED

    def _behind_rounded(self, moments: ExpertMoments, targets: dict[str, torch.Tensor], before: torch.Tensor) -> ExpertMoments:
        """The moments of what enters down once gate and up are rounded."""
        new: dict[str, list[torch.Tensor]] = {p: [] for p in self.layout.projections if p != DOWN}
        for i, expert in enumerate(moments.experts):
            one = {p: targets[p][i] if self._gone(expert) else self._rounded(expert, p) for p in new}
            if moments.keep is not None:
                one = widened(one, moments.keep[i], self.layout)
            for p, matrix in one.items():
                new[p].append(matrix)
        return entering_down(self.experts, self.layout, self.capture, moments, {p: torch.stack(found) for p, found in new.items()}, before,
                             self.calibration.hessian, self.calibration.shrink)  # fmt: skip

    def _fill(self, projection: str, moments: ExpertMoments, inputs: Inputs, target: torch.Tensor) -> None:
        """Round one projection of a chunk's experts, each in its scheme; of matrices that keep 16 bits ``target`` becomes what they are."""
        chosen: dict[Scheme, list[int]] = defaultdict(list)
        for position, expert in enumerate(moments.experts):
            if not self._gone(expert):
                chosen[self.schemes[projection][expert]].append(position)
        for scheme, positions in chosen.items():
            experts = [moments.experts[i] for i in positions]
            bank, members = self.banks[projection, scheme.name], self.members[projection, scheme.name]
            slots = [members.index(e) for e in experts]
            if scheme.bits == 16:
                target[positions] = moments.weights[projection][positions]
                bank.weight[slots] = target[positions].to(bank.weight.dtype)
                continue
            encoded = encode(target[positions], inputs.take(positions), scheme, self.settings, self.books.get((projection, scheme.name)))
            for key, value in encoded.bank.tensors().items():
                if key in bank.shared:
                    getattr(bank, key).copy_(value)  # the same for every chunk
                else:
                    _assignable(getattr(bank, key))[slots] = _assignable(value)
            self._note(projection, scheme, experts, encoded)

    def _note(self, projection: str, scheme: Scheme, experts: list[int], encoded: Encoded) -> None:
        if encoded.archived_bits is not None:
            self.record["archived"][f"{self.moe.module}.{projection}"] = {"scheme": scheme.name, "bits": encoded.archived_bits}
        errors = zip(experts, encoded.error, strict=True)
        self.record["errors"].update({self._name(e, projection): float(error) for e, error in errors})

    def _measure(self, experts: list[int], targets: dict[str, torch.Tensor]) -> None:
        """The output errors of those experts of a chunk that are watched."""
        for expert in self.watched.intersection(experts):
            weights = {p: targets[p][experts.index(expert)] for p in self.layout.projections}
            new = {p: self._rounded(expert, p) for p in self.layout.projections}
            if expert in self.neurons:
                weights, new = (widened(each, self.neurons[expert], self.layout) for each in (weights, new))
            lost = output_errors(self.experts, self.layout, expert, self.capture.hidden, self.routed, weights, new)
            self.record["measured"].update({self._name(expert, p): error for p, error in lost.items()})

    def _rounded(self, expert: int, projection: str) -> torch.Tensor:
        scheme = self.schemes[projection][expert]
        bank, slot = self.banks[projection, scheme.name], self.members[projection, scheme.name].index(expert)
        one = {name: tensor if name in bank.shared else tensor[slot : slot + 1] for name, tensor in bank.named_buffers()}
        return decoded(scheme, one, self.layout.shape(projection, scheme.width), self.settings.seed)

    def _sort_bias(self, sliced: dict[str, torch.Tensor], shared: Shared | None) -> None:
        if not self.neurons or not getattr(self.experts, "has_bias", False):
            return
        served = {} if shared is None else {e: self.neurons[by] for e, by in enumerate(shared.into.tolist()) if by in self.neurons}
        bias = "gate_up_proj_bias" if self.layout.gated else "up_proj_bias"
        own, where = getattr(self.experts, bias).data, f"{self.moe.module}.{bias}"
        sliced[where] = sorted_bias(sliced.get(where, own), self.layout, self.neurons | served)
        own.copy_(sorted_bias(own, self.layout, self.neurons | served))

    def _name(self, expert: int, projection: str) -> str:
        return f"{self.moe.module}.{self.numbers[expert]}.{projection}"

    def _empty(self, projection: str, name: str, count: int) -> PackedBank:
        scheme = Scheme.parse(name)
        return make_bank(scheme, count, *self.layout.shape(projection, scheme.width), self.opened.stored_dtype, self.settings.seed)

    def _books(self) -> dict[tuple[str, str], torch.Tensor]:
        """A book for every bank of vectors, of all experts in it; where there are any, moments are made twice."""
        users = {(p, scheme): len(found) for (p, name), found in self.members.items() if (scheme := Scheme.parse(name)).code == VECTOR}
        if not users:
            return {}
        samples: dict[tuple[str, Scheme], list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        for moments in self._moments():
            for (projection, scheme), count in users.items():
                here = [i for i, e in enumerate(moments.experts) if self.schemes[projection][e] == scheme]
                if here:
                    diagonal = moments.hessians[moments.source(projection)][here].diagonal(dim1=-2, dim2=-1)
                    share = -(-vector.size_of_sample(scheme.bits) * len(here) // count)
                    samples[projection, scheme].append(vector.sample(moments.weights[projection][here], diagonal, scheme.bits, share))
        books = {}
        for (projection, scheme), parts in sorted(samples.items(), key=lambda item: (item[0][0], item[0][1].name)):
            mixed = torch.randperm(sum(len(values) for values, _ in parts), generator=torch.Generator().manual_seed(0))
            values, importance = (torch.cat(column)[mixed] for column in zip(*parts, strict=True))
            books[projection, scheme.name] = vector.train(values, importance, scheme.bits)
        return books

    def _bases(self) -> dict[tuple[str, str], Users]:
        """The banks of matrices that share a basis."""
        schemes = {key: Scheme.parse(key[1]) for key in self.members}
        return {(p, name): Users(p, self.members[p, name], scheme.rank(self.layout.shape(p)[1]))
                for (p, name), scheme in schemes.items() if scheme.code == SHARED_BASIS}  # fmt: skip


def _assignable(tensor: torch.Tensor) -> torch.Tensor:
    """torch cannot assign to chosen rows of uint16."""
    return tensor.view(torch.int16) if tensor.dtype == torch.uint16 else tensor
