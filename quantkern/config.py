"""config_list -> rules.

They keep NNI's meaning: a rule selects a module when its class is in ``op_types`` (if given) and its name is in
``op_names`` (if given); the last rule that selects a module replaces earlier ones; ``exclude: True`` takes it out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from quantkern.settings import QUANT_DTYPES, QUANT_SCHEMES, QUANT_TYPES, did_you_mean

DEFAULT_OP_TYPES = (
    *("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
    *("Linear", "Bilinear", "PReLU", "Embedding", "EmbeddingBag"),
)
"""What 'default' in op_types stands for."""

T = TypeVar("T")

SELECTING_KEYS = ("op_types", "op_names", "exclude")
MAX_BITS = 16
CHILD_NAME = "quantkern"
"""Under this name a quantized layer owns the modules that quantize its inputs and outputs."""


class ConfigError(ValueError):
    """Everything that is wrong with a config_list, one numbered line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        lines = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(self.problems, 1))
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"config_list has {count}, the model is unchanged:{lines}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...]]]:
        return ConfigError, (self.problems,)


@dataclass(frozen=True)
class TensorSpec:
    """How one kind of tensor of a layer is quantized. ``axis`` is None per tensor, ``full_range`` gives int -2^(b-1).

    >>> TensorSpec(8, "int", "per_tensor_symmetric").quant_range
    (-127, 127)
    >>> TensorSpec(4, "uint", "per_tensor_affine").quant_range
    (0, 15)
    """

    bits: int
    dtype: str
    scheme: str
    axis: int | None = None
    start_step: int = 0
    ema_decay: float = 0.99
    full_range: bool = False

    @property
    def quant_range(self) -> tuple[int, int]:
        """quant_min and quant_max; int is symmetric about 0 unless it has the full range."""
        if self.dtype == "uint":
            return 0, 2**self.bits - 1
        return int(not self.full_range) - 2 ** (self.bits - 1), 2 ** (self.bits - 1) - 1

    @property
    def symmetric(self) -> bool:
        """Whether the scheme takes the same range on both sides of 0."""
        return self.scheme.endswith("symmetric")

    @property
    def per_channel(self) -> bool:
        """Whether every channel has a scale of its own."""
        return self.scheme.startswith("per_channel")


@dataclass(frozen=True)
class Rule:
    """One checked dict of a config_list; ``specs`` is empty when the rule excludes."""

    label: str
    specs: Mapping[str, TensorSpec]
    op_types: frozenset[str] | None
    op_names: frozenset[str] | None

    def selects(self, op_type: str, names: Sequence[str]) -> bool:
        """Whether the rule is about a module of this class and with these names."""
        by_type = self.op_types is None or op_type in self.op_types
        return by_type and (self.op_names is None or not self.op_names.isdisjoint(names))


@dataclass(frozen=True)
class Extra:
    """A key that only some quantizers know, a field of their spec: one value for all quant types or a dict of them."""

    check: Callable[[Any], bool]
    expected: str


def as_read(quant_type: str, spec: TensorSpec, given: Mapping[str, Any]) -> TensorSpec:
    """The spec as the rule says it."""
    return spec


@dataclass(frozen=True)
class Form:
    """What the rules of one kind of quantizer may say.

    spec: the class of the specs; extras: its fields that a rule may set. refine: (quant type, spec, the whole rule)
    -> the spec to use; a ValueError from it is a problem of the rule.
    """

    quant_types: tuple[str, ...]
    keys: tuple[str, ...]
    defaults: Mapping[str, tuple[str, str]]
    min_bits: int = 1
    spec: type[TensorSpec] = TensorSpec
    extras: Mapping[str, Extra] = field(default_factory=dict)
    refine: Callable[[str, TensorSpec, Mapping[str, Any]], TensorSpec] = as_read
    max_bits: int = MAX_BITS

    @property
    def known_types(self) -> tuple[str, ...]:
        """The quant types that a dict by quant type may name."""
        return tuple(dict.fromkeys((*QUANT_TYPES, *self.quant_types)))


@dataclass(frozen=True)
class LayerPlan:
    """One layer to quantize: its dotted name in the model, the rule that chose it, and a spec by quant type.

    computed_as: a subclass of the layer's class whose forward the layer has while it is quantized; None: its own.
    norm: the batch norm behind the layer that is folded into its weight; None: there is none, or it stays.
    """

    name: str
    layer: nn.Module
    rule: str
    specs: Mapping[str, TensorSpec]
    computed_as: type[nn.Module] | None = None
    norm: nn.Module | None = None


def is_int(value: object) -> bool:
    """Whether value is an integer; True and False are none here."""
    return isinstance(value, int) and not isinstance(value, bool)


class _RuleReader:
    """Reads one dict and collects what is wrong with it."""

    def __init__(self, label: str, given: Mapping[str, Any], form: Form, problems: list[str]) -> None:
        self.label, self.given, self.form, self.problems = label, given, form, problems

    def wrong(self, key: str, value: object, expected: str) -> None:
        self.problems.append(f"{self.label}[{key!r}] is {value!r}, expected {expected}")

    def read(self) -> Rule | None:
        before = len(self.problems)
        known = (*self.form.keys, *self.form.extras, *SELECTING_KEYS)
        for key in self.given:
            if key not in known:
                near = did_you_mean(key, known) or "."
                self.problems.append(f"{self.label}: unknown key {key!r}{near} Known keys: {', '.join(known)}.")
        op_types, op_names = self.names("op_types"), self.names("op_names")
        if "op_types" not in self.given and "op_names" not in self.given:
            self.problems.append(
                f"{self.label}: neither 'op_types' nor 'op_names'; name the layers, e.g. 'op_types': ['Conv2d']"
            )
        if op_types is not None and "default" in op_types:
            op_types = op_types | frozenset(DEFAULT_OP_TYPES)
        exclude = self.single("exclude", False, lambda v: isinstance(v, bool), "True or False")
        specs = self.specs(required=exclude is not True)
        if len(self.problems) > before:
            return None
        return Rule(self.label, {} if exclude else specs, op_types, op_names)

    def single(self, key: str, default: T, check: Callable[[Any], bool], expected: str) -> T:
        value: T = self.given.get(key, default)
        if not check(value):
            self.wrong(key, value, expected)
            return default
        return value

    def names(self, key: str) -> frozenset[str] | None:
        value = self.given.get(key)
        if key not in self.given:
            return None
        if not isinstance(value, (list, tuple)):
            self.wrong(key, value, "a list of names" + (f", e.g. [{value!r}]" if isinstance(value, str) else ""))
            return frozenset()
        for name in value:
            if not isinstance(name, str):
                self.wrong(key, value, f"only strings in the list, got {name!r}")
                return frozenset()
        return frozenset(value)

    def quant_types(self, required: bool) -> list[str]:
        value = self.given.get("quant_types")
        allowed = self.form.quant_types
        if "quant_types" not in self.given:
            if required:
                self.problems.append(f"{self.label}: 'quant_types' is missing; expected a list out of {list(allowed)}")
            return []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, (list, tuple)) or not value:
            self.wrong("quant_types", value, f"a list out of {list(allowed)}")
            return []
        for entry in value:
            if entry not in allowed:
                self.wrong("quant_types", value, f"only entries out of {list(allowed)}{did_you_mean(entry, allowed)}")
                return []
        return [quant_type for quant_type in self.form.known_types if quant_type in value]

    def by_type(self, key: str, check: Callable[[Any], bool], expected: str) -> dict[str, Any]:
        """The value of ``key`` by quant type: one value stands for all, a dict names them."""
        value, types = self.given.get(key), self.form.known_types
        if key not in self.given:
            return {}
        if not isinstance(value, Mapping):
            if not check(value):
                self.wrong(key, value, f"{expected}, or a dict of these by quant type")
                return {}
            return dict.fromkeys(types, value)
        for quant_type, entry in value.items():
            if quant_type not in types:
                known = f"quant types as keys, one of {list(types)}{did_you_mean(quant_type, types)}"
                self.wrong(key, value, f"{known} not {quant_type!r}")
            elif not check(entry):
                self.problems.append(f"{self.label}[{key!r}][{quant_type!r}] is {entry!r}, expected {expected}")
        return {quant_type: entry for quant_type, entry in value.items() if check(entry)}

    def specs(self, required: bool) -> dict[str, TensorSpec]:
        quant_types = self.quant_types(required)
        before = len(self.problems)
        least, most = self.form.min_bits, self.form.max_bits
        fits = f"an integer from {least} to {most}" if least < most else f"{most}"
        bits = self.by_type("quant_bits", lambda v: is_int(v) and least <= v <= most, fits)
        bits_are_wrong = len(self.problems) > before
        schemes = self.by_type("quant_scheme", lambda v: v in QUANT_SCHEMES, f"one of {list(QUANT_SCHEMES)}")
        dtypes = self.by_type("quant_dtype", lambda v: v in QUANT_DTYPES, f"one of {list(QUANT_DTYPES)}")
        axes = self.by_type("axis", lambda v: v is None or is_int(v), "an integer")
        start = self.single("quant_start_step", 0, lambda v: is_int(v) and v >= 0, "an integer >= 0")
        decay = self.single(
            "ema_decay", 0.99, lambda v: isinstance(v, float) and 0 < v < 1, "a float between 0 and 1, both excluded"
        )
        extras = {key: self.by_type(key, extra.check, extra.expected) for key, extra in self.form.extras.items()}
        if required and "quant_bits" not in self.given:
            self.problems.append(f"{self.label}: 'quant_bits' is missing; expected {fits}")
        specs: dict[str, TensorSpec] = {}
        for quant_type in quant_types:
            if quant_type not in bits:
                if "quant_bits" in self.given and not bits_are_wrong:
                    self.wrong("quant_bits", self.given["quant_bits"], f"bits for every quant type, {quant_type!r} too")
                continue
            default_scheme, default_dtype = self.form.defaults[quant_type]
            spec = self.form.spec(
                bits=bits[quant_type],
                dtype=dtypes.get(quant_type, default_dtype),
                scheme=schemes.get(quant_type, default_scheme),
                axis=axes.get(quant_type),
                start_step=start,
                ema_decay=decay,
                **{key: values[quant_type] for key, values in extras.items() if quant_type in values},
            )
            if spec.dtype == "int" and spec.bits == 1:
                self.wrong(
                    "quant_bits", self.given["quant_bits"],
                    f"at least 2 bits for {quant_type!r}: with dtype 'int' 1 bit holds only 0..0; or take dtype 'uint'",
                )  # fmt: skip
            try:
                specs[quant_type] = self.form.refine(quant_type, spec, self.given)
            except ValueError as error:
                self.problems.append(f"{self.label}: {error}")
        if any(axis is not None for axis in axes.values()) and specs and not any(s.per_channel for s in specs.values()):
            found = sorted({spec.scheme for spec in specs.values()})
            self.wrong("axis", self.given["axis"], f"a per-channel quant_scheme with it, not {', '.join(found)}")
        return specs


def read_rules(config_list: object, form: Form) -> tuple[list[Rule], list[str]]:
    """The rules of a config_list that are in order, and every problem of those that are not."""
    if isinstance(config_list, Mapping):
        return [], ["config_list is a dict, expected a list of dicts: put it in brackets, [{...}]"]
    if not isinstance(config_list, (list, tuple)):
        return [], [f"config_list is {config_list!r}, expected a list of dicts, one a rule"]
    rules: list[Rule] = []
    problems: list[str] = []
    for index, given in enumerate(config_list):
        label = f"config_list[{index}]"
        if not isinstance(given, Mapping):
            problems.append(f"{label} is {given!r}, expected a dict")
            continue
        rule = _RuleReader(label, given, form, problems).read()
        if rule is not None:
            rules.append(rule)
    return rules, problems
