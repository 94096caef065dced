"""The hooks: what a plugin may add, and the stages of a run at which it is called.

A plugin is a module or an object with functions of these names, marked with
`lorafuse.plugin.hookspecs.hookimpl` (the same as `pluggy.HookimplMarker("lorafuse")`), and named in
its distribution's entry-point group `lorafuse`. An implementation takes any subset of a hook's
arguments. lorafuse's own features come through the same hooks (`builtin.py`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pluggy
from torch import nn

if TYPE_CHECKING:
    from lorafuse.plugin.config import FuseConfig
    from lorafuse.plugin.report import FuseReport

PROJECT = "lorafuse"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def lorafuse_structures() -> Sequence[Any]:  # type: ignore[empty-body]
    """Recognisers of blocks (`patches/structure.py` says what one is); asked before our own."""


@hookspec
def lorafuse_weight_formats() -> Sequence[Any]:  # type: ignore[empty-body]
    """Readers of weight and quantisation formats (`patches/weights.py`); asked before our own."""


@hookspec
def lorafuse_model_built(model: nn.Module, config: "FuseConfig") -> None:
    """The base model stands, without adapters. Axolotl only: in TRL no callback sees that."""


@hookspec
def lorafuse_adapter_attached(model: nn.Module, config: "FuseConfig") -> None:
    """The model carries its adapters and is about to be fused; nothing is replaced yet."""


@hookspec
def lorafuse_trainer_built(trainer: Any, config: "FuseConfig") -> None:
    """The trainer stands, the model is not fused yet. Axolotl only: no callback sees a trainer."""


@hookspec
def lorafuse_train_begin(model: nn.Module, report: "FuseReport") -> None:
    """Training is about to start on the fused model."""


@hookspec
def lorafuse_step_end(report: "FuseReport", step: int) -> None:
    """An optimiser step is done; `step` counts from 1 in this process."""
