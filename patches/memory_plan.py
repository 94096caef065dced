"""A step's memory, planned from its layers' sizes: its bytes, and which mode each layer gets.

Nothing here asks a GPU or a host: what is free, and what the link carries, is handed in. So
`lorafuse plan` decides by the same rules as a step that runs (`patches.checkpointing`).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lorafuse.patches.layer_sizes import LayerSizes
from lorafuse.patches.modes import MODES, OFF, OFFLOAD, SELECTIVE
from lorafuse.patches.offload import WINDOW
from lorafuse.patches.spilling import Rates, shares, spilled_layers

__all__ = ["EVERY_OTHER", "MARGIN", "VOCABULARY", "Batch", "Decision", "Spill", "spare_bytes"]

# Of the free memory, what is left: for fragments of the allocator and what cannot be known.
MARGIN = 0.04
VOCABULARY = 2**18  # where the head's is not known
# Of the layers, so that no two in a row send their gate/up to the host.
EVERY_OTHER = 0.5


class Spill(NamedTuple):
    """How gate/up may wait on the host.

    Attributes:
        rates: of the GPU and the link.
        host_bytes: that the host has for it, and for what `offload` takes.
    """

    rates: Rates
    host_bytes: float


class Decision(NamedTuple):
    """One entry a layer, in the order of the forward pass.

    Attributes:
        modes: of `MODES`.
        spilled: gate/up waits on the host.
    """

    modes: list[str]
    spilled: list[bool]

    @property
    def kept_gate_up(self) -> int:
        """In how many layers it is not computed again."""
        return self.modes.count(OFF) + sum(self.spilled)


@dataclass(frozen=True)
class Batch:
    """A step that is planned for.

    Attributes:
        layers: in the order of the forward pass.
        tokens: T.
        itemsize: bytes of an element, of what the products read and write.
        length: tokens of a row; None: T.
        vocabulary: V.
        accumulates: the adapters' gradients are there already.
        host_limit_bytes: of the host's memory, for what `offload` keeps there.
        stream: bytes of an element of the residual stream; None: as the others.
    """

    layers: Sequence[LayerSizes]
    tokens: int
    itemsize: int
    length: int | None = None
    vocabulary: int = VOCABULARY
    accumulates: bool = False
    host_limit_bytes: float = float("inf")
    stream: int | None = None

    @property
    def itemsizes(self) -> tuple[int, int]:
        """Of the products' tensors, of the residual stream's."""
        return self.itemsize, self.stream or self.itemsize

    @property
    def row(self) -> int:
        """Tokens of a row."""
        return self.length or self.tokens

    def taken(self, modes: Sequence[str]) -> list[int]:
        """Bytes of each layer that `offload` takes to the host: none of the last one's."""
        last = len(self.layers) - 1
        return [
            one.taken(self.tokens, self.row, *self.itemsizes) if mode == OFFLOAD and i < last else 0
            for i, (one, mode) in enumerate(zip(self.layers, modes, strict=True))
        ]

    def bytes(self, modes: Sequence[str], spilled: Sequence[bool] = ()) -> int:
        """What a step allocates from the first layer on.

        Args:
            modes: one a layer.
            spilled: whether gate/up of a layer goes to the host, one a layer; empty: of none.
        """
        layers, tokens, sizes = self.layers, self.tokens, self.itemsizes
        length = self.row
        last = len(layers) - 1
        gradients = 0 if self.accumulates else sum(one.gradients for one in layers)
        most = kept = before = 0
        taken = [0] * WINDOW  # by the layers so far
        backward = []
        for i, (one, mode, own) in enumerate(zip(layers, modes, self.taken(modes), strict=True)):
            spills = bool(spilled) and spilled[i]
            kept += one.kept(mode, tokens, length, *sizes)
            if i == last and mode == OFFLOAD:  # whose tensors stay
                kept += one.taken(tokens, length, *sizes)
            elif spills:
                own += one.gate_up_bytes(tokens, self.itemsize)
            taken.append(own)
            working = one.working(mode, tokens, *sizes, spills)
            # The embedding's output is a local variable of the model's forward, too.
            h = tokens * sizes[1] * one.hidden if i >= WINDOW and modes[0] == OFFLOAD else 0
            most = max(most, kept + h + sum(taken[-WINDOW:]) + working[0])
            # The layer's own are fetched, and those of the layer before.
            backward.append(kept + before + own + working[1] + gradients)
            before = own
            gradients -= 0 if self.accumulates else one.gradients
        leaving = sum(taken[-WINDOW:])  # on the GPU until backward fetches the first one back
        reach = max((i for i, own in enumerate(taken[WINDOW:]) if own), default=last)
        head = kept + layers[-1].head(tokens, self.vocabulary, *sizes)
        before_fetching = [*backward[reach + 2 :], head]
        return max(most, leaving + max(before_fetching), *backward)

    def spilled(
        self, modes: Sequence[str], free: float, spill: Spill, most: float = 1.0
    ) -> list[bool]:
        """Which layers' gate/up go to the host: as many as there is time and memory for.

        Args:
            modes: one a layer.
            free: bytes for all that the step allocates, from the first layer on.
            spill: what there is of either.
            most: of the layers; with `EVERY_OTHER` one's is not fetched while another's is there.
        """
        taken = self.taken(modes)
        # The last layer that computes again is the first to be asked for: its own would be late.
        first = max((i for i, mode in enumerate(modes) if mode != OFF), default=0)
        parts = [
            min(part, most) if i < first else 0.0
            for i, part in enumerate(
                shares(self.layers, taken, self.tokens, self.row, self.itemsize, spill.rates)
            )
        ]
        sizes = [one.gate_up_bytes(self.tokens, self.itemsize) for one in self.layers]

        def fits(chosen: list[bool]) -> bool:
            host = sum(taken) + sum(n for n, yes in zip(sizes, chosen, strict=True) if yes)
            return host <= spill.host_bytes and self.bytes(modes, chosen) <= free

        return spilled_layers(parts, fits)

    def plan(self, free: float, floor: str = OFF, spill: Spill | None = None) -> Decision:
        """The fastest mode of each layer that fits into `free` bytes.

        Args:
            free: bytes for all that the step allocates, from the first layer on.
            floor: no layer gets a faster mode.
            spill: how gate/up may wait on the host; None: it may not.

        Returns:
            Layers of one mode lie together, the fastest last: their memory is the first that
            backward frees. All `offload` where nothing fits.
        """
        count = len(self.layers)
        plain = Decision(self._modes(free, floor), [False] * count)
        if spill is None or plain.modes == [OFF] * count:
            return plain
        # With a layer's gate/up or two left free, others' can pass through.
        best = plain
        size = max(one.gate_up_bytes(self.tokens, self.itemsize) for one in self.layers)
        for room in (0, 1, 2, 3):
            modes = self._modes(free - room * size, floor)
            spilled = self.spilled(modes, free, spill)
            found = Decision(modes, spilled)
            if self.bytes(modes) <= free and found.kept_gate_up > best.kept_gate_up:
                best = found
        return best

    def _modes(self, free: float, floor: str) -> list[str]:
        allowed, count = MODES[MODES.index(floor) :], len(self.layers)
        for fast, slow in itertools.pairwise(allowed):
            # More layers in the faster mode take more: the most that fit are searched by halves.
            low, high = 0, count
            while low < high:
                n = (low + high + 1) // 2
                fits = self.bytes([slow] * (count - n) + [fast] * n) <= free
                low, high = (n, high) if fits else (low, n - 1)
            if low:
                return self._on_host([slow] * (count - low) + [fast] * low)
        return self._on_host([allowed[-1]] * count)

    def _on_host(self, modes: list[str]) -> list[str]:
        """`selective` in place of `offload` where the host may not hold more."""
        held = itertools.accumulate(self.taken(modes))
        return [
            SELECTIVE if mode == OFFLOAD and so_far > self.host_limit_bytes else mode
            for mode, so_far in zip(modes, held, strict=True)
        ]


def spare_bytes(free: float, total: float, allocated: float, budget: float | None) -> float:
    """What `auto` plans with: bytes that a step may allocate from its first layer on.

    Args:
        free: that the allocator could still give out.
        total: of the GPU.
        allocated: by now.
        budget: that the user allows; None: all.
    """
    if budget is None:
        return free - MARGIN * total
    return min(free, budget - allocated) - MARGIN * min(total, budget)
