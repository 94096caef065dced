"""What lorafuse does while a trainer runs: the report after step 1, metrics in the trainer's logs.

transformers calls callbacks in the order in which they were added, and hands each the same dict of
logs. The reporting ones (W&B, MLflow, TensorBoard, the progress bar) come first, so ours goes to
the front of the handler's list when training begins; what it adds to the dict then reaches all of
them. A callback is never given its handler: it is found in the frame that calls us.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from lorafuse.plugin import log
from lorafuse.plugin.fuse import add_optimizer, unwrap
from lorafuse.plugin.manager import Plugins
from lorafuse.plugin.out_of_memory import StepRepeater
from lorafuse.plugin.report import FILE_NAME, FuseReport
from lorafuse.plugin.throughput import PeakMemory, Throughput

TOKENS_PER_SECOND = "lorafuse/tokens_per_second"
PEAK_MEMORY_GB = "lorafuse/peak_memory_gb"


class RunCallback(TrainerCallback):
    """Follows one run of a fused model.

    Logs `lorafuse/tokens_per_second` (non-padding tokens that went forward in training, of this
    process) and `lorafuse/peak_memory_gb` with every training log, and writes
    `lorafuse_report.json` into the output directory: after fusing, after step 1 and at the end.

    Args:
        plugins: The plugins of this run.
        report: What was fused.
    """

    def __init__(self, plugins: Plugins, report: FuseReport | None = None) -> None:
        self.plugins = plugins
        self.report = report
        self._throughput = Throughput()
        self._peak = PeakMemory()
        self._repeater: StepRepeater | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        report = self._reported()
        model, _ = unwrap(kwargs["model"])
        add_optimizer(report, kwargs.get("optimizer"))
        self._go_first()
        self._checkpoint(report, args)
        self._throughput.attach(model)
        self._peak = PeakMemory()
        _write(report, args)
        log.info("what was fused\n" + report.text())
        self.plugins.call("lorafuse_train_begin", model=model, report=report)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._throughput.start_stretch()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        report = self._reported()
        report.steps += 1
        self._peak.note()  # before the trainer logs, for it may count anew then
        if report.steps == 1:
            _write(report, args)
            log.info("what was called\n" + report.text())
            report.check_called()
        self.plugins.call("lorafuse_step_end", report=report, step=report.steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs:
            return
        metrics = {
            TOKENS_PER_SECOND: self._throughput.end_stretch(),
            PEAK_MEMORY_GB: self._peak.note(),
        }
        known = {name: round(value, 4) for name, value in metrics.items() if value is not None}
        logs.update(known)
        # The trainer has put a copy of the dict there already.
        state.log_history[-1].update(known)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._throughput.drop_stretch()

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._throughput.drop_stretch()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._throughput.detach()
        if self._repeater is not None:
            self._repeater.detach()
            self._repeater = None
        _write(self._reported(), args)

    def _reported(self) -> FuseReport:
        if self.report is None:
            raise RuntimeError("the model was never fused: on_train_begin did not run")
        return self.report

    def _checkpoint(self, report: FuseReport, args: TrainingArguments) -> None:
        """Stands in for the trainer's own checkpointing, which is on by now if it ever will be."""
        checkpointing = report.checkpointing
        if checkpointing is None:
            return
        replaced = checkpointing.replace_trainers()
        if replaced is not None:
            report.note(replaced)
        if report.config.fused_checkpointing != "auto":
            return
        # The others would wait for a rank that starts anew; DeepSpeed keeps gradients of its own.
        trainer = next((one for one in _callers() if isinstance(one, Trainer)), None)
        alone = args.world_size == 1 and not getattr(trainer, "is_deepspeed_enabled", False)
        if alone and trainer is not None and self._repeater is None:
            self._repeater = StepRepeater(trainer, checkpointing)

    def _go_first(self) -> None:
        for handler in _callers():
            if isinstance(handler, CallbackHandler) and self in handler.callbacks:
                # A new list: the handler is iterating over the old one.
                handler.callbacks = [self, *(one for one in handler.callbacks if one is not self)]
                return
        log.warning(
            f"{TOKENS_PER_SECOND} and {PEAK_MEMORY_GB} reach state.log_history and the callbacks "
            "that were added later, but not W&B, MLflow and TensorBoard: this trainer calls its "
            "callbacks in a way of its own"
        )


def _callers() -> Iterator[Any]:
    """`self` of each function on the stack that has one, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame.f_locals.get("self")
        frame = frame.f_back


def _write(report: FuseReport, args: TrainingArguments) -> None:
    if log.is_main_process() and args.output_dir is not None:
        report.to_json(Path(args.output_dir) / FILE_NAME)
