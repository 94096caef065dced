"""A training step that runs out of GPU memory is repeated with less to keep.

Under `fused_checkpointing: auto` the plan may be too hopeful: another process takes memory, or the
model allocates what nobody could foresee. Then the micro-batch is run again from its beginning:
its gradients are thrown away, those of the micro-batches before it are not touched, and dropout
draws the same masks. The plan stays at the cheaper mode from then on.
"""

import copy
import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lorafuse.plugin import log

__all__ = ["StepRepeater"]


class StepRepeater:
    """Stands around `trainer.training_step` of one run.

    Args:
        trainer: A transformers `Trainer`.
        checkpointing: The engine's `Checkpointing` of its model.

    Attributes:
        repeated: How many steps were run again.
    """

    def __init__(self, trainer: Any, checkpointing: Any) -> None:
        self.trainer, self.checkpointing = trainer, checkpointing
        self.repeated = 0
        self._step: Callable[..., Any] = trainer.training_step
        self._was_own = "training_step" in vars(trainer)
        trainer.training_step = self

    def detach(self) -> None:
        """Puts the trainer's own step back, unless somebody else stands around ours by now."""
        if vars(self.trainer).get("training_step") is not self:
            return
        if self._was_own:
            self.trainer.training_step = self._step
        else:
            del self.trainer.training_step

    def __call__(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        # The optimiser's list: a walk through the modules takes milliseconds of each step.
        trained = [p for group in self.trainer.optimizer.param_groups for p in group["params"]]
        before = [p.grad for p in trained]
        accumulates = any(grad is not None for grad in before)
        random = _random_state()
        while True:
            if accumulates:  # what is there already must not be added to by half a backward pass
                for p in trained:
                    p.grad = None
            try:
                # Trainers take labels and the like out of the mapping that they are given.
                given = copy.copy(inputs) if isinstance(inputs, Mapping) else inputs
                loss = self._step(model, given, *args, **kwargs)
                break
            except torch.OutOfMemoryError as error:
                for p, grad in zip(trained, before, strict=True):
                    p.grad = grad
                mode = self.checkpointing.cheaper()
                if mode is None:
                    raise
                said = str(error).splitlines()[0]
            # Here the error is gone, and with it the frames that held the step's tensors.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.repeated += 1
            log.warning(
                f"a step ran out of memory ({said}); it is run again with fused_checkpointing: "
                f"{mode}, which stays for the rest of the run"
            )
            _set_random_state(random)
        if accumulates:
            for p, grad in zip(trained, before, strict=True):
                if grad is not None:
                    p.grad = grad if p.grad is None else grad.add_(p.grad)
        return loss


def _random_state() -> tuple[Any, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return torch.get_rng_state(), cuda


def _set_random_state(state: tuple[Any, Any]) -> None:
    cpu, cuda = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
