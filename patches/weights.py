"""Frozen base weights of linear layers, in the formats that lorafuse computes with.

A weight format is a function `(layer) -> WeightReader | None`: None where the layer is not of its
kind. The reader is asked anew in every forward, because sharding and offloading move weights
around.
"""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafuse.kernels.nf4 import Quantised4bit
from lorafuse.patches.bind import Unsupported

Weight = Tensor | Quantised4bit


class WeightReader:
    """How one linear layer's weight is read: an object with attributes, so that a copy or a pickle
    of a fused model reads the copy's weights.

    Attributes:
        layer: the linear layer.
        name: the format, for reports.
    """

    name = ""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def read(self) -> Weight:
        """The weight [N, K]; raises `Unsupported` where it cannot be read now."""
        raise NotImplementedError

    def dtype(self) -> torch.dtype | None:
        """The dtype that the layer insists on computing in without autocast, or None."""
        return None


WeightFormat = Callable[[nn.Module], WeightReader | None]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "placements")


def check_plain(tensor: Tensor, what: str) -> None:
    """Raises Unsupported where `tensor` is not an ordinary tensor with its data here."""
    if tensor.is_meta:
        raise Unsupported(f"{what} is on the meta device")
    if is_sharded(tensor):
        raise Unsupported(f"{what} is sharded (DTensor); fuse before the model is wrapped")
    if tensor.numel() == 0:
        raise Unsupported(f"{what} is empty here (partitioned by ZeRO-3?)")


class FloatWeight(WeightReader):
    """A frozen fp32, fp16 or bf16 weight."""

    name = "float"

    def read(self) -> Weight:
        weight: nn.Parameter = self.layer.weight
        if weight.requires_grad:
            raise Unsupported("its base weight is trainable")
        check_plain(weight, "its base weight")
        return weight


def float_weight(layer: nn.Module) -> WeightReader | None:
    """nn.Linear, or a subclass that computes the same, with an fp32, fp16 or bf16 weight."""
    if not isinstance(layer, nn.Linear) or not _computes_as_linear(layer):
        return None
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    return FloatWeight(layer) if layer.weight.dtype in floats else None


def _computes_as_linear(layer: nn.Linear) -> bool:
    """Whether the layer's forward is x Wᵀ + b, told by its numbers on a small stand-in.

    In training and in evaluation, near zero and far from it, in fp32 and bf16. A subclass with
    tensors or modules of its own is not tried. Verification of the block has the last word.
    """
    own = type(layer).forward
    if own is nn.Linear.forward:
        return True
    if set(layer._parameters) != {"weight", "bias"} or layer._buffers or layer._modules:
        return False
    stand_in = type(layer).__new__(type(layer))
    stand_in.__dict__.update(layer.__dict__)
    stand_in.__dict__.pop("forward", None)
    stand_in.in_features, stand_in.out_features = 16, 8
    generator = torch.Generator().manual_seed(0)
    w, b = torch.randn(8, 16, generator=generator), torch.randn(8, generator=generator)
    x = torch.randn(2, 3, 16, generator=generator)
    for training, scale, dtype in (
        (True, 1.0, torch.float32),
        (False, 1.0, torch.float32),
        (True, 1e-4, torch.float32),
        (True, 1e4, torch.float32),
        (True, 1.0, torch.bfloat16),
    ):
        weight, bias = w.to(dtype), None if layer.bias is None else b.to(dtype)
        stand_in.training = training
        stand_in._parameters = {
            "weight": nn.Parameter(weight, requires_grad=False),
            "bias": None if bias is None else nn.Parameter(bias, requires_grad=False),
        }
        low = (x * scale).to(dtype)
        expected = F.linear(low, weight, bias)
        try:
            with torch.no_grad():
                got = own(stand_in, low)
        except Exception:  # somebody else's forward may raise anything; then it is another layer
            return False
        limit = 1e-5 if dtype == torch.float32 else 2e-2
        if not isinstance(got, Tensor) or got.dtype != dtype or got.shape != expected.shape:
            return False
        if float((got - expected).float().norm()) > limit * float(expected.float().norm()):
            return False
    return True


class Bitsandbytes4bitWeight(WeightReader):
    """Packed NF4 or FP4."""

    name = "bitsandbytes 4-bit"

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self._state: Any = None
        self._known: Quantised4bit | None = None

    def read(self) -> Weight:
        weight, known = self.layer.weight, self._known
        # FSDP gathers the bytes into a plain parameter; the layer has kept their state.
        state = getattr(weight, "quant_state", None) or self.layer.quant_state
        # The views are made, and checked, once for each place that the weight lies in.
        if (
            known is None
            or state is not self._state
            or known.packed.data_ptr() != weight.data_ptr()
            or known.absmax.data_ptr() != state.absmax.data_ptr()
        ):
            known = from_state(weight.data, state)
            self._state, self._known = state, known
        return known

    def dtype(self) -> torch.dtype | None:
        own: torch.dtype | None = self.layer.compute_dtype
        return own

    def __getstate__(self) -> dict[str, Any]:
        return {"layer": self.layer, "_state": None, "_known": None}


def bitsandbytes_4bit(layer: nn.Module) -> WeightReader | None:
    """bitsandbytes.nn.Linear4bit: NF4 or FP4, single or double quantised."""
    bnb = sys.modules.get("bitsandbytes")  # a model can hold such a layer only where it is imported
    if bnb is None or not isinstance(layer, bnb.nn.Linear4bit):
        return None
    return Bitsandbytes4bitWeight(layer)


def from_state(data: Tensor, state: Any) -> Quantised4bit:
    """Packed bytes and bitsandbytes' `QuantState` of them; views, no copies.

    bitsandbytes may store the bytes as bfloat16 or any other dtype (`quant_storage`). A weight of
    more than two dimensions is read as one of two, all but the last of its dimensions in one.
    """
    if state is None:
        raise Unsupported("its 4-bit weight is not quantised yet")
    if getattr(state, "packing_format_for_cpu", False):
        raise Unsupported("bitsandbytes has repacked its 4-bit weight for CPU inference")
    check_plain(data, "its base weight")
    if state.absmax.device != data.device:
        raise Unsupported(
            f"its 4-bit weight is on {data.device} and the scales of it on {state.absmax.device}: "
            "quantise on the GPU, for moving a module leaves the scales of parametrized weights"
        )
    nested = state.nested
    *rows, columns = (int(n) for n in state.shape)
    return Quantised4bit(
        packed=data.view(torch.uint8).view(-1),
        code=state.code,
        absmax=state.absmax,
        blocksize=state.blocksize,
        shape=(math.prod(rows), columns),
        code2=state.state2.code if nested else None,
        absmax2=state.state2.absmax if nested else None,
        offset=state.offset if nested else None,
        blocksize2=state.state2.blocksize if nested else None,
    )


BUILTIN_WEIGHT_FORMATS: tuple[WeightFormat, ...] = (bitsandbytes_4bit, float_weight)


def find_reader(layer: nn.Module, formats: Sequence[WeightFormat]) -> WeightReader:
    """The first format that knows `layer`.

    Raises:
        Unsupported: none does.
    """
    for weight_format in formats:
        reader = weight_format(layer)
        if reader is not None:
            return reader
    raise Unsupported(
        f"its base layer is {type(layer).__name__}, not a float or 4-bit linear layer"
    )
