"""`LorafuseCallback`: one line after a TRL or transformers trainer is built."""

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from lorafuse.plugin.config import FuseConfig
from lorafuse.plugin.fuse import COPIED, fuse_with, resolve_config
from lorafuse.plugin.manager import Plugins
from lorafuse.plugin.run import RunCallback


class LorafuseCallback(RunCallback):
    """Fuses the trainer's model when training begins, and follows the run (see `RunCallback`).

    Works with every trainer that is a transformers `Trainer`. By then the optimiser exists and the
    model may be wrapped: nothing is created that has parameters, and the modules are reached
    through the wrapper. The model stays fused afterwards; `callback.report.unfuse()` restores it.

    Args:
        config: The flags; or
        **flags: the same flags as keywords. None at all: everything is on.

    Raises:
        FuseConfigError: A wrong flag.
        FuseError: A third party's plugin does not load.
    """

    def __init__(self, config: FuseConfig | None = None, **flags: Any) -> None:
        self.config = resolve_config(config, flags)
        super().__init__(Plugins(self.config))

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        aside = COPIED if args.n_gpu > 1 else None
        self.report = fuse_with(kwargs["model"], self.config, self.plugins, aside)
        super().on_train_begin(args, state, control, **kwargs)
