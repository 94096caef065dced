"""One linear layer with its PEFT adapters, read anew in every forward.

What PEFT's state says is computed right, or the call goes the stock way with its reason: several
active adapters, disabled adapters, merged weights, dropout, LoRA bias and rsLoRA are computed; DoRA
and other variants, mixed batches and adapters of other kinds are not.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from lorafuse.kernels.fp8_linear import why_not
from lorafuse.kernels.lora_linear import LoraProjection, compute_dtype
from lorafuse.patches.bind import Unsupported
from lorafuse.patches.hooks import has_live_hooks
from lorafuse.patches.weights import WeightFormat, check_plain, find_reader, is_sharded


class LinearReader:
    """Reads a linear layer, adapted or not, as a `LoraProjection`.

    Args:
        module: PEFT's LoRA layer, or the plain linear layer itself.
        formats: the weight formats to try.

    Attributes:
        fp8: compute the base GEMMs in FP8 where that is possible.
        fp8_calls: how often it was.
        fp8_fallbacks: reason -> how often it was not, although `fp8` is set.
        room: for an input, the buffer that the weight lies in (`weight_room`), or None.

    Raises:
        Unsupported: the layer is of a kind that cannot be fused.
    """

    def __init__(self, module: nn.Module, formats: Sequence[WeightFormat]) -> None:
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise Unsupported("it is trained as a whole (modules_to_save)")
        if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):
            raise Unsupported(f"its adapter is {type(module).__name__}, not LoRA")
        self.module = module
        self.lora = module if isinstance(module, LoraLayer) else None
        base: Any = module if self.lora is None else self.lora.get_base_layer()
        if not isinstance(base, nn.Module):
            raise Unsupported(f"its base layer is {type(base).__name__}, not a module")
        self.base = base
        if getattr(module, "fan_in_fan_out", False):
            raise Unsupported("its weight is stored transposed (fan_in_fan_out)")
        for part in {id(m): m for m in (module, base)}.values():
            if "forward" in part.__dict__:
                raise Unsupported(f"the forward of its {type(part).__name__} was replaced already")
            if hasattr(part, "_hf_hook"):
                raise Unsupported("accelerate moves its weights in and out (device_map offload)")
            if hasattr(part, "parametrizations"):
                raise Unsupported("its weight is parametrized")
        self.weight = find_reader(base, formats)
        self.fp8 = False
        self.fp8_calls = 0
        self.fp8_fallbacks: Counter[str] = Counter()
        self.room: Callable[[Tensor], Tensor | None] | None = None

    @property
    def in_features(self) -> int:
        return int(self.base.in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        return int(self.base.out_features)  # type: ignore[arg-type]

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(A [R, K], B [N, R]) of each active adapter."""
        lora: Any = self.lora
        if lora is None:
            return []
        names = [name for name in lora.active_adapters if name in lora.lora_A]
        return [(lora.lora_A[name].weight, lora.lora_B[name].weight) for name in names]

    def projection(self, x: Tensor) -> LoraProjection:
        """The layer as it is now, for an input like `x`.

        Raises:
            Unsupported: this call has to go the stock way.
        """
        if has_live_hooks(self.base) or (self.lora is not None and has_live_hooks(self.module)):
            raise Unsupported(f"a hook on {type(self.module).__name__} has to run")
        own = self.weight.dtype()
        if (
            own is not None
            and own != x.dtype
            and not torch.is_autocast_enabled(x.device.type)
            and x.dtype != torch.float64
        ):
            raise Unsupported(
                f"its 4-bit layer computes in {own} but its input is {x.dtype}: set "
                f"bnb_4bit_compute_dtype={str(x.dtype).removeprefix('torch.')}, or use autocast"
            )
        weight = self.weight.read()
        bias = getattr(self.base, "bias", None)
        fp8 = self.fp8 and self._uses_fp8(x)
        room = None if self.room is None else self.room(x)
        active = self._active()
        if not active:
            return LoraProjection(weight, bias, fp8=fp8, room=room)
        lora: Any = self.lora
        # Through the dicts: `lora.lora_A` is a search by nn.Module, for each layer of each forward.
        downs, ups = lora._modules["lora_A"]._modules, lora._modules["lora_B"]._modules
        dropout = self._dropout([lora._modules["lora_dropout"]._modules[name] for name in active])
        A, B, scales = [], [], []
        for name in active:
            down, up, scale = downs[name], ups[name], float(lora.scaling[name])
            if not isinstance(down, nn.Linear) or is_sharded(down.weight):
                kind = type(down).__name__
                raise Unsupported(
                    f"its LoRA matrices are there only while they are called: FSDP takes each of "
                    f"them on its own ({kind})"
                )
            if has_live_hooks(down) or has_live_hooks(up):
                raise Unsupported("a hook on its LoRA matrices has to run")
            A.append(down.weight)
            B.append(up.weight)
            check_plain(A[-1], "its LoRA matrix")
            scales.append(scale)
            extra: Tensor | None = up.bias
            if extra is not None:
                extra = extra * scale
                bias = extra if bias is None else bias + extra
        if len(active) == 1:
            return LoraProjection(weight, bias, A[0], B[0], scales[0], dropout, fp8, room)
        # s_1 B_1 A_1 + s_2 B_2 A_2 = [s_1 B_1 | s_2 B_2] [A_1; A_2]
        scaled = [b * s for b, s in zip(B, scales, strict=True)]
        stacked = torch.cat(A), torch.cat(scaled, 1)
        return LoraProjection(weight, bias, *stacked, 1.0, dropout, fp8, room)

    def _uses_fp8(self, x: Tensor) -> bool:
        """Whether this call computes in FP8, as it is to; counted."""
        rows = x.numel() // x.shape[-1]
        reason = why_not(x.device, compute_dtype(x), rows, self.in_features, self.out_features)
        if reason is None:
            self.fp8_calls += 1
        else:
            self.fp8_fallbacks[reason] += 1
        return reason is None

    def _active(self) -> list[str]:
        """Names of the adapters that this call applies, in PEFT's order."""
        lora: Any = self.lora
        if lora is None:
            return []
        if lora.disable_adapters:
            if lora.merged:
                raise Unsupported("merged adapters are being disabled")
            return []
        if lora.merged:
            return []
        known, variants = lora._modules["lora_A"]._modules, lora.lora_variant
        names = [name for name in lora.active_adapters if name in known]
        for name in names if variants else ():
            if name in variants:
                variant = type(variants[name]).__name__
                raise Unsupported(f"its adapter is a LoRA variant ({variant})")
        return names

    def _dropout(self, layers: Sequence[nn.Module]) -> float:
        """The LoRA dropout probability of this call, from the active adapters' layers."""
        rates = []
        for layer in layers:
            if isinstance(layer, nn.Dropout):
                rates.append(layer.p if layer.training else 0.0)
            elif isinstance(layer, nn.Identity):
                rates.append(0.0)
            else:
                raise Unsupported(f"its LoRA dropout is {type(layer).__name__}")
        if len(rates) > 1 and any(rates):
            raise Unsupported("several active adapters with dropout draw one mask each")
        return float(rates[0])


def adapter_parameters(module: nn.Module) -> bool:
    """Whether `module` holds a LoRA layer."""
    return any(isinstance(m, LoraLayer) for m in module.modules())
