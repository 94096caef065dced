"""FP8 of a fused model: which linear layers compute in it, and how much noise that adds.

A fused forward is proven in the model's own dtype, with FP8 off: what is proven is its structure
and arithmetic. FP8 is then switched on for the readers of the bound forwards, group by group (the
projections of one input share a GEMM). What it does to the numbers is measured, not proven.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from lorafuse.kernels.fp8_linear import MIN_ROWS, noise_db, unavailable, why_not
from lorafuse.kernels.nf4 import Quantised4bit
from lorafuse.patches.adapters import LinearReader
from lorafuse.patches.bind import Unsupported

__all__ = ["OPERATION", "Fp8Noise", "Fp8Record", "measure_noise", "switch_on", "unavailable"]

OPERATION = "fp8"
_NO_GROUP = (
    "no module of lora_mlp, lora_qkv or lora_o is fused, and FP8 is for their base weights only"
)


@dataclass(frozen=True, eq=False)
class Fp8Record:
    """What became of FP8 in one linear layer; the fields are those of `apply.OperationRecord`."""

    module: str
    reason: str = ""
    reader: LinearReader | None = None
    operation: str = OPERATION
    level: str = ""

    @property
    def fused(self) -> bool:
        return not self.reason

    @property
    def calls(self) -> int:
        """How often the layer has computed in FP8."""
        return 0 if self.reader is None or self.reason else self.reader.fp8_calls

    @property
    def stock_calls(self) -> dict[str, int]:
        """reason -> how often it computed in its own dtype although FP8 is on."""
        return {} if self.reader is None else dict(self.reader.fp8_fallbacks)


@dataclass(frozen=True)
class Fp8Noise:
    """Signal to noise of the FP8 products on random normal input, in dB, over all groups.

    Attributes:
        worst_db: of all groups, forward and backward.
        worst: where that is: the first layer of the group, and the pass.
        median_db: likewise over all.
        first_layer: dB (forward, backward) of the first groups, by the name of their first layer.
    """

    worst_db: float
    worst: str
    median_db: float
    first_layer: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        return f"{self.worst_db:.1f} dB at worst ({self.worst}), {self.median_db:.1f} dB median"


Group = tuple[str, Sequence[LinearReader]]


def device_of(reader: LinearReader) -> torch.device:
    return next(reader.base.parameters()).device


def switch_on(groups: Sequence[Group], names: dict[int, str]) -> list[Fp8Record]:
    """Lets the layers of each group compute in FP8, where nothing is against it.

    Args:
        groups: the readers of the bound forwards that share an input.
        names: id of a module -> its qualified name.

    Returns:
        One record a layer; one without a module where there is none.
    """
    if not groups:
        return [Fp8Record("", _NO_GROUP)]
    records: list[Fp8Record] = []
    for _, readers in groups:
        device = device_of(readers[0])
        static = (
            why_not(device, torch.bfloat16, MIN_ROWS, r.in_features, r.out_features)
            for r in readers
        )
        reason = next((reason for reason in static if reason is not None), "")
        for reader in readers:
            reader.fp8 = not reason
            records.append(Fp8Record(names.get(id(reader.module), ""), reason, reader))
    return records


def measure_noise(groups: Sequence[Group]) -> Fp8Noise | None:
    """Compares FP8 products with bf16 ones for every group that computes in FP8."""
    names: list[str] = []
    measured: list[Tensor] = []
    with torch.no_grad():
        for name, readers in groups:
            if not all(reader.fp8 for reader in readers):
                continue
            weights: list[Tensor | Quantised4bit] = []
            try:
                weights += [reader.weight.read() for reader in readers]
            except Unsupported:
                continue  # a call on this layer will say why
            names.append(name)
            measured.append(noise_db(weights, device_of(readers[0])))
    if not names:
        return None
    pairs = torch.stack([m.cpu() for m in measured]).tolist()
    each = [
        (db, f"{name}, {side}")
        for name, pair in zip(names, pairs, strict=True)
        for db, side in zip(pair, ("forward", "backward"), strict=True)
    ]
    worst_db, worst = min(each)
    rounded = {n: (round(a, 2), round(b, 2)) for n, (a, b) in zip(names[:4], pairs, strict=False)}
    return Fp8Noise(round(worst_db, 2), worst, round(median(db for db, _ in each), 2), rounded)
