"""What a batch's attention mask really says, found out once a batch and not once a layer.

torch's fast attention kernels take no dense mask, yet a mask of documents packed into one row, or
of padding, needs none: it says that each token attends to the tokens before it in its own document.
`DocumentFinder.of_mask` reads the [S, S] mask that a model has built, checks each entry of the rows
that count, and gives the documents, or None where the mask says anything else (a sliding window,
prefix attention).

Rows of padding behind the documents do not count: nobody attends to their tokens and mostly they
predict no label, so that a document of their own, in place of what the mask has for them, changes
nothing that a loss sees. Where they do (`label_places`), the mask is taken at its word.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafuse.kernels.varlen_attention import Documents
from lorafuse.patches.label_places import LabelPlaces

__all__ = ["DocumentFinder", "Layout"]

# A model of sliding and full attention has two masks in turn.
_KINDS = 4
# Elements of the mask that are compared at a time: the temporaries stay at some 64 MB.
_CHUNK_ELEMENTS = 2**26


@dataclass(frozen=True)
class Layout:
    """How the documents lie in the batch.

    Attributes:
        documents: each run of padding counts as one.
        plain: each row is one document from its first token on, with padding behind it or none:
            then plain causal attention is right.
    """

    documents: Documents
    plain: bool


class DocumentFinder:
    """Finds the layout of a batch, and remembers it for the other layers of the same forward."""

    def __init__(self, places: LabelPlaces | None = None) -> None:
        self._seen: list[_Seen] = []
        self.places = places or LabelPlaces()

    def __getstate__(self) -> dict[str, Any]:
        return {"_seen": [], "places": self.places}

    def of_mask(self, mask: Tensor, batch: int) -> Layout | None:
        """The layout that a bool mask [batch or 1, 1, S, S] stands for (True: attend)."""
        return self._find(mask, batch, _read_mask)

    def of_positions(self, positions: Tensor, batch: int) -> Layout | None:
        """The layout of `positions` [batch or 1, S], which are 0 where a document begins."""
        return self._find(positions, batch, _read_positions)

    def _find(
        self, source: Tensor, batch: int, read: Callable[[Tensor, int, LabelPlaces], Layout | None]
    ) -> Layout | None:
        for seen in self._seen:
            if seen.is_of(source):
                return seen.layout
        layout = read(source, batch, self.places)
        one = _Seen(weakref.ref(source), source._version, layout)
        self._seen = [one, *self._seen][:_KINDS]
        return layout


@dataclass(frozen=True, eq=False)
class _Seen:
    source: "weakref.ref[Tensor]"
    version: int
    layout: Layout | None

    def is_of(self, source: Tensor) -> bool:
        """Whether it was read from this very data.

        Checkpointing hands the same storage on in another tensor. As long as the first one lives,
        no other batch can lie at its address.
        """
        first = self.source()
        return (
            first is not None
            and first.data_ptr() == source.data_ptr()
            and first.shape == source.shape
            and first.dtype == source.dtype
            and first._version == self.version
        )


def _read_mask(mask: Tensor, batch: int, places: LabelPlaces) -> Layout | None:
    rows, heads, length, keys = mask.shape
    if mask.dtype != torch.bool or heads != 1 or rows not in (1, batch) or length != keys:
        return None
    attends = mask[:, 0]
    real = attends.diagonal(dim1=1, dim2=2)
    begins = torch.ones_like(real)
    # The token before belongs to another document where it is not attended to.
    before = attends.diagonal(offset=-1, dim1=1, dim2=2)
    begins[:, 1:] = torch.where(real[:, 1:] & real[:, :-1], ~before, real[:, 1:] != real[:, :-1])
    place = torch.arange(length, device=mask.device)
    start = torch.where(begins, place, 0).cummax(1).values
    # Padding in front of a token predicts that token, label and all: such rows do count.
    wrong = (real[:, 1:] & ~real[:, :-1]).any()
    predicts = places.predicts(real.expand(batch, length))
    if predicts is not None:
        wrong |= (predicts & ~real).any()
    step = max(1, _CHUNK_ELEMENTS // (rows * length))
    for first in range(0, length, step):
        part = slice(first, first + step)
        document = (place <= place[part, None]) & (place >= start[:, part, None])
        wrong |= ((attends[:, part] != document) & real[:, part, None]).any()
    # One copy to the host for all that is to be known, at a time when the GPU has little to do.
    told = torch.cat([wrong.view(1), begins.flatten(), real.flatten()]).cpu()
    if told[0]:
        return None
    begins, real = told[1:].view(2, rows, length)
    return _layout(begins, real, batch, mask.device)


def _read_positions(positions: Tensor, batch: int, _: LabelPlaces) -> Layout | None:
    if positions.dim() != 2 or positions.shape[0] not in (1, batch):
        return None
    begins = (positions == 0).cpu()
    if not begins[:, 0].all():
        return None  # a row that goes on with a document of another
    return _layout(begins, torch.ones_like(begins), batch, positions.device)


def _layout(begins: Tensor, real: Tensor, batch: int, device: torch.device) -> Layout:
    """From [rows, S] on the CPU: where documents begin, and what is no padding."""
    begins, real = begins.expand(batch, -1), real.expand(batch, -1)
    starts = tuple(begins.flatten().nonzero().flatten().tolist())
    plain = bool(real[:, 0].all()) and not bool((begins & real)[:, 1:].any())
    return Layout(Documents(starts, begins.numel(), device), plain)
