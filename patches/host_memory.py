"""Memory of the host that the GPU reaches: pinned buffers, and parameters that lie in them.

Pinned buffers are exactly as large as they need to be; torch's own pinned allocator rounds up to
powers of two.

`OnHost` puts a frozen parameter's data there for good. The parameter stays a CUDA tensor to all who
see it: with unified addressing the GPU reads pinned memory at its own address, over PCIe. That is
for tables of which a step reads a few rows, as the embeddings: 67 MB of 1 GB for 8192 tokens.
"""

import os
import weakref
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

__all__ = ["OnHost", "available_bytes", "embedding_table", "holders", "pinned_buffer"]

# Smaller tables are not worth it.
LEAST_BYTES = 64e6
# Memory that nobody reads any more, and that is pinned still.
_to_unpin: list[torch.UntypedStorage] = []


def pinned_buffer(nbytes: int) -> tuple[Tensor, bool]:
    """([nbytes] uint8 on the host, whether it could be pinned)."""
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    pinned = not int(_cudart().cudaHostRegister(buffer.data_ptr(), nbytes, 0))
    if pinned:
        # Whoever reads the memory holds this very tensor.
        weakref.finalize(buffer, _unpin, buffer.untyped_storage())
    return buffer, pinned


def available_bytes() -> int:
    """Memory of the host that this process could still take: of the machine, or its container.

    Ranks on one host share it: each may take its part (torchrun and accelerate tell how many).
    """
    return _free_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free_bytes() -> int:
    free = int(psutil.virtual_memory().available)
    folder = Path("/sys/fs/cgroup")
    try:
        most = int((folder / "memory.max").read_text("ascii"))
        used = int((folder / "memory.current").read_text("ascii"))
    except (OSError, ValueError):  # no cgroup v2, or one without a limit ("max")
        return free
    return min(free, most - used)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _unpin(storage: torch.UntypedStorage) -> None:
    """Now, or with the next one: while a stream is recorded as a graph it would break that off."""
    _to_unpin.append(storage)
    if torch.cuda.is_current_stream_capturing():
        return
    while _to_unpin:
        _cudart().cudaHostUnregister(_to_unpin.pop().data_ptr())


class _AsSeenByTheGpu:
    """Pinned memory, for `torch.as_tensor` to make a CUDA tensor of; which keeps it alive."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.__cuda_array_interface__ = {
            "shape": (buffer.numel(),),
            "typestr": "|u1",
            "data": (buffer.data_ptr(), False),
            "version": 2,
        }


class OnHost:
    """A parameter whose data is moved to the host, until `undo`.

    Args:
        parameter: frozen, contiguous, on a CUDA device.

    Attributes:
        moved: False where the host has too little memory that can be pinned: it stays then.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        # Not held: FSDP puts a shard in its place, and the memory is to go then.
        self._parameter, self.device = weakref.ref(parameter), parameter.device
        data = parameter.data
        buffer, self.moved = pinned_buffer(data.nbytes)
        if not self.moved:
            return
        buffer.view(data.dtype).view(data.shape).copy_(data)
        mapped = torch.as_tensor(_AsSeenByTheGpu(buffer), device=self.device)
        parameter.data = mapped.view(data.dtype).view(data.shape)

    def undo(self) -> None:
        """Moves it back, unless somebody has moved it elsewhere by now."""
        parameter = self._parameter()
        if self.moved and parameter is not None and parameter.device == self.device:
            parameter.data = parameter.data.clone()


def embedding_table(model: Any) -> nn.Parameter | None:
    """The weight of `model`'s input embeddings where it can lie on the host, else None."""
    find = getattr(model, "get_input_embeddings", None)
    module = None if find is None else find()
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Embedding) or not isinstance(weight, nn.Parameter):
        return None
    if (
        not weight.is_cuda
        or weight.requires_grad
        or type(weight.data) is not Tensor
        or not weight.is_contiguous()
        or weight.nbytes < LEAST_BYTES
    ):
        return None
    uses = [p for p in model.parameters(recurse=True) if p.data_ptr() == weight.data_ptr()]
    return weight if len(uses) == 1 and holders(model, weight) == 1 else None


def holders(model: nn.Module, parameter: nn.Parameter) -> int:
    """Modules that hold `parameter` as their own: two where a head is tied to its table."""
    return sum(own is parameter for one in model.modules() for own in one.parameters(recurse=False))
