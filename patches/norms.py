"""RMS norms: the fused form of one, and its use in front of a fused block."""

from typing import Any

import torch
from torch import Tensor

from lorafuse.kernels.lora_linear import NormPrologue
from lorafuse.kernels.rms_norm import rms_norm
from lorafuse.patches.bind import FusedForward, Unsupported
from lorafuse.patches.hooks import has_live_hooks
from lorafuse.patches.structure import RmsNorm
from lorafuse.patches.weights import check_plain


class FusedRmsNorm(FusedForward):
    """One kernel instead of five; the output has the dtype that the stock module's has."""

    operations = ("rms_norm",)

    def __init__(self, norm: RmsNorm) -> None:
        super().__init__(norm.module)
        self.eps, self.offset = norm.eps, norm.offset
        self.round_normalised = norm.round_normalised
        # Llama's norm multiplies by the weight after the cast back, Gemma's before: with an fp32
        # weight on a 16-bit input the first gives fp32 and the second 16 bit. The stock module is
        # asked once.
        self.output_dtypes: dict[tuple[torch.dtype, torch.dtype], torch.dtype] = {}

    def output_dtype(self, x: Tensor, weight: Tensor) -> torch.dtype:
        key = (x.dtype, weight.dtype)
        if key not in self.output_dtypes:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                self.output_dtypes[key] = self.stock(x[..., :1, :].detach()).dtype
        return self.output_dtypes[key]

    def call(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return self.fall_back("it was called with more than one tensor", *args, **kwargs)
        x, weight = args[0], self.module.weight
        try:
            check_plain(weight, "its weight")  # type: ignore[arg-type]
        except Unsupported as unsupported:
            return self.fall_back(unsupported.reason, x)
        if x.numel() == 0:
            return self.fall_back("its input is empty", x)
        self.calls += 1
        return rms_norm(
            x,
            weight,  # type: ignore[arg-type]
            self.eps,
            self.offset,
            out_dtype=self.output_dtype(x, weight),  # type: ignore[arg-type]
            round_normalised=self.round_normalised,
        )


def prologue(norm: RmsNorm) -> NormPrologue:
    """The norm as a fused block computes it in front of its projections.

    Raises:
        Unsupported: its weight is trained, or a hook on it has to run.
    """
    weight = norm.weight
    if weight.requires_grad:
        raise Unsupported("a norm's weight is trainable")
    if has_live_hooks(norm.module):
        raise Unsupported("a hook on a norm has to run")
    check_plain(weight, "a norm's weight")
    return NormPrologue(weight, norm.eps, norm.offset, norm.round_normalised)


def apply_norm(norm: RmsNorm, x: Tensor) -> Tensor:
    """The norm of `x` [..., K] by one kernel, in `x`'s dtype."""
    return rms_norm(x, norm.weight, norm.eps, norm.offset, round_normalised=norm.round_normalised)
