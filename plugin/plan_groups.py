"""What is trained with what: a `Workload`, and how its projections are grouped and folded.

The widths are those of `kernels.lora_linear.Group`, whose rule for folding is asked and not copied.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from lorafuse.kernels.lora_linear import fold_alignment, fold_columns, folding_pays
from lorafuse.plugin.errors import FuseConfigError
from lorafuse.plugin.plan_model import LayerShape, Linear, ModelShape

BF16 = 2  # bytes
FP32 = 4
ALL_LINEAR = "all-linear"
QUANTS = ("nf4", "none")
OPTIMIZERS = ("adamw_8bit", "adamw")
MOST = 10**9  # of tokens, rows, documents and ranks
# Columns that the r-wide part of a folded GEMM is padded to on a GPU.
GPU_FOLD_ALIGNMENT = fold_alignment(torch.device("cuda"))

Targets = str | tuple[str, ...]


@dataclass(frozen=True)
class Workload:
    """One training step: a model, its adapters and a micro-batch.

    Attributes:
        model: Shapes of the model.
        tokens: Of each row, padding and packed documents included.
        batch: Rows of a micro-batch.
        documents: Packed into each row, of equal length.
        rank: Of LoRA.
        quant: `nf4` (blocks of 64) or `none` (bf16).
        double_quant: The blocks' scales are quantised too.
        targets: What carries an adapter, as PEFT reads `target_modules`: names, `all-linear`, or a
            regular expression.
        optimizer: `adamw_8bit` (bitsandbytes) or `adamw` (fp32 states).
        adapter_bytes: Of one element of A or B: 4 (PEFT keeps masters in fp32), 2 without.
        accumulates: Gradients of an earlier micro-batch are there when a step begins.
        fold_alignment: Columns that r-wide parts are padded to; a GPU's by default.
        folded_weights: With `fused_folded_weights`: bf16 weights lie in buffers with room for LoRA.
        prepare_kbit: The model is as PEFT's `prepare_model_for_kbit_training` leaves it: norms,
            embedding and head in fp32, and with them the residual stream. Of `nf4` only.

    Raises:
        FuseConfigError: A value that is not supported, or targets that no layer has.
    """

    model: ModelShape
    tokens: int
    batch: int = 1
    documents: int = 1
    rank: int = 32
    quant: Literal["nf4", "none"] = "nf4"
    double_quant: bool = True
    targets: Targets = ALL_LINEAR
    optimizer: Literal["adamw_8bit", "adamw"] = "adamw_8bit"
    adapter_bytes: int = FP32
    accumulates: bool = False
    fold_alignment: int = GPU_FOLD_ALIGNMENT
    folded_weights: bool = False
    prepare_kbit: bool = False

    def __post_init__(self) -> None:
        for name, least in (("tokens", 2), ("batch", 1), ("documents", 1), ("rank", 1)):
            value = getattr(self, name)
            if value < least:
                raise FuseConfigError(f"--{name} {value}: give {least} or more")
            if value > MOST:
                raise FuseConfigError(f"--{name} {value}: give {MOST:,} or less")
        for name, known in (("quant", QUANTS), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                raise FuseConfigError(
                    f"--{name} {getattr(self, name)} is not supported; use {' or '.join(known)}"
                )
        if self.prepare_kbit and self.quant != "nf4":
            raise FuseConfigError(
                f"--prepare-kbit is for 4-bit weights, got --quant {self.quant}; use --quant nf4"
            )
        if self.tokens < 2 * self.documents:
            raise FuseConfigError(
                f"--documents {self.documents} leaves less than 2 of {self.tokens} tokens each and "
                "nothing to predict; give fewer"
            )
        if isinstance(self.targets, str):
            try:
                re.compile(self.targets)
            except re.error as error:
                raise FuseConfigError(
                    f"--targets {self.targets} is neither names with commas between nor a regular "
                    f"expression: {error}"
                ) from error
        adapted = [linear for linear in self.model.linears if is_target(linear, self.targets)]
        if not adapted:
            names = sorted({linear.name.rpartition(".")[2] for linear in self.model.linears})
            raise FuseConfigError(
                f"--targets {shown(self.targets)} names no linear layer of {self.model.name}; its "
                f"decoder layers have {', '.join(names)}; or use {ALL_LINEAR}"
            )

    @property
    def rows(self) -> int:
        """T: tokens of the micro-batch."""
        return self.batch * self.tokens

    @property
    def stream(self) -> int:
        """Bytes of an element of the residual stream, and of what is not in 4 bit."""
        return FP32 if self.prepare_kbit else BF16

    @property
    def labelled(self) -> int:
        """Rows that go through the head: the last token of each row has none to predict."""
        return self.batch * (self.tokens - 1)

    @property
    def adapter_elements(self) -> int:
        """Of all A and B."""
        return sum(
            self.rank * (linear.in_features + linear.out_features)
            for linear in self.model.linears
            if is_target(linear, self.targets)
        )

    def group(self, linears: tuple[Linear, ...]) -> "GroupShape":
        return GroupShape(
            K=linears[0].in_features,
            N=sum(linear.out_features for linear in linears),
            ranks=tuple(self.rank * is_target(linear, self.targets) for linear in linears),
            outs=tuple(linear.out_features for linear in linears),
            bias=any(linear.bias for linear in linears),
            quantised=self.quant == "nf4",
            align=self.fold_alignment,
            has_room=self.quant == "none" and self.folded_weights,
        )

    def groups(self, layer: LayerShape) -> "LayerGroups":
        return LayerGroups(
            self.group(layer.qkv),
            self.group((layer.o,)),
            self.group(layer.gate_up),
            self.group((layer.down,)),
        )


def is_target(linear: Linear, targets: Targets) -> bool:
    """Whether PEFT adapts the layer: by its name's end, or all of it matches the expression."""
    if targets == ALL_LINEAR:
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, linear.name) is not None
    return any(linear.name == one or linear.name.endswith(f".{one}") for one in targets)


def shown(targets: Targets) -> str:
    return targets if isinstance(targets, str) else ",".join(targets)


@dataclass(frozen=True)
class GroupShape:
    """Projections of one input: Y [T, N] = X [T, K] W^T + LoRA, as `kernels.lora_linear.Group`.

    Attributes:
        ranks, outs: of each projection; rank 0: no adapter.
        quantised: W is written in bf16 afresh in each pass.
        align: see `Workload.fold_alignment`.
        has_room: W lies in a buffer [N + F, K + F], where it is multiplied from.
    """

    K: int
    N: int
    ranks: tuple[int, ...]
    outs: tuple[int, ...]
    bias: bool
    quantised: bool
    align: int
    has_room: bool = False

    @property
    def rank(self) -> int:
        return sum(self.ranks)

    @property
    def fold_forward(self) -> int:
        return fold_columns(self.rank + self.bias, self.align)

    @property
    def fold_backward(self) -> int:
        return fold_columns(self.rank, self.align)

    @property
    def copies_weight(self) -> bool:
        """Folding copies W."""
        return not (self.quantised or self.has_room)

    @property
    def room_bytes(self) -> int:
        """Beside and below W, where it has a room."""
        F = self.fold_forward if self.has_room and self.rank else 0
        return BF16 * ((self.N + F) * (self.K + F) - self.N * self.K)

    def folds_forward(self, T: int, copies_input: bool) -> bool:
        return self.fold_forward > 0 and folding_pays(
            T, self.K, self.N, copies_input=copies_input, copies_weight=self.copies_weight
        )

    def folds_backward(self, T: int, copies_input: bool) -> bool:
        return self.fold_backward > 0 and folding_pays(
            T, self.N, self.K, copies_input=copies_input, copies_weight=self.copies_weight
        )

    def gradient_room(self, T: int) -> int:
        """Columns for G beside dY, where the one that writes dY leaves them."""
        return self.fold_backward if self.folds_backward(T, copies_input=False) else 0

    def forward_weight_bytes(self, folds: bool) -> int:
        """The buffer that the forward GEMM reads W from: [N, K + F], one W_i [N_i, K], or none."""
        if folds:
            return 0 if self.has_room else BF16 * self.N * (self.K + self.fold_forward)
        plain = BF16 * max(self.outs) * self.K if self.quantised else 0
        return plain + BF16 * self.N * self.fold_forward  # and sB [N, F]

    @property
    def kept_weight_bytes(self) -> int:
        """One buffer for both GEMMs: [N + F, K + F]."""
        if self.has_room:
            return 0
        return BF16 * (self.N + self.fold_backward) * (self.K + self.fold_forward)

    def backward_weight_bytes(self, folds: bool) -> int:
        """The same of dX's GEMM: [N + F, K], one W_i, or none."""
        if folds:
            return 0 if self.has_room else BF16 * self.K * (self.N + self.fold_backward)
        return BF16 * max(self.outs) * self.K if self.quantised else 0


@dataclass(frozen=True)
class LayerGroups:
    """The four groups of a decoder layer."""

    qkv: GroupShape
    o: GroupShape
    gate_up: GroupShape
    down: GroupShape

    def __iter__(self) -> Iterator[GroupShape]:
        return iter((self.qkv, self.o, self.gate_up, self.down))
