"""Tokens per second and peak memory of a training run, without a GPU synchronisation per step.

Tokens are counted by a forward pre-hook on the model instance, from the batches that really go
through it: the non-zero entries of a 2-D attention mask, or every position where there is none
(packed batches). Only forwards that train count: those of evaluation, generation and a reference
pass do not. The count of a GPU batch stays on the GPU until the trainer logs, where the trainer
waits for the GPU anyway.

A rate covers a stretch: from the first step after the last log, evaluation or save, to the log.
Stretches that an evaluation or a save cuts off are dropped, for their time is not training time.
"""

import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorafuse.kernels.eager import never_traced

GB = 1e9


class Throughput:
    """Counts what goes through one model."""

    def __init__(self) -> None:
        self._handle: RemovableHandle | None = None
        self._started_s: float | None = None
        self._tokens: int | Tensor = 0

    def attach(self, model: nn.Module) -> None:
        """Starts to count the tokens of `model`; of any model before it, no longer."""
        self.detach()
        self._handle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def detach(self) -> None:
        """Takes the counting off the model."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self.drop_stretch()

    def start_stretch(self) -> None:
        """An optimiser step begins; a stretch that is under way goes on."""
        if self._started_s is None:
            self._started_s = time.perf_counter()
            self._tokens = 0

    def drop_stretch(self) -> None:
        """Something other than training took time."""
        self._started_s = None

    def end_stretch(self) -> float | None:
        """Ends the stretch; this process's tokens per second, None without a whole stretch."""
        if self._started_s is None:
            return None
        tokens = int(self._tokens)
        seconds = time.perf_counter() - self._started_s
        self._started_s = None
        return tokens / seconds if tokens else None

    @never_traced
    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        mask = kwargs.get("attention_mask")
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self._tokens = self._tokens + mask.count_nonzero()
        elif isinstance(ids, Tensor):
            self._tokens = self._tokens + ids.numel()
        elif isinstance(embeddings := kwargs.get("inputs_embeds"), Tensor):
            self._tokens = self._tokens + embeddings.shape[:-1].numel()


class PeakMemory:
    """The peak of a run, also where somebody counts peaks anew within it, as Axolotl does whenever
    it logs."""

    def __init__(self) -> None:
        self._gb: float | None = None

    def note(self) -> float | None:
        """The peak so far, in GB of 1e9 bytes: allocated on the GPU, else resident; None where
        nobody can tell."""
        now = _peak_memory_gb()
        if now is not None:
            self._gb = max(now, self._gb or 0)
        return self._gb


def _peak_memory_gb() -> float | None:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GB
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GB
