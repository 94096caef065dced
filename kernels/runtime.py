"""Where a kernel runs: Triton on a GPU (or in Triton's interpreter), plain torch elsewhere.

Every public function of `lorafuse.kernels` asks `use_triton(x)` once; nothing above them asks
which. This module is also the one place that imports triton. Where triton is not installed (macOS,
Windows, a bare CPU machine), `triton` and `tl` are inert stand-ins: kernel files still import, and
their torch references run.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import partial
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
        triton = SimpleNamespace(jit=lambda function: function)
        tl = SimpleNamespace(constexpr=int)

__all__ = [
    "HAS_TRITON",
    "cached_launch",
    "cdiv",
    "interpreting",
    "kernel_dtypes",
    "launch_device",
    "mm_fp32",
    "next_power_of_2",
    "tl",
    "triton",
    "use_triton",
]

_MOST_KEYS = 512
_NOTHING = nullcontext()

kernel_dtypes = (torch.float32, torch.float16, torch.bfloat16)


def interpreting() -> bool:
    """True when kernels were built for Triton's interpreter (`TRITON_INTERPRET=1`)."""
    return HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


class CachedLaunch:
    """A Triton kernel that is launched as ever, `kernel[grid](*args, **constants)`, in less time.

    Triton specialises each launch anew, and a fused layer has some 30 of them: at 1 x 128 tokens of
    an 8B model, this and `cdiv` took a step from 341 to 255 ms (H100's host, 2026-11-25). Here what
    decides the specialisation is a key: each integer itself, and each tensor's dtype and alignment,
    all finer than Triton's own. Under a known key the compiled kernel is launched, through the
    interface that Triton's tutorials use (`kernel[grid](*all_args)`).

    A kernel's tensors come first and its floats, which decide nothing, last. (A float elsewhere is
    part of the key: right, but compiled anew for each value.)

    Args:
        kernel: what `triton.jit` returned.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.names: tuple[str, ...] = tuple(kernel.arg_names)
        # Where the tensors end and the floats begin; known from the first launch on.
        self.tensors = self.floats = 0
        # key -> the compiled kernel, and the constants that are handed to it as well
        self.compiled: dict[Any, tuple[Any, list[Any]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        if not self.compiled:
            self._tell_apart(args)
        tensors = args[: self.tensors]
        key = (
            torch.cuda.current_device(),
            *constants,
            *constants.values(),
            *args[self.tensors : self.floats],
            *[a.dtype for a in tensors],
            *[a.data_ptr() & 15 for a in tensors],
            *[a.__class__ for a in args[self.floats :]],
        )
        known = self.compiled.get(key)
        if known is None:
            # As Triton does it; what it compiled is what it returns.
            found = self.kernel[grid](*args, **constants)
            if hasattr(found, "__getitem__"):
                if len(self.compiled) >= _MOST_KEYS:  # of batches whose length changes
                    self.compiled.clear()
                rest = [constants[name] for name in self.names[len(args) :]]
                self.compiled[key] = found, rest
            return
        compiled, rest = known
        compiled[(*grid, 1, 1)[:3]](*args, *rest)

    def _tell_apart(self, args: tuple[Any, ...]) -> None:
        count = len(args)
        self.tensors = next((i for i, a in enumerate(args) if not isinstance(a, Tensor)), count)
        self.floats = count
        while self.floats > self.tensors and isinstance(args[self.floats - 1], float):
            self.floats -= 1
        if any(isinstance(a, Tensor) for a in args[self.tensors :]):
            raise TypeError(f"the tensors of {self.kernel} are to be its first arguments")


def cached_launch(kernel: Any) -> Any:
    """`CachedLaunch` of a kernel that a GPU runs; the kernel itself in the interpreter."""
    return kernel if not HAS_TRITON or interpreting() else CachedLaunch(kernel)


def use_triton(x: Tensor) -> bool:
    """True when the Triton kernels can run on `x`: on a GPU in fp32, fp16 or bf16, or interpreted.

    fp64 always takes the torch reference, so that gradcheck works on every device.
    """
    if not HAS_TRITON or x.dtype not in kernel_dtypes:
        return False
    return x.is_cuda or interpreting()


def launch_device(x: Tensor) -> AbstractContextManager[Any]:
    """Context that makes `x`'s GPU current: Triton launches there, not where the data is."""
    # Mostly it is current already, and torch's context would ask the driver three times.
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(x.device)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. `triton.cdiv` is made for kernels and unwraps constants first."""
    return -(-a // b)


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
