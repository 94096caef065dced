r"""The attention output projection with LoRA and the residual behind it.

    h2 = residual + O W_o^T + LoRA        the residual is added to the rounded output, as stock does

    O [.., K] attention output, residual and h2 [.., N]

A group of one projection: the maths, what is saved (O, shared with attention's own saved tensors,
and the r-wide XA) and the backward are `lora_linear`'s.
"""

from torch import Tensor

from lorafuse.kernels.lora_linear import LoraProjection, lora_linear
from lorafuse.kernels.lora_linear import reference as linear_reference


def reference(o: Tensor, projection: LoraProjection, residual: Tensor | None = None) -> Tensor:
    """The definition in plain torch."""
    (y,) = linear_reference(o, [projection])
    return y if residual is None else residual + y


def lora_o(o: Tensor, projection: LoraProjection, residual: Tensor | None = None) -> Tensor:
    """residual + projection(o), with LoRA.

    Args:
        o: [..., K], fp32/fp16/bf16 (fp64 for tests).
        projection: of [N, K].
        residual: [..., N] or None.

    Returns:
        [..., N] in the compute dtype; with a residual, in the promoted dtype of the two.

    Raises:
        ValueError: shapes do not fit together.
    """
    if residual is not None and residual.shape != (*o.shape[:-1], projection.out_features):
        raise ValueError(
            f"residual is {tuple(residual.shape)}; "
            f"expected {(*o.shape[:-1], projection.out_features)}"
        )
    return lora_linear(o, [projection], residual)[0]
