"""Gate/up that waits on the host, instead of being computed again.

The product that makes gate/up is more than two thirds of what `selective` and `offload` compute a
second time, while the link to the host is idle for most of a step. So of some layers gate/up goes
to pinned memory in forward and comes back in backward: as many as the link carries while the GPU
computes, evenly among the layers, so that copies do not pile up. An H100 on PCIe 5 has time for a
third of the layers in `offload`, and for two thirds where nothing else is copied.

What the link and the GPU do in a second is measured once, in the first step that may use it. The
choice changes how long a step takes and not its numbers: what comes back has the bits that were
computed.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from lorafuse.patches.host_memory import pinned_buffer
from lorafuse.patches.layer_sizes import LayerSizes

__all__ = ["Rates", "evenly", "measured_rates", "shares", "spilled_layers"]

_COPIED_BYTES = 2**26
_ROWS = 4096  # of the product that is timed
# What a layer's forward takes at least, beside its products alone in a burst: in a long run a GPU's
# clock is lower, and norms and activations take time, too. (With up to 1.35, and so with more
# layers, an H100 was no faster at 2 x 4096 tokens of an 8B model.)
_LONGER = 1.05
# Parts of what the link has time for that are tried, where memory is short.
_SCALES = (1.0, 0.75, 0.5, 0.25, 0.1)


class Rates(NamedTuple):
    """What a GPU and its link to the host do in a second.

    Attributes:
        flops: of a large 16-bit product.
        to_host: bytes; 0 where the host's memory cannot be pinned.
    """

    flops: float
    to_host: float


@lru_cache(maxsize=64)
def measured_rates(index: int) -> Rates:
    """Of a GPU and its link, measured once a process; waits for the GPU."""
    device = torch.device("cuda", index)
    buffer, pinned = pinned_buffer(_COPIED_BYTES)
    if not pinned:
        return Rates(1.0, 0.0)
    with torch.cuda.device(device), torch.no_grad():
        # Numbers without a pattern, for zeros cost a GPU no power; drawn from no generator.
        x = torch.arange(_ROWS**2, device=device).mul_(7919).remainder_(1009).sub_(504).div(504.0)
        x = x.view(_ROWS, _ROWS).half()
        y = torch.empty_like(x)
        product = _seconds(lambda: torch.mm(x, x, out=y), 8)
        flat = x.view(-1).view(torch.uint8)
        part = min(flat.numel(), _COPIED_BYTES)
        copy = _seconds(lambda: buffer[:part].copy_(flat[:part], non_blocking=True), 4)
    return Rates(2 * _ROWS**3 / product, part / copy)


def _seconds(run: Callable[[], object], times: int) -> float:
    run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1e3 / times


def shares(
    layers: Sequence[LayerSizes],
    taken: Sequence[int],
    tokens: int,
    length: int,
    itemsize: int,
    rates: Rates,
) -> list[float]:
    """What part of each layer's gate/up the link carries while the layer's forward computes.

    Args:
        layers: in the order of the forward pass.
        taken: bytes of each that go to the host already.
        tokens: T.
        length: of them, in a row.
        itemsize: bytes of an element.
        rates: of the GPU and the link.
    """
    found = []
    for one, busy in zip(layers, taken, strict=True):
        seconds = _LONGER * one.forward_flops(tokens, length) / rates.flops
        carried = rates.to_host * seconds - busy
        found.append(min(1.0, max(0.0, carried / one.gate_up_bytes(tokens, itemsize))))
    return found


def evenly(parts: Sequence[float]) -> list[bool]:
    """Which layers' gate/up go to the host, as many as the parts add up to."""
    found, due = [], 0.0
    for part in parts:
        due += part
        found.append(due >= 1.0 - 1e-9)  # three times a third
        due -= found[-1]
    return found


def spilled_layers(parts: Sequence[float], fits: Callable[[list[bool]], bool]) -> list[bool]:
    """The most of them that fit.

    Args:
        parts: of `shares`, 0 for a layer whose gate/up is not to go.
        fits: whether the memory has room for these.
    """
    for scale in _SCALES:
        chosen = evenly([scale * part for part in parts])
        if any(chosen) and fits(chosen):
            return chosen
    return [False] * len(parts)
