"""Where a kernel runs: Triton on a GPU (or in Triton's interpreter), plain torch elsewhere.

Every public function of `lorafuse.kernels` asks `use_triton(x)` once; nothing above them asks
which. This module is also the one place that imports triton. Where triton is not installed (macOS,
Windows, a bare CPU machine), `triton` and `tl` are inert stand-ins: kernel files still import, and
their torch references run.
"""

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import triton
    import triton.language as tl

    HAS_TRITON: bool
else:
    try:
        import triton
        import triton.language as tl

        HAS_TRITON = True
    except ImportError:
        HAS_TRITON = False
        triton = SimpleNamespace(jit=lambda function: function, cdiv=lambda a, b: -(-a // b))
        tl = SimpleNamespace(constexpr=int)

__all__ = [
    "HAS_TRITON",
    "interpreting",
    "kernel_dtypes",
    "launch_device",
    "mm_fp32",
    "next_power_of_2",
    "tl",
    "triton",
    "use_triton",
]

kernel_dtypes = (torch.float32, torch.float16, torch.bfloat16)


def interpreting() -> bool:
    """True when kernels were built for Triton's interpreter (`TRITON_INTERPRET=1`)."""
    return HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(x: Tensor) -> bool:
    """True when the Triton kernels can run on `x`: on a GPU in fp32, fp16 or bf16, or interpreted.

    fp64 always takes the torch reference, so that gradcheck works on every device.
    """
    if not HAS_TRITON or x.dtype not in kernel_dtypes:
        return False
    return x.is_cuda or interpreting()


def launch_device(x: Tensor) -> Any:
    """Context that makes `x`'s GPU current: Triton launches there, not where the data is."""
    return torch.cuda.device(x.device) if x.is_cuda else torch.device("cpu")


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least `n`."""
    return 1 << max(0, n - 1).bit_length()


def mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` accumulated and returned in fp32 (fp64 stays fp64), not in the input dtype.

    On CUDA, torch >= 2.8 lets cuBLAS write fp32 from 16-bit operands; elsewhere the operands are
    upcast.
    """
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        try:
            return torch.mm(a, b, out_dtype=torch.float32)
        except TypeError:
            return (a @ b).float()
    return a.float() @ b.float()
