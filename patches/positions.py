"""Up to which position a block is proven: some change what they compute far out.

Ministral 3 scales its queries from a position on (16,384 as released). Its blocks are fused as
Llama's are below it, and a batch that reaches it goes the stock way.
"""

import weakref

import torch
from torch import Tensor

from lorafuse.patches.bind import Unsupported


class PositionLimit:
    """Shared by the fused forwards of a model that are proven below the same position.

    Args:
        below: positions from this one on are not proven.
    """

    def __init__(self, below: int) -> None:
        self.below = below
        self._seen: tuple[weakref.ref[Tensor], int, int] | None = None

    def __getstate__(self) -> dict[str, int]:
        return {"below": self.below}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["below"])  # type: ignore[misc]

    def check(self, positions: object) -> None:
        """Raises Unsupported where a call's positions are too far out, or not known."""
        if not isinstance(positions, Tensor):
            raise Unsupported(
                "it was called without the position_ids that its proof has a limit of"
            )
        if self.farthest(positions) >= self.below:
            raise Unsupported(f"it computes something else from position {self.below} on")

    def farthest(self, positions: Tensor) -> int:
        """The largest position: one wait for the GPU a batch, not one a layer."""
        version = 0 if positions.is_inference() else positions._version
        if self._seen is not None:
            source, seen_version, farthest = self._seen
            if source() is positions and seen_version == version:
                return farthest
        farthest = int(torch.max(positions))
        self._seen = weakref.ref(positions), version, farthest
        return farthest
