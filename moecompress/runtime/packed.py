"""Modules that compute on packed weights: the experts of a layer, a single linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from moecompress.errors import UserError
from moecompress.kernels import triton as gpu
from moecompress.model.experts import DOWN, GATE, UP, ExpertsLayout, activate, layout_of
from moecompress.pack.nested import BASE
from moecompress.pack.scheme import NESTED, Scheme
from moecompress.runtime.bank import IntegerBank, NestedIntegers, SharedBasis, SplitIntegers, make_bank, turn, turn_back
from moecompress.runtime.dispatch import by_expert, crowded, through


class PackedExperts(nn.Module):
    """The routed experts of one layer: for each projection, one bank a scheme and the list of experts in it.

    ``contents``: projection -> scheme name -> number of experts. Which experts is data: the buffer ``<bank>.experts``.
    ``seed``: of the rotation, one for the whole model, so that gate and up of all experts share the rotated input.
    ``load_bits``: of nested integers (None: all). Where the banks hold fewer matrices than there are experts, the buffers
    ``into`` and ``share`` [E] say whose matrices serve the others (-1: nobody's) and by what their output is multiplied.
    Matrices of an expert that is left with fewer neurons are in banks of their own: of gate and up they fill the first places of
    what enters down, and of down they read these.
    """

    def __init__(self, layout: ExpertsLayout, contents: dict[str, dict[str, int]], dtype: torch.dtype, seed: int = 0,
                 load_bits: int | None = None):  # fmt: skip
        super().__init__()
        self.layout, self.contents, self.seed = layout, contents, seed
        for projection, schemes in contents.items():
            banks = nn.ModuleDict()
            for name, count in schemes.items():
                scheme = Scheme.parse(name)
                if scheme.width >= layout.width:
                    raise UserError(f"config.json tells of a bank {name} of experts with {scheme.width} neurons left",
                                    expected=f"fewer than {layout.width}", remedy="copy or compress the folder again")  # fmt: skip
                bank = make_bank(scheme, count, *layout.shape(projection, scheme.width), dtype, seed, load_bits)
                bank.register_buffer("experts", torch.empty(count, dtype=torch.int32))
                banks[name] = bank
            self.add_module(f"{projection}_banks", banks)
        self.aliased = any(sum(schemes.values()) < layout.experts for schemes in contents.values())
        if self.aliased:
            self.register_buffer("into", torch.empty(layout.experts, dtype=torch.int32))
            self.register_buffer("share", torch.empty(layout.experts, dtype=torch.float32))
        self._slots: dict[str, torch.Tensor] = {}

    def banks(self, projection: str) -> nn.ModuleDict:
        return self.get_submodule(f"{projection}_banks")

    def check(self, name: str) -> None:
        """UserError unless the banks of each projection hold every expert exactly once, or the others are served by one that
        they hold; in tensors that their formats allow. ``name``: of this module."""
        whole = own = torch.arange(self.layout.experts, dtype=torch.int32)
        if self.aliased:
            into = self.into.cpu()
            own = whole[into == whole]
            if not torch.isin(into, torch.cat([own, own.new_tensor([-1])])).all() or not self.share.isfinite().all():
                raise UserError(f"What {name}.into says of shared experts is damaged", expected="experts with matrices of their own, or -1",
                                got=into.tolist(), remedy="copy or compress the folder again")  # fmt: skip
        for projection in self.contents:
            listed = torch.cat([bank.experts for bank in self.banks(projection).values()]).sort().values.cpu()
            if not torch.equal(listed, own):
                raise UserError(f"The experts listed in {name}.{projection}_banks are damaged",
                                expected=f"each of {'those with matrices' if self.aliased else f'0 to {self.layout.experts - 1}'} once",
                                got=listed.tolist(),
                                remedy="copy or compress the folder again")  # fmt: skip
            for bank in self.banks(projection).values():
                bank.check()
        widths = {projection: self.widths(projection) for projection in self.contents}
        if any(found != widths[DOWN] for found in widths.values()):
            raise UserError(f"The banks of {name} do not say how many neurons its experts have", expected="experts with the same number in gate, "
                            "up and down", got=str(widths), remedy="copy or compress the folder again")  # fmt: skip

    def widths(self, projection: str) -> dict[int, int]:
        """Expert -> how many neurons it is left with, for those that have fewer; as the banks of a projection have it."""
        return {expert: width for name, bank in self.banks(projection).items() if (width := Scheme.parse(name).width)
                for expert in bank.experts.tolist()}  # fmt: skip

    def settle(self) -> None:
        """Once loaded: nested integers become ordinary ones, under the name of what the file has."""
        for projection in self.contents:
            banks = self.banks(projection)
            for name, bank in banks.items():
                if isinstance(bank, NestedIntegers):
                    banks[name] = bank.settled()
                    banks[name].register_buffer("experts", bank.experts)

    def has_nested(self) -> bool:
        """Whether the file has nested integers."""
        return any(Scheme.parse(name).code == NESTED for schemes in self.contents.values() for name in schemes)

    def nested(self) -> list[NestedIntegers | SplitIntegers]:
        """The banks that can compute on two of their bits."""
        every = (bank for projection in self.contents for bank in self.banks(projection).values())
        return [bank for bank in every if isinstance(bank, NestedIntegers | SplitIntegers)]

    def split(self) -> None:
        """Keep settled nested integers of more than two bits so that their two highest bits can be read alone."""
        self._exchange(lambda name, bank: SplitIntegers(bank) if type(bank) is IntegerBank and name != bank.scheme.name
                       and bank.scheme.bits > BASE and Scheme.parse(name).code == NESTED else None)  # fmt: skip

    def join(self) -> None:
        """The inverse."""
        self._exchange(lambda name, bank: bank.joined() if isinstance(bank, SplitIntegers) else None)

    def _exchange(self, change: Callable[[str, Any], nn.Module | None]) -> None:
        for projection in self.contents:
            banks = self.banks(projection)
            for name, bank in banks.items():
                if (new := change(name, bank)) is not None:
                    new.register_buffer("experts", bank.experts)
                    banks[name] = new

    @contextmanager
    def few_bits(self) -> Iterator[None]:
        """Inside, nested integers compute on their two highest bits."""
        banks = self.nested()
        for bank in banks:
            bank.few = True
        try:
            yield
        finally:
            for bank in banks:
                bank.few = False

    def slot_table(self, projection: str, name: str, device: torch.device) -> torch.Tensor:
        """int32 [E + 1]: where in the bank an expert is, −1 if elsewhere; the last entry serves routing sentinels."""
        key = f"{projection}/{name}"
        if key not in self._slots or self._slots[key].device != device:
            experts = self.banks(projection)[name].experts.long()
            table = torch.full((self.layout.experts + 1,), -1, dtype=torch.int32, device=device)
            table[experts] = torch.arange(len(experts), dtype=torch.int32, device=device)
            self._slots[key] = table
        return self._slots[key]

    def project(self, projection: str, x: torch.Tensor, expert: torch.Tensor, turned: torch.Tensor | None = None,
                reduced: dict[str, torch.Tensor] | None = None) -> torch.Tensor:  # fmt: skip
        """x [S, in], expert [S] -> [S, out], each row by its expert's matrix, with zeros behind what a thinner expert gives.
        ``turned``: x rotated, where any bank whose matrices read all of it turns. ``reduced``: of `reduced` for the T tokens of x,
        each of which has S / T rows."""
        total = None
        for width, banks in self._by_width(projection).items():
            if width and projection == DOWN:  # a row of another expert is multiplied with nothing
                some = x[:, :width].contiguous()
                y = self._sum(projection, banks, some, expert, self._turned(banks, some), {})
            else:
                y = self._sum(projection, banks, x, expert, turned, reduced or {})
            if width and projection != DOWN:
                y = pad(y, (0, self.layout.width - width))
            total = y if total is None else total + y
        assert total is not None
        return total

    def _sum(self, projection: str, banks: dict[str, Any], x: torch.Tensor, expert: torch.Tensor, turned: torch.Tensor | None,
             reduced: dict[str, torch.Tensor]) -> torch.Tensor:  # fmt: skip
        """The same for some of the banks, all of one shape."""
        straight = back = None
        for name, bank in banks.items():
            slots = self.slot_table(projection, name, x.device)[expert]
            if name in reduced:
                part = bank.of_reduced(reduced[name].repeat_interleave(len(x) // len(reduced[name]), dim=0), slots)
            else:
                part = bank.product(turned if bank.turns else x, slots)
            if bank.turns:
                back = part if back is None else back + part
            else:
                straight = part if straight is None else straight + part
        if back is None:
            assert straight is not None
            return straight
        y = turn_back(back, self.seed).to(x.dtype)  # once for all banks: each left the others' rows at zero
        return y if straight is None else y + straight

    def _by_width(self, projection: str) -> dict[int, dict[str, Any]]:
        """Neurons that experts are left with (0: all) -> the banks of such experts."""
        found: dict[int, dict[str, Any]] = {}
        for name, bank in self.banks(projection).items():
            found.setdefault(bank.scheme.width, {})[name] = bank
        return found

    def _turned(self, banks: dict[str, Any], x: torch.Tensor) -> torch.Tensor | None:
        return turn(x, self.seed) if any(bank.turns for bank in banks.values()) else None

    def turned(self, projection: str, x: torch.Tensor) -> torch.Tensor | None:
        """x rotated if any bank of the projection wants that, of down: any of experts that have all neurons."""
        banks = self._by_width(projection)
        wanted = banks.get(0, {}) if projection == DOWN else {name: bank for some in banks.values() for name, bank in some.items()}
        return self._turned(wanted, x)

    def reduced(self, projection: str, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """Bank with a shared basis -> B x of every token, whatever its experts: hidden [T, d] -> [T, q]. Nothing where x needs
        a gradient."""
        if torch.is_grad_enabled() and hidden.requires_grad:
            return {}
        return {name: bank.reduced(hidden) for name, bank in self.banks(projection).items() if isinstance(bank, SharedBasis)}

    def dequantized(self, projection: str, dtype: torch.dtype) -> torch.Tensor:
        """[E, out, in]"""
        rows, cols = self.layout.shape(projection)
        weights = torch.zeros(self.layout.experts, rows, cols, dtype=dtype)
        for bank in self.banks(projection).values():
            weights[bank.experts.long(), : bank.rows, : bank.cols] = bank.dequantized(dtype)
        if self.aliased:
            into = self.into.long()
            weights = weights[torch.where(into < 0, into.max(), into)]  # any, times zero
            if projection == DOWN:
                weights = weights * self.share[:, None, None].to(dtype)
        return weights

    def served(self, chosen: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same [T, k] with experts that have no matrices replaced by those that serve for them; E: nobody does."""
        known = chosen.clamp(max=self.layout.experts - 1)
        into = self.into.long()[known]
        nobody = (chosen >= self.layout.experts) | (into < 0)
        return into.masked_fill(nobody, self.layout.experts), (weights * self.share[known].to(weights.dtype)).masked_fill(nobody, 0)

    def forward_for(self, module: nn.Module, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
                    ) -> torch.Tensor:  # fmt: skip
        """What the experts module computes: hidden [T, d], chosen [T, k], weights [T, k] -> [T, d].

        ``module`` is the family's own experts module: its activation, biases and norms are used as they are. Of a thinner expert
        what the activation makes of the places that it does not fill is not read.
        """
        tokens, top_k = chosen.shape
        if self.aliased:
            chosen, weights = self.served(chosen, weights)
        if crowded(chosen, self.layout.experts) and not gpu.ready(chosen.device):  # there one launch takes all experts
            reduced = {projection: self.reduced(projection, hidden) for projection in self.layout.projections[:-1]}
            return by_expert(module, self.layout, partial(self._matmul, reduced), hidden, chosen, weights)
        expert = chosen.reshape(-1).clamp(max=self.layout.experts)
        x, turned = hidden.repeat_interleave(top_k, dim=0), None
        for projection in self.layout.projections[:-1]:
            if turned is None and (one := self.turned(projection, hidden)) is not None:  # each token once
                turned = one.repeat_interleave(top_k, dim=0)
        gate = self.project(GATE, x, expert, turned, self.reduced(GATE, hidden)) if self.layout.gated else None
        known = expert.clamp(max=self.layout.experts - 1)  # sentinels have weight zero; any bias will do
        inner = activate(module, self.layout, gate, self.project(UP, x, expert, turned, self.reduced(UP, hidden)), known).to(x.dtype)
        y = self.project(DOWN, inner, expert, self.turned(DOWN, inner))
        if getattr(module, "has_bias", False):
            y = y + module.down_proj_bias[known].to(y.dtype)
        if getattr(module, "has_post_expert_norm", False):
            y = module.post_expert_norm(y)
        y = y * weights.reshape(-1, 1)
        return y.view(tokens, top_k, -1).sum(dim=1).to(hidden.dtype)

    def scaled_for(self, module: nn.Module, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor,
                   scales: dict[str, torch.Tensor]) -> torch.Tensor:  # fmt: skip
        """The same with every token's inputs multiplied by ``scales``, projection -> [T, in]. Pairs of an expert that is not
        below E do not compute."""
        if self.aliased:
            chosen, weights = self.served(chosen, weights)
        if crowded(chosen, self.layout.experts) and not gpu.ready(chosen.device):
            return by_expert(module, self.layout, partial(self._matmul, {}), hidden, chosen, weights, scales)
        left = (chosen.reshape(-1) < self.layout.experts).nonzero().squeeze(1)  # [S]
        expert, token = chosen.reshape(-1)[left], left // chosen.shape[1]
        y = through(module, self.layout, lambda name, of, x, _: self.project(name, x, of, self.turned(name, x)), expert, hidden[token],
                    token, {name: scale[token] for name, scale in scales.items()})  # fmt: skip
        y = y * weights.reshape(-1, 1)[left]
        return y.new_zeros(hidden.shape).index_add_(0, token, y).to(hidden.dtype)

    def _matmul(self, reduced: dict[str, dict[str, torch.Tensor]], projection: str, expert: int, x: torch.Tensor, token: torch.Tensor
                ) -> torch.Tensor:  # fmt: skip
        for name, bank in self.banks(projection).items():
            slot = int(self.slot_table(projection, name, x.device)[expert])
            if slot >= 0:
                slots = torch.full((len(x),), slot, dtype=torch.int32, device=x.device)
                if name in reduced.get(projection, {}):
                    return bank.of_reduced(reduced[projection][name][token], slots)
                x = x[:, : bank.cols].contiguous()
                y = turn_back(bank.product(turn(x, self.seed), slots), self.seed).to(x.dtype) if bank.turns else bank.product(x, slots)
                return y if projection == DOWN or not bank.scheme.width else pad(y, (0, self.layout.width - bank.rows))
        raise AssertionError(f"expert {expert} is in no bank of {projection}")


class PackedLinear(nn.Module):
    """A linear layer on packed weights; keeps the bias of the layer it replaces."""

    def __init__(self, scheme: Scheme, rows: int, cols: int, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features = cols, rows
        self.packed = make_bank(scheme, 1, rows, cols, dtype)
        self.dtype = dtype
        self.bias = nn.Parameter(torch.empty(rows, dtype=dtype), requires_grad=False) if bias else None
        self._is_hf_initialized = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, self.in_features)
        y = self.packed.product(flat, torch.zeros(len(flat), dtype=torch.int32, device=x.device))
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    @property
    def weight(self) -> torch.Tensor:
        """Dequantized, for code that looks at it (never stored)."""
        return self.packed.dequantized(self.dtype if self.bias is None else self.bias.dtype)[0]

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.packed.scheme.name}"


def pack_experts_in_place(module: nn.Module, contents: dict[str, dict[str, int]], dtype: torch.dtype, seed: int,
                          load_bits: int | None = None) -> PackedExperts:  # fmt: skip
    """Turn an experts module into a packed one: its weight parameters go, banks come, everything else stays.

    The guard: a parameter under the name of a weight, with a shape that cannot match. A transformers without moecompress
    finds it in the checkpoint and refuses to load, instead of filling the experts with random numbers. It has three
    dimensions because some families transpose whatever comes under that name.
    """
    layout = layout_of(module)
    packed = PackedExperts(layout, contents, dtype, seed, load_bits)
    for name in layout.parameters:
        del module._parameters[name]
    module.down_proj = nn.Parameter(torch.zeros(1, 1, 1, dtype=torch.uint8), requires_grad=False)
    module.packed = packed
    module._is_hf_initialized = True  # transformers' initialisation of new modules would look for the weights that went
    return packed
