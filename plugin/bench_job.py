"""`Job`: all that decides what one measured process of `lorafuse bench` does.

The parent writes it as JSON, the worker reads it. All systems of a run get the same job but for
their name, so nothing else can differ between them.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import yaml

from lorafuse.plugin.errors import FuseConfigError


@dataclass(frozen=True)
class Job:
    """One system on one model.

    Attributes:
        system: One of `bench_systems.SYSTEMS`.
        model: A geometry or a folder, as `geometries.find_model` takes it.
        layers: Keep only the model's first ones; None: all.
        quant: `nf4` (double quantised, as QLoRA) or `none` (bf16).
        rank: Of LoRA, on every linear layer but the head; alpha is the same.
        batch: Rows.
        tokens: Of each row.
        documents: Packed into each row, all of one length; 1: nothing is packed.
        checkpointing: Gradient checkpointing, the non-reentrant one.
        steps: Timed ones; two untimed ones come before them.
        attention: transformers' `attn_implementation`; None: what it chooses for the class.
        device: `cuda` or `cpu`.
        flags: Of `FuseConfig`, for lorafuse.
        profile: Rows of the profile of one further step; 0: none.
        prepare_kbit: The model is as PEFT's `prepare_model_for_kbit_training` leaves it: norms,
            embedding and head in fp32. Of 4-bit weights only.
        padding: The share of the batch that is padding behind rows of unequal length.
    """

    system: str
    model: str
    layers: int | None
    quant: str
    rank: int
    batch: int
    tokens: int
    documents: int
    checkpointing: bool
    steps: int
    attention: str | None
    device: str
    flags: dict[str, Any] = field(default_factory=dict)
    profile: int = 0
    prepare_kbit: bool = False
    padding: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rank", "batch", "tokens", "documents", "steps"):
            if getattr(self, name) < 1:
                raise FuseConfigError(f"--{name} {getattr(self, name)}: give 1 or more")
        if self.profile < 0:
            raise FuseConfigError(f"--profile {self.profile}: give 0 (none) or more rows")
        for name, known in (("quant", ("nf4", "none")), ("device", ("cuda", "cpu"))):
            if getattr(self, name) not in known:
                raise FuseConfigError(
                    f"--{name} {getattr(self, name)} is not supported; use {' or '.join(known)}"
                )
        if self.prepare_kbit and self.quant != "nf4":
            raise FuseConfigError(
                f"--prepare-kbit is for 4-bit weights, got --quant {self.quant}; use --quant nf4"
            )
        if not 0 <= self.padding < 0.5:
            raise FuseConfigError(f"--padding {self.padding:g}: give a share from 0 to below 0.5")
        if self.padding and (self.batch == 1 or self.documents > 1):
            raise FuseConfigError(
                "--padding is for rows of unequal length: give --batch 2 or more, no --documents"
            )
        if self.tokens % self.documents:
            raise FuseConfigError(
                f"--tokens {self.tokens} cannot be cut into --documents {self.documents} of equal "
                "length; give a multiple"
            )
        if self.tokens // self.documents < 2:
            raise FuseConfigError(
                f"--documents {self.documents} leaves {self.tokens // self.documents} token each "
                "and nothing to predict; give fewer"
            )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))

    def command(self, systems: list[str], rounds: int) -> str:
        """The whole command, defaults written out, so that it means the same in later versions."""
        words = ["lorafuse bench", f"--model {self.model}"]
        if self.layers is not None:
            words.append(f"--layers {self.layers}")
        for name in ("quant", "rank", "batch", "tokens", "documents", "steps"):
            words.append(f"--{name} {getattr(self, name)}")
        words.append(f"--rounds {rounds}")
        if self.attention is not None:
            words.append(f"--attention {self.attention}")
        words.append(f"--device {self.device}")
        words.append("--checkpointing" if self.checkpointing else "--no-checkpointing")
        if self.prepare_kbit:
            words.append("--prepare-kbit")
        if self.padding:
            words.append(f"--padding {self.padding:g}")
        words.append(f"--systems {','.join(systems)}")
        for name, value in self.flags.items():
            shown = str(value).lower() if isinstance(value, bool) else value
            words.append(f"--flag {name}={shown}")
        if self.profile:
            words.append(f"--profile {self.profile}")
        return " ".join(words)

    def describe(self) -> str:
        """One line for people: model and shapes."""
        layers = "" if self.layers is None else f" ({self.layers} layers)"
        weights = "NF4" if self.quant == "nf4" else "bf16"
        if self.prepare_kbit:
            weights += ", the rest in fp32"
        packed = f", {self.documents} documents a row" if self.documents > 1 else ""
        if self.padding:
            packed = f", {self.padding:.0%} of them padding"
        kept = "gradient checkpointing" if self.checkpointing else "nothing recomputed"
        return (
            f"{self.model}{layers}, {weights}, LoRA r={self.rank}, {self.batch} × "
            f"{self.tokens:,} tokens{packed}, {kept}"
        )


def read_flags(words: list[str]) -> dict[str, Any]:
    """`NAME=VALUE` words, the values as a YAML has them."""
    flags = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not value:
            raise FuseConfigError(f"--flag {word}: write NAME=VALUE, as in fused_attention=off")
        flags[name.strip()] = yaml.safe_load(value)
    return flags
