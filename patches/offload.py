"""Tensors that wait on the host between forward and backward.

`Offloader.take` copies a tensor's storage to pinned host memory on a stream of its own, while the
GPU goes on computing; `HostCopy.prefetch` starts the way back, one layer before it is needed. The
GPU's memory is freed when its copy is done: the compute stream waits for that only where copies
fall behind by more than two layers, for what some layers send (gate/up) takes longer than a layer.

Host buffers are pinned exactly as large as they need to be (torch's own pinned allocator rounds up
to powers of two) and used again in the next step. All copies of a device run on one stream, in
order: so a buffer that comes back into use is overwritten only after it was read.

On a CPU there is nowhere to go: tensors stay where they are.
"""

from collections import defaultdict, deque
from typing import Any

import torch
from torch import Tensor

from lorafuse.patches.host_memory import pinned_buffer

__all__ = ["WINDOW", "HostCopy", "Offloader"]

# Layers whose tensors may be on their way at a time, the one that runs among them.
WINDOW = 3


class _Pool:
    """Pinned buffers by size, free to be used."""

    def __init__(self) -> None:
        self.free: defaultdict[int, list[Tensor]] = defaultdict(list)
        self.unpinned = 0  # buffers that could not be pinned

    def get(self, nbytes: int) -> Tensor:
        """[nbytes] uint8, pinned."""
        if self.free[nbytes]:
            return self.free[nbytes].pop()
        # Where it cannot be pinned, copies are still right, only slower: the host waits for them.
        buffer, pinned = pinned_buffer(nbytes)
        self.unpinned += not pinned
        return buffer

    @property
    def free_bytes(self) -> int:
        """Of buffers that nobody uses now."""
        return sum(size * len(buffers) for size, buffers in self.free.items())

    def put(self, buffer: Tensor) -> None:
        self.free[buffer.numel()].append(buffer)


class Offloader:
    """Copies of one model's activations, on one device.

    Args:
        device: where the tensors come from and go back to.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.stream: Any = torch.cuda.Stream(device) if self.on_gpu else None  # type: ignore[no-untyped-call]
        self.pool = _Pool()
        self._leaving: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self._layer: deque[int] = deque([0] * WINDOW)

    def next_layer(self) -> None:
        """A layer begins: what the last but two has left is freed."""
        if not self.on_gpu:
            return
        stale = self._layer.popleft()
        for _ in range(stale):
            done, _tensor = self._leaving.popleft()
            torch.cuda.current_stream(self.device).wait_event(done)
        self._layer.append(0)

    def drain(self) -> None:
        """Backward begins to fetch: the last layers' tensors are freed, too."""
        while self._leaving:
            done, _tensor = self._leaving.popleft()
            torch.cuda.current_stream(self.device).wait_event(done)
        self._layer = deque([0] * WINDOW)

    def take(self, tensor: Tensor, once: bool = False) -> "HostCopy":
        """Starts the copy of `tensor`'s whole storage to the host.

        Args:
            tensor: on the device.
            once: it is asked for once, and is freed with what was given then.
        """
        storage = tensor.untyped_storage()
        flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        copy = HostCopy(self, flat, once)
        if not self.on_gpu:
            copy.device_copy = flat
            return copy
        assert self.stream is not None
        written = torch.cuda.current_stream(self.device).record_event()
        self.stream.wait_event(written)
        with torch.cuda.stream(self.stream):
            copy.host.copy_(flat, non_blocking=True)
            done = self.stream.record_event()
        self._leaving.append((done, flat))
        self._layer[-1] += 1
        return copy


class HostCopy:
    """One storage on the host, and on the device again when it is needed."""

    def __init__(self, offloader: Offloader, flat: Tensor, once: bool = False) -> None:
        self.offloader, self.device, self.nbytes = offloader, flat.device, flat.numel()
        self.once = once and offloader.on_gpu
        self.host = offloader.pool.get(self.nbytes) if offloader.on_gpu else flat
        self.device_copy: Tensor | None = None
        self._ready: torch.cuda.Event | None = None

    def prefetch(self) -> None:
        """Starts the copy back to the device."""
        if self.device_copy is not None:
            return
        stream = self.offloader.stream
        self.offloader.drain()
        self.device_copy = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
        # The memory may have been another tensor's until just now.
        stream.wait_event(torch.cuda.current_stream(self.device).record_event())
        with torch.cuda.stream(stream):
            self.device_copy.copy_(self.host, non_blocking=True)
            self._ready = stream.record_event()

    def on_device(self) -> torch.UntypedStorage:
        """The storage on the device; the current stream waits for its copy."""
        self.prefetch()
        assert self.device_copy is not None
        if self._ready is not None:
            torch.cuda.current_stream(self.device).wait_event(self._ready)
            self._ready = None
        storage = self.device_copy.untyped_storage()
        if self.once:  # who asks again gets another copy of the host's
            self.device_copy = None
        return storage

    def __del__(self) -> None:
        if not self.offloader.on_gpu:
            return
        if self._ready is not None:  # fetched in vain: its memory goes back after the copy
            torch.cuda.current_stream(self.device).wait_event(self._ready)
        self.offloader.pool.put(self.host)
