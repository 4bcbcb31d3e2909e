"""What a user may ask for: the recipe, its defaults, and how a YAML file becomes one.

Unknown keys are refused, and every complaint names the file, the line and the column.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from moecompress.errors import UserError

_UNITS = {"B": 1} | {
    f"{letter}{suffix}": base ** (power + 1)
    for power, letter in enumerate("KMGT")
    for suffix, base in (("B", 1000), ("iB", 1024))
}


def parse_size(size: str | int) -> int:
    """Bytes of ``"14GB"`` (decimal), ``"14GiB"`` (binary), ``"123B"`` or a plain number. UserError for the rest."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    units = {unit.lower(): factor for unit, factor in _UNITS.items()} | {"": 1}
    if isinstance(size, bool) or match is None or match[2].lower() not in units:
        raise UserError(
            f"not a size: {size!r}",
            expected="a number of bytes, or a number with " + ", ".join(_UNITS),
            remedy='write for example "14GB" (14,000,000,000 bytes) or "14GiB" (14 * 2**30 bytes)',
        )
    number = round(Fraction(match[1]) * units[match[2].lower()])
    if number <= 0:
        raise UserError(f"a size must be at least one byte, got {size!r}")
    return number


def _size_value(value: object) -> object:
    if value is None:
        return None
    try:
        return parse_size(value)  # type: ignore[arg-type]
    except UserError as error:
        raise ValueError(str(error).replace("\n", ";")) from None


def _no_bool(value: object) -> object:
    # YAML reads "yes" and "on" as true, and pydantic reads true as 1.
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    return value


def _width(value: int) -> int:
    if value not in (4, 8, 16):
        raise ValueError("should be 4, 8 or 16 bits")
    return value


Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
Natural = Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(ge=0)]
#: bits a weight of the trellis code (pack/trellis.py)
TRELLIS_RATES = (0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4)
#: bits a weight for the words of the dictionary code (pack/dictionary.py)
DICTIONARY_RATES = (0.7, 0.8, 0.9, 1, 1.1, 1.2)
#: bits a weight of vector codes (pack/vector.py)
VECTOR_RATES = (1, 1.5, 2, 3)
#: shares of weights that integers may keep at 16 bits (pack/outliers.py)
OUTLIER_SHARES = (0.005, 0.01, 0.02)
Width = Annotated[int, BeforeValidator(_no_bool), AfterValidator(_width)]


def low_rank_bits(shares: tuple[int, int]) -> float:
    """Bits a weight of a square matrix as factors of that rank and kept columns, both in thousandths (pack/low_rank.py)."""
    return 16 * (2 * shares[0] + shares[1]) / 1000


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, value: Any) -> Any:
        # A section whose lines are all commented out reads as null.
        return {} if value is None else value


class TargetRecipe(_Section):
    """How large the result may be: ``bits`` or ``size``, or neither (then the command line must say)."""

    #: stored bits per routed-expert weight: codes, scales and padding counted, divided by the weights of the original
    #: (3 bits with half of the experts dropped are 6 for each weight that is left)
    bits: Annotated[float, BeforeValidator(_no_bool), Field(gt=0, le=16)] | None = None
    #: bytes of all weight files together, e.g. "14GB" or "14GiB"; after validation a number of bytes
    size: Annotated[int | None, BeforeValidator(_size_value)] = None

    @model_validator(mode="after")
    def _one_of_two(self) -> TargetRecipe:
        if self.bits is not None and self.size is not None:
            raise ValueError("give either bits or size, not both")
        return self


class CalibrationRecipe(_Section):
    """The text that the statistics come from."""

    #: "builtin", a .txt/.jsonl/.parquet file, a folder of them, or the id of a data set on the Hugging Face hub
    text: Annotated[str, Field(min_length=1)] = "builtin"
    #: calibration sequences, ``heldout`` included
    sequences: Count = 128
    #: tokens per sequence
    length: Annotated[int, BeforeValidator(_no_bool), Field(ge=2)] = 512
    #: how many of the sequences are kept out of the statistics, to compare plans on
    heldout: Count = 16
    seed: Natural = 0

    @model_validator(mode="after")
    def _some_left(self) -> CalibrationRecipe:
        if self.heldout >= self.sequences:
            raise ValueError(f"heldout ({self.heldout}) must be smaller than sequences ({self.sequences})")
        return self


_GROUPED = ("int", "nested", "shared-basis")


def _thousandths(value: float) -> float:
    if not 0 <= value < 1 or abs(1000 * value - round(1000 * value)) > 1e-9:
        raise ValueError("should be a share below 1, in thousandths")
    return value


def _bits_that_follow(value: dict[str, Any]) -> float:
    """Bits of a low-rank candidate as the file has it; 0 where that makes no sense, which is said elsewhere."""
    shares = value.get("rank", 0), value.get("sparse", 0)
    if not all(isinstance(share, int | float) and 0 <= share < 1 for share in shares):
        return 0
    return low_rank_bits((round(1000 * shares[0]), round(1000 * shares[1])))


class CandidateRecipe(_Section):
    """One way to store an expert matrix (see pack/SPEC.md). At 16 bits nothing is quantized."""

    code: Literal["int", "nested", "trellis", "vector", "ternary", "sign", "dictionary", "low-rank", "shared-basis"] = "int"
    #: int: 2, 3, 4, 8; nested: 3 or 4, and any fewer down to 2 when loading; trellis: 0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4;
    #: vector: 1, 1.5, 2, 3; shared-basis: 2, 3, 4, 8 for the coefficients; dictionary: 0.7, 0.8, 0.9, 1, 1.1 or 1.2 for its
    #: words; not given for ternary (1.6), sign (1) and low-rank (what follows from rank and sparse for a square matrix)
    bits: Annotated[float, BeforeValidator(_no_bool)]
    #: int, nested and shared-basis: columns that share a scale; 0: the whole row
    group: Annotated[int, BeforeValidator(_no_bool)] = 64
    #: int and shared-basis: without zero points
    symmetric: bool = True
    #: int of 2, 3 or 4 bits: share of the weights, the most sensitive of every row, that keep 16 bits; 0.005, 0.01 or 0.02
    outliers: Annotated[float, BeforeValidator(_no_bool)] = 0.0
    #: low-rank: rank of the factors, as a share of the smaller side of a matrix; shared-basis: of the basis, of the columns
    rank: Annotated[float, BeforeValidator(_no_bool), AfterValidator(_thousandths)] = 0.0
    #: low-rank: share of the columns that are kept whole beside the factors
    sparse: Annotated[float, BeforeValidator(_no_bool), AfterValidator(_thousandths)] = 0.0

    @property
    def shares(self) -> tuple[int, int]:
        """Of low rank and shared bases: rank and kept columns in thousandths."""
        return round(1000 * self.rank), round(1000 * self.sparse)

    @field_validator("bits")
    @classmethod
    def _known_bits(cls, value: float, info: ValidationInfo) -> float:
        if info.data.get("code") == "low-rank":
            return value  # compared with rank and sparse below
        special = {"nested": (3, 4), "shared-basis": (2, 3, 4, 8), "trellis": TRELLIS_RATES, "vector": VECTOR_RATES, "dictionary": DICTIONARY_RATES,
                   "ternary": (1.6,), "sign": (1,)}  # fmt: skip
        known = special.get(info.data.get("code", "int"), (2, 3, 4, 8, 16))
        if value not in known:
            *others, last = (f"{bits:g}" for bits in known)
            raise ValueError("should be " + (f"{', '.join(others)} or {last}" if others else last))
        return value

    @field_validator("group")
    @classmethod
    def _known_group(cls, value: int) -> int:
        if value not in (0, 32, 64, 128):
            raise ValueError("should be 32, 64 or 128, or 0 for one scale per row")
        return value

    @field_validator("outliers")
    @classmethod
    def _known_share(cls, value: float) -> float:
        if value not in (0, *OUTLIER_SHARES):
            raise ValueError("should be 0.005, 0.01 or 0.02, or 0 for none")
        return value

    @model_validator(mode="before")
    @classmethod
    def _what_follows(cls, value: Any) -> Any:
        """Only integers have groups, and some codes only one number of bits."""
        if not isinstance(value, dict):
            return value
        fixed = {"ternary": 1.6, "sign": 1, "low-rank": _bits_that_follow(value)}.get(value.get("code", "int"))
        if fixed is not None:
            value = {"bits": fixed} | value
        grouped = value.get("code", "int") in _GROUPED and value.get("bits") not in (16, "16")
        return value if grouped else {"group": 0} | value

    @model_validator(mode="after")
    def _only_integers_have_groups(self) -> CandidateRecipe:
        if (self.code not in _GROUPED or self.bits == 16) and (self.group != 0 or not self.symmetric):
            raise ValueError("only a candidate of 2, 3, 4 or 8-bit integers has group and symmetric")
        if self.code == "nested" and not self.symmetric:
            raise ValueError("a nested candidate has no zeros; leave out symmetric")
        if self.outliers and (self.code != "int" or self.bits > 4):
            raise ValueError("only a candidate of 2, 3 or 4-bit integers has outliers")
        return self

    @model_validator(mode="after")
    def _only_low_rank_has_shares(self) -> CandidateRecipe:
        if self.code == "shared-basis":
            if self.rank == 0 or self.sparse:
                raise ValueError("a candidate with shared bases needs a rank above 0, and has no sparse")
            return self
        if self.code != "low-rank" and self.shares != (0, 0):
            raise ValueError("only a candidate {code: low-rank} has rank and sparse, and {code: shared-basis} rank")
        if self.code == "low-rank" and (self.rank == 0 or low_rank_bits(self.shares) >= 16):
            raise ValueError("a low-rank candidate needs a rank above 0, and twice the rank and sparse together below 1: "
                             "more would make a square matrix larger")  # fmt: skip
        if self.code == "low-rank" and self.bits != low_rank_bits(self.shares):
            raise ValueError("bits of a low-rank candidate follow from rank and sparse; leave them out")
        return self


_WIDE = (CandidateRecipe(bits=8, group=128), CandidateRecipe(bits=16))
#: What `AllocateRecipe.candidates` stands for where it is null.
TRELLIS_AND_WIDE = (*(CandidateRecipe(code="trellis", bits=bits, group=0) for bits in (0.5, 1, 1.5, 2, 2.5, 3, 4)), *_WIDE)
INTEGERS = (*(CandidateRecipe(bits=bits, group=64) for bits in (2, 3, 4)), *_WIDE)


class AllocateRecipe(_Section):
    """Which expert gets how many bits."""

    #: global: one budget over all layers; pmq: MC-MoE's program, one budget per layer; uniform: the same for all
    allocator: Literal["global", "pmq", "uniform"] = "global"
    solver: Literal["lagrangian", "milp"] = "lagrangian"
    #: where sensitivities come from: forward (a perturbed forward pass a layer) or gradient (squared gradients, of every
    #: expert; needs the whole model in memory)
    harm: Literal["forward", "gradient"] = "forward"
    #: what is decided together: every expert matrix alone, one projection of all experts of a layer, or a whole layer
    granularity: Literal["expert", "projection", "layer"] = "expert"
    #: null: the trellis's rates from half a bit to four, 8-bit integers and 16 bits; integers of 2, 3, 4 and 8 bits and 16 bits
    #: for allocator pmq, for rounding to nearest, and where the compiled trellis encoder is missing
    candidates: Annotated[tuple[CandidateRecipe, ...], Field(min_length=1)] | None = None
    #: the plan that the chosen one must beat on held-out text; if it does not, that one is used and the user is told
    compare: Literal["uniform", "none"] = "uniform"
    #: may experts be left out, so that the others have more bits? auto: where the target leaves less than 2.25 bits a weight.
    #: The plan with dropped experts must beat the one without on held-out text, unless compare is none
    drop: bool | Literal["auto"] = "auto"
    #: may each expert lose a quarter, half or three quarters of its neurons, so that the others have more bits? auto: where the
    #: target leaves less than 2.25 bits a weight, and measured as of drop. Only with granularity expert
    slim: bool | Literal["auto"] = "auto"
    #: stop when the result is further than this from the original: KL in nats a token, on held-out text (null: never)
    max_kl: Number | None = None
    #: pmq: exponents of the token share, of the mean routing weight and of the block error (arXiv:2410.06270)
    alpha: Number = 1.0
    beta: Number = 1.5
    gamma: Number = 1.0
    #: pmq: total bits per 8 experts of a layer (16: two bits on average); null: from the target
    layer_bits: Annotated[float, BeforeValidator(_no_bool), Field(gt=0, le=128)] | None = None

    @field_validator("candidates")
    @classmethod
    def _no_twins(cls, value: tuple[CandidateRecipe, ...] | None) -> tuple[CandidateRecipe, ...] | None:
        if value is not None and len(set(value)) != len(value):
            raise ValueError("the same candidate is listed twice")
        return value

    @model_validator(mode="after")
    def _pmq_moves_whole_experts(self) -> AllocateRecipe:
        if self.allocator == "pmq" and self.granularity != "expert":
            raise ValueError("allocator pmq decides per expert; leave out granularity")
        if self.allocator != "global" and self.drop is True:
            raise ValueError("only allocator global decides how many experts a layer keeps; leave out drop")
        if self.slim is True and (self.allocator != "global" or self.granularity != "expert"):
            raise ValueError("only allocator global with granularity expert decides how wide experts are; leave out slim")
        return self


class QuantizeRecipe(_Section):
    """How codes are chosen, and what happens to the weights outside the routed experts."""

    method: Literal["gptq", "rtn"] = "gptq"
    #: token weight in the Hessian: 1, the combine weight g, or its square (the squared error of the layer's output)
    hessian: Literal["1", "g", "g2"] = "g2"
    #: multiple of the mean diagonal added to the Hessian's diagonal
    damping: Number = 0.01
    order: Literal["activation", "natural"] = "activation"
    #: coordinate-descent sweeps after the first pass
    refine: Natural = 2
    #: strength of the pull of an expert's Hessian towards its layer's, in units of the input width
    shrink: Number = 1.0
    #: quantize to nearest where calibration saw too few tokens, instead of stopping
    allow_fallback: bool = False
    #: what experts are rounded to. own: their weights; cross: weights that give on the compressed model's activations what the
    #: original's give on its own. The plan is built both ways, and cross must be better on held-out text, unless compare is none
    target: Literal["own", "cross"] = "own"
    #: the grid of ternary candidates: each row's own three values, BitNet's mean of magnitudes, or QMoE's {min, 0, max}
    ternary: Literal["lloyd", "absmean", "qmoe"] = "lloyd"
    attention_bits: Width = 8
    #: shared experts
    shared_bits: Width = 8
    #: feed-forward blocks of layers without experts
    dense_bits: Width = 8

    @field_validator("hessian", mode="before")
    @classmethod
    def _one_as_text(cls, value: object) -> object:
        return "1" if value == 1 and not isinstance(value, bool) else value


def _expert_name(value: str) -> str:
    expert_of(value)
    return value


def expert_of(name: str) -> tuple[int, int]:
    """(layer, expert) of ``"L03.E017"``."""
    found = re.fullmatch(r"L(\d+)\.E(\d+)", name)
    if found is None:
        raise ValueError(f"Not the name of an expert: {name!r}; write layer and expert, both from 0, e.g. L03.E017")
    return int(found[1]), int(found[2])


def _share_or_count(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("should be a share below 1, or a whole number of experts")
    return value


#: Experts that every layer keeps: a share below 1, or how many.
Keep = Annotated[float, BeforeValidator(_no_bool), Field(gt=0), AfterValidator(_share_or_count)]


class _Step(_Section):
    """One step of ``transform``. Every kind of step is a subclass with its own ``method`` names (`Step`)."""

    #: stop when the model after this step is further than this from the original: KL in nats a token, on held-out text.
    #: At 2 nats text is some seven times as surprising to it: what comes out of the later stages would be of no use.
    max_kl: Number | None = 2.0


class DropStep(_Step):
    """Leave experts out (see transform/methods.py for the methods)."""

    method: Literal["reap", "ean", "frequency", "naee", "random"]
    keep: Keep
    #: experts that stay, e.g. [L03.E017], numbered as the step before leaves them
    protect: tuple[Annotated[str, AfterValidator(_expert_name)], ...] = ()


class MergeStep(_Step):
    """Make one expert of several."""

    method: Literal["m-smoe", "hc-smoe", "ream"]
    keep: Keep

    @model_validator(mode="before")
    @classmethod
    def _no_protection(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("protect"):
            raise ValueError(f"{value.get('method')} merges experts and cannot protect some; reap, ean, frequency and naee can")
        return value


def _width_share_or_count(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("should be a share below 1, or a whole number of neurons")
    return value


class SlimStep(_Step):
    """Make every expert thinner (see transform/slim.py)."""

    method: Literal["slim"]
    #: neurons that every expert keeps: a share below 1, or how many
    width: Annotated[float, BeforeValidator(_no_bool), Field(gt=0), AfterValidator(_width_share_or_count)]
    #: what neurons are kept by
    score: Literal["greedy", "activation", "slimmoe", "random"] = "greedy"
    #: refit each down matrix on its calibration activations
    repair: bool = True


#: What training may move, by name; names may be joined by "+" (see distill/folder.py).
TRAINABLE = ("experts", "router", "all")


def _parts(value: str) -> str:
    if not set(value.split("+")) <= set(TRAINABLE):
        raise ValueError(f"should be {', '.join(TRAINABLE)}, or several joined by +")
    return value


def _word(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class DistillStep(_Step):
    """Train the model that the steps before it left towards the original, on the calibration text (see distill/step.py).

    It is kept only if it came closer to the original on held-out text. The options are those of `moecompress distill`.
    """

    method: Literal["distill"]
    #: experts, router, experts+router, or all (everything but the embeddings and the head)
    train: Annotated[str, AfterValidator(_parts)] = "all"
    #: the budget, whichever ends first; with minutes a rerun on another machine, or another day, does another number of steps
    steps: Count | None = None
    minutes: Annotated[float, BeforeValidator(_no_bool), Field(gt=0)] | None = None
    #: tokens of the original that are told apart; 0: all
    top_logits: Natural = 64
    #: weight of the text's own next tokens beside the original's
    cross_entropy: Number = 0.0
    #: share of the step after which the original is left out (needs cross_entropy)
    kd_share: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=1)] = 1.0
    #: highest learning rate
    rate: Annotated[float, BeforeValidator(_no_bool), Field(gt=0)] = 1e-4
    #: share of the step in which the rate rises
    warmup: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=0.9)] = 0.05
    weight_decay: Number = 0.0
    #: longest gradient, longer ones are shortened; 0: no limit
    clip: Number = 1.0
    #: sequences at once (null: compute.micro_batch), and how often before the weights move
    batch: Count | None = None
    accumulate: Count = 2
    #: training steps between measurements on held-out text; a killed run goes on behind the last one
    check_every: Count = 25
    #: train the experts as what quantizing makes of them: ternary, sign, 2, 3, 4 or e.g. b3g128s
    qat: Annotated[str, BeforeValidator(_word)] | None = None
    #: with qat ternary: share of the codes that a training step may change
    qat_share: Annotated[float, BeforeValidator(_no_bool), Field(gt=0, le=1)] | None = None
    #: weight of a loss that keeps all experts in use
    balance: Number = 0.0

    @model_validator(mode="after")
    def _some_budget(self) -> DistillStep:
        if self.steps is None and self.minutes is None:
            raise ValueError("distill needs a budget: steps (can be repeated) or minutes")
        if self.kd_share < 1 and self.cross_entropy == 0:
            raise ValueError("kd_share below 1 leaves nothing to train on then; set cross_entropy, or leave kd_share out")
        if self.qat is not None and not {"experts", "all"} & set(self.train.split("+")):
            raise ValueError("qat rounds experts, which train leaves out; set train: experts+router or all")
        if self.qat is None and self.qat_share is not None:
            raise ValueError("qat_share needs qat: ternary")
        return self


#: The kinds of steps, told apart by their ``method``; what each of them does is in transform/steps.py and distill/step.py.
STEPS: tuple[type[_Step], ...] = (DropStep, MergeStep, SlimStep, DistillStep)
Step = Annotated[DropStep | MergeStep | SlimStep | DistillStep, Field(discriminator="method")]


def step_methods() -> dict[str, type[_Step]]:
    """Name of a method -> the kind of step it is."""
    return {name: kind for kind in STEPS for name in get_args(kind.model_fields["method"].annotation)}


class RouteRecipe(_Section):
    """Which of a token's chosen experts the result skips at run time (see `moecompress tune-routing`)."""

    policy: Literal["none", "odp", "naee", "top-p", "modes", "adamoe", "otp", "dynamic-bits", "compressed-experts"] = "none"
    #: share of the expert calls to skip (dynamic-bits: to compute on two bits)
    skip: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, lt=1)] | None = None
    #: instead: skip as many as cost at most this KL (nats a token, held-out text) to the same model waking all experts
    max_kl: Number | None = None
    #: do the experts left take over the weight of the skipped ones? null: as in the policy's paper
    renormalise: bool | None = None
    #: share of the tokens, those that get most attention, that lose no expert; null: as in the policy's paper (odp: 0.02)
    protect: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, lt=1)] | None = None
    #: otp and compressed-experts: training steps; null: 200
    steps: Count | None = None
    #: compressed-experts: experts of a token that compute; null: half of them, rounded up
    main: Count | None = None

    @model_validator(mode="after")
    def _how_much(self) -> RouteRecipe:
        given = sum(value is not None for value in (self.skip, self.max_kl))
        if self.main is not None and self.policy != "compressed-experts":
            raise ValueError("main is of policy compressed-experts alone; leave it out")
        if self.policy == "compressed-experts" and given:
            raise ValueError("compressed-experts skips all but main experts; leave out skip and max_kl")
        if self.policy == "none" and given:
            raise ValueError("skip and max_kl need a policy: odp, naee, top-p, modes, adamoe, otp or dynamic-bits")
        if self.policy not in ("none", "compressed-experts") and given != 1:
            raise ValueError(f"policy {self.policy} needs either skip or max_kl")
        if self.steps is not None and self.policy not in ("otp", "compressed-experts"):
            raise ValueError("only policies otp and compressed-experts are trained; leave out steps")
        return self


class RepairRecipe(_Section):
    """What is trained once the model is compressed, towards the original's predictions on the calibration text."""

    #: the routers' weights; kept only if the divergence from the original falls on held-out text
    router: bool = False
    steps: Count = 100
    #: highest learning rate
    rate: Number = 1e-4
    #: sequences of a step
    batch: Count = 8


class ComputeRecipe(_Section):
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    #: sequences that go through a layer together
    micro_batch: Count = 4
    seed: Natural = 0


class Recipe(_Section):
    name: Annotated[str, Field(min_length=1)] = "recipe"
    target: TargetRecipe = TargetRecipe()
    calibration: CalibrationRecipe = CalibrationRecipe()
    allocate: AllocateRecipe = AllocateRecipe()
    #: steps that change the model's experts, or train the model, before it is quantized, in order
    transform: tuple[Step, ...] = ()
    quantize: QuantizeRecipe = QuantizeRecipe()
    repair: RepairRecipe = RepairRecipe()
    route: RouteRecipe = RouteRecipe()
    compute: ComputeRecipe = ComputeRecipe()

    @field_validator("transform", mode="before")
    @classmethod
    def _no_steps(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, list | tuple):
            raise ValueError("should be a list of steps, such as [{method: reap, keep: 0.75}]")
        return value or ()

    def without_limits(self) -> Recipe:
        """The same work: limits only decide whether it goes on."""
        steps = tuple(s.model_copy(update={"max_kl": None}) for s in self.transform)
        return self.model_copy(update={"transform": steps, "allocate": self.allocate.model_copy(update={"max_kl": None})})

    def fingerprint(self) -> str:
        """sha256 of the canonical JSON: equal for recipes that ask for the same, however they were written."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_yaml(self) -> str:
        """Every field, defaults included; ``load_recipe`` reads it back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


# --- from YAML ------------------------------------------------------------------------------------------------------


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe; ``overrides`` are ``"section.key=value"`` with the value in YAML.

    Setting ``target.bits`` takes away a ``target.size`` that the file had, and the other way round.
    Raises UserError with file:line:column for anything the file gets wrong, or naming the override.
    """
    path = Path(path)
    text = _read(path)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path} is not a recipe", expected="YAML with keys such as " + _keys(Recipe),
                            got="an empty file" if root is None else "something that is not a mapping")  # fmt: skip
        _refuse_twice(root, path)
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{_place(path, getattr(error, 'problem_mark', None))}: not valid YAML",
                        got=getattr(error, "problem", None) or str(error)) from None  # fmt: skip
    tree.setdefault("name", path.stem)
    given: dict[tuple[str, ...], str] = {}
    for override in overrides or []:
        given[_apply(tree, override)] = override
    return _validate(tree, lambda loc: _where(loc, given, root, path))


def recipe_from(overrides: list[str] | None = None) -> Recipe:
    """The default recipe with overrides, for commands started without a file."""
    tree: dict[str, Any] = {}
    given = {_apply(tree, override): override for override in overrides or []}
    return _validate(tree, lambda loc: _where(loc, given, None, Path("recipe")))


def _read(path: Path) -> str:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        raise UserError(f"no recipe at {path}", remedy=f"did you mean {path.parent / near[0]}?" if near else None)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a recipe", expected="YAML in UTF-8", got=str(error)) from None


def _validate(tree: dict[str, Any], where: Any) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        complaints = [_complaint(item, where) for item in error.errors()]
    raise UserError("\n".join(complaints))


def step_from(options: dict[str, Any]) -> DropStep | MergeStep | SlimStep | DistillStep:
    """One step, as the options of a command say it. Raises UserError."""
    try:
        return TypeAdapter(Step).validate_python(options)
    except ValidationError as error:
        complaints = [_complaint({**item, "loc": ("transform", 0, *item["loc"])}, None) for item in error.errors()]
    raise UserError("\n".join(complaint.removeprefix("transform.0.") for complaint in complaints))


def _complaint(item: Any, where: Any) -> str:
    loc = item["loc"]
    if loc[:1] == ("transform",) and len(loc) > 2 and loc[2] in step_methods():
        loc = loc[:2] + loc[3:]  # pydantic names the kind of step on the way; the file does not
    if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        loc += ("method",)
    place = "" if where is None else f"{where(loc)}: "
    return place + _said(item, loc)


def _said(item: Any, loc: tuple[Any, ...]) -> str:
    name = ".".join(map(str, loc))
    if item["type"] == "extra_forbidden":
        return f"unknown key {name!r}; {_suggestion(loc, item['loc'])}"
    if item["type"] == "union_tag_invalid":
        return f"{name}: should be one of {', '.join(step_methods())}, got {item['ctx']['tag']!r}"
    said = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    said = said if item["type"] == "value_error" else f"should be {said}"
    shown = "" if isinstance(item["input"], dict | BaseModel) else f", got {item['input']!r}"
    if item["type"] == "model_type":
        said = "should be a section with keys: " + _keys(_model_at(loc))
    if item["type"] in ("missing", "union_tag_not_found"):
        said, shown = "is missing", ""
    return f"{name or 'recipe'}: {said}{shown}"


def _suggestion(loc: tuple[Any, ...], pydantic_loc: tuple[Any, ...]) -> str:
    model = _model_at(pydantic_loc[:-1])
    key = str(loc[-1])
    near = difflib.get_close_matches(key, list(model.model_fields), 1, 0.6)
    elsewhere = [f"{section}.{key}" for section, field in Recipe.model_fields.items()
                 if key in getattr(field.annotation, "model_fields", {})]  # fmt: skip
    if near or elsewhere:
        prefix = ".".join(str(part) for part in loc[:-1])
        best = elsewhere[0] if not near else f"{prefix}.{near[0]}" if prefix else near[0]
        return f"did you mean {best!r}?"
    return f"known here: {_keys(model)}"


def _model_at(loc: tuple[Any, ...]) -> type[BaseModel]:
    if not loc:
        return Recipe
    if "candidates" in loc:
        return CandidateRecipe
    if loc[0] == "transform":
        return step_methods().get(loc[2], _Step) if len(loc) > 2 else Recipe
    annotation = Recipe.model_fields[str(loc[0])].annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else Recipe


def _keys(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)


def _apply(tree: dict[str, Any], override: str) -> tuple[str, ...]:
    name, equals, value = override.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        raise UserError(f"cannot read --set {override!r}", expected="section.key=value, for example target.bits=3")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not valid YAML", got=getattr(error, "problem", None)) from None
    node = tree
    for depth, key in enumerate(keys[:-1]):
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise UserError(f"--set {override}: {'.'.join(keys[: depth + 1])} has no keys of its own",
                            remedy="set the whole value at once")  # fmt: skip
    node[keys[-1]] = parsed
    if keys[:-1] == ("target",) and parsed is not None:
        node.pop({"bits": "size", "size": "bits"}.get(keys[-1], ""), None)
    return keys


def _where(loc: tuple[Any, ...], given: dict[tuple[str, ...], str], root: yaml.Node | None, path: Path) -> str:
    names = tuple(map(str, loc))
    for keys, override in reversed(given.items()):
        if names[: len(keys)] == keys or (names and keys[: len(names)] == names):
            return f"--set {override}"
    node, mark = root, None if root is None else root.start_mark
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if pair is None:
                break
            mark, node = pair[0].start_mark, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            mark = node.start_mark
    return _place(path, mark)


def _place(path: Path, mark: Any) -> str:
    return str(path) if mark is None else f"{path}:{mark.line + 1}:{mark.column + 1}"


def _refuse_twice(node: yaml.Node, path: Path) -> None:
    """YAML keeps the last of two equal keys and says nothing."""
    children = list(node.value) if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise UserError(f"{_place(path, key.start_mark)}: key {key.value!r} appears twice")
            seen.add(key.value)
            children.append(value)
    for child in children:
        _refuse_twice(child, path)
