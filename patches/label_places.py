"""Which places of a batch a loss reads: those that predict a label.

Hidden states at padding are nobody's, so that attention may give padding what is cheapest, or leave
it out: unless a caller left labels on it (`labels = input_ids.clone()`), or padding stands in front
of a token that is labelled and so predicts it. Who decides about padding asks here. Known is what
the causal LM was called with; of a forward without labels nothing is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse.patches.bind import TracedForward

__all__ = ["IGNORED", "LabelPlaces", "WatchedLabels"]

IGNORED = -100  # the label of no token


class LabelPlaces:
    """Shared by a model's fused forwards."""

    def __init__(self) -> None:
        self._labels: tuple[Tensor, bool] | None = None  # and whether they are shifted

    def __getstate__(self) -> dict[str, Any]:
        return {"_labels": None}

    @contextmanager
    def told(self, labels: Any, shifted: Any) -> Iterator[None]:
        """A forward pass.

        Args:
            labels: [B, S], each of the token at its own place.
            shifted: [B, S], each at the place that predicts it; comes before `labels`.
        """
        before = self._labels
        given = labels if shifted is None else shifted
        self._labels = (given, shifted is not None) if isinstance(given, Tensor) else None
        try:
            yield
        finally:
            self._labels = before

    def predicts(self, like: Tensor) -> Tensor | None:
        """[B, S] bool on the device of `like` [B, S]: the places that predict a label; None where
        that is not known."""
        if self._labels is None or self._labels[0].shape != like.shape:
            return None
        labels, shifted = self._labels
        found = labels.to(like.device) != IGNORED
        return found if shifted else torch.nn.functional.pad(found[:, 1:], (0, 1))


class WatchedLabels(TracedForward):
    """The forward of a causal LM whose loss is not fused: the model's own, with its labels told."""

    def __init__(self, module: nn.Module, places: LabelPlaces) -> None:
        super().__init__(module)
        self.places = places

    def call(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.arguments(args, kwargs)
        with self.places.told(arguments.get("labels"), arguments.get("shift_labels")):
            return self.stock(*args, **kwargs)
