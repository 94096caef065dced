"""One system in one process of its own: builds the model, trains some steps, measures them.

    python -m lorafuse.plugin.bench_worker < JOB.json

Started by `lorafuse bench`, often before there is a job: until it comes, the GPU is not touched; if
none comes, it ends. Writes one JSON object a line, each with its `event`: `machine`,
`stage` (what comes next), and at last one of `done`, `out of memory`, `unsupported`, `failed`. The
exit code is 0 for all of them; another one is a crash.
"""

import gc
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TextIO

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lorafuse.patches.layer_graphs import WARM
from lorafuse.patches.structure import recognise_experts
from lorafuse.plugin.bench_images import described, row_images, takes_images
from lorafuse.plugin.bench_job import Job
from lorafuse.plugin.bench_model import adapted, base_model, inputs
from lorafuse.plugin.bench_systems import UnsupportedError, patch_base, patch_model
from lorafuse.plugin.config import GRAPHS
from lorafuse.plugin.geometries import find_model

Emit = Callable[..., None]
LEARNING_RATE = 1e-5
MAX_NORM = 1.0
# Untimed: the first compiles and tunes, the second still finds caches to fill.
WARM_UP = 2


def warm_up(job: Job) -> int:
    """Untimed steps, of every system alike. Graphs are recorded after some more."""
    return WARM_UP + (WARM if job.flags.get(GRAPHS) else 0)


def make_optimizer(model: PeftModel, device: torch.device) -> Any:
    """8-bit AdamW where it runs, else torch's."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if device.type == "cuda":
        try:
            import bitsandbytes as bnb
        except ImportError:
            return torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
        return bnb.optim.AdamW8bit(trained, lr=LEARNING_RATE)
    return torch.optim.AdamW(trained, lr=LEARNING_RATE)


@dataclass(frozen=True)
class Repeated:
    """Whole steps that followed each other, and the peaks over them; GB = 1e9 bytes, 0 on a
    CPU."""

    step_ms: list[float]
    allocated_GB: float
    reserved_GB: float


class Training:
    """Steps as transformers' Trainer makes them: bf16 autocast, clipped gradients.

    All steps see the same tokens and images, in a fresh copy. So the loss falls, and an optimiser
    that does nothing is seen.
    """

    def __init__(self, model: PeftModel, optimizer: Any, job: Job) -> None:
        self.model, self.optimizer, self.job = model, optimizer, job
        self.device = torch.device(job.device)
        self.on_gpu = self.device.type == "cuda"
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.batch = inputs(job, model.config)
        self.numbers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def backward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and gradient norm; the clipped gradients stay on the parameters."""
        inputs = {name: tensor.to(self.device) for name, tensor in self.batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(**inputs, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, MAX_NORM)
        return loss.detach(), norm.detach()

    def step(self) -> None:
        numbers = self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.numbers.append(numbers)

    def timed_step(self) -> float:
        """Seconds, with all of the GPU's work."""
        self.wait()
        start = time.perf_counter()
        self.step()
        self.wait()
        return time.perf_counter() - start

    def timed_steps(self, count: int) -> list[float]:
        """Seconds of each of `count` steps that follow each other as in training.

        On a GPU the host goes on to the next step without waiting, as trainers do: a step lasts
        from the end of the one before to its own end on the GPU, gaps and all.
        """
        if not self.on_gpu:
            return [self.timed_step() for _ in range(count)]
        marks: list[Any] = [
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(count + 1)
        ]
        marks[0].record()
        for mark in marks[1:]:
            self.step()
            mark.record()
        self.wait()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]

    def repeated(self, count: int, warm_up: int) -> Repeated | None:
        """`timed_steps` after untimed ones; None, and no gradients, where memory runs out."""
        allocated = reserved = 0.0
        try:
            for _ in range(warm_up):
                self.timed_step()
            if self.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            steps = [1e3 * one for one in self.timed_steps(count)]
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            return None
        self.check()
        if self.on_gpu:
            allocated = torch.cuda.max_memory_allocated() / 1e9
            reserved = torch.cuda.max_memory_reserved() / 1e9
        return Repeated(steps, allocated, reserved)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def check(self) -> tuple[float, float]:
        """Loss and gradient norm of the last step, as numbers."""
        return self.checked(1)[0]

    def checked(self, count: int) -> list[tuple[float, float]]:
        """Loss and gradient norm of the last `count` steps, as numbers."""
        found = []
        for i, one in enumerate(self.numbers[-count:], start=len(self.numbers) - count + 1):
            loss, norm = (float(x) for x in one)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise FloatingPointError(f"step {i}: the loss is {loss}, the gradient norm {norm}")
            found.append((loss, norm))
        return found


def experts_by(base: PreTrainedModel) -> str | None:
    """transformers' way to compute the experts of a mixture; None: there are none."""
    if all(recognise_experts(module) is None for module in base.modules()):
        return None
    return str(getattr(base.config, "_experts_implementation", "unknown"))


def images_of(base: PreTrainedModel, job: Job) -> str | None:
    """What a row's images are; None: it is of text alone."""
    if not takes_images(base.config):
        return None
    return described(row_images(base.config, job.tokens), job.tokens)


def measure(job: Job, emit: Emit) -> dict[str, Any]:
    """Builds, patches, trains; the numbers of all steps."""
    device = torch.device(job.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        emit("machine", gpu=name, free_GB=free / 1e9, total_GB=total / 1e9)
    emit("stage", stage="building the model")
    base = base_model(find_model(job.model, job.layers), job)
    variant = patch_base(base, job)
    model = adapted(base, job)
    optimizer = make_optimizer(model, device)
    training = Training(model, optimizer, job)
    gc.collect()
    result: dict[str, Any] = {
        "variant": variant,
        "attention": base.config._attn_implementation,
        "experts": experts_by(base),
        "images": images_of(base, job),
        "optimizer": f"{type(optimizer).__module__.split('.')[0]}.{type(optimizer).__name__}",
        "model_class": type(base).__name__,
        "model_GB": torch.cuda.memory_allocated() / 1e9 if on_gpu else None,
    }
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    emit("stage", stage="the first step")
    start = time.perf_counter()
    report = patch_model(model, optimizer, job)
    training.wait()
    result["setup_s"] = time.perf_counter() - start
    result["first_step_s"] = training.timed_step()
    numbers = [training.check()]
    if on_gpu:
        result["first_step_peak_allocated_GB"] = torch.cuda.max_memory_allocated() / 1e9
        # What only building and tuning needed is not to count as reserved by the steps. Here, not
        # after the warm-up: the next step asks the driver for its memory anew, which takes time.
        torch.cuda.empty_cache()
    for _ in range(warm_up(job) - 1):
        training.step()
        numbers.append(training.check())
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    emit("stage", stage=f"{job.steps} steps")
    times = training.timed_steps(job.steps)
    numbers += training.checked(job.steps)
    result["step_ms"] = [1e3 * one for one in times]
    result["losses"] = [loss for loss, _ in numbers]
    result["gradient_norms"] = [norm for _, norm in numbers]
    if on_gpu:
        result["peak_allocated_GB"] = torch.cuda.max_memory_allocated() / 1e9
        result["peak_reserved_GB"] = torch.cuda.max_memory_reserved() / 1e9
    if job.profile:
        emit("stage", stage="profiling a step")
        result["profile"] = profile(training, job.profile)
    if report is not None:
        report.steps = len(numbers)
        result["report"] = report.to_dict()
    return result


def profile(training: Training, rows: int) -> dict[str, Any]:
    """One further step: the GPU's busy time and its costliest kernels."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        wall_s = training.timed_step()
    # Annotations (an optimiser's step) lie over the kernels that they span.
    kernels = [
        event
        for event in trace.events() or []
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
    ]
    spans = ((event.time_range.start, event.time_range.end) for event in kernels)
    sums: dict[str, tuple[float, int]] = {}
    for event in kernels:
        total, count = sums.get(event.name, (0.0, 0))
        sums[event.name] = (total + event.time_range.elapsed_us() / 1e3, count + 1)
    costliest = sorted(sums.items(), key=lambda item: -item[1][0])[:rows]
    return {
        "busy_ms": busy(spans) / 1e3,
        "wall_ms": 1e3 * wall_s,
        "kernels": [{"name": n, "ms": ms, "count": count} for n, (ms, count) in costliest],
    }


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the spans lasts: kernels of several streams may overlap."""
    total, until = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def is_out_of_memory(error: BaseException) -> bool:
    """Of the GPU or the CPU; extensions raise it as a plain RuntimeError."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate" in said)
    )


def work(job: Job, emit: Emit) -> None:
    """`measure`, whose end is an event in any case."""
    try:
        emit("done", **measure(job, emit))
    except UnsupportedError as error:
        emit("unsupported", error=str(error))
    except Exception as error:  # a system may fail in any way; the parent says which did and how
        traceback.print_exc()
        event = "out of memory" if is_out_of_memory(error) else "failed"
        first = str(error).strip().splitlines()[:1]
        emit(event, error=": ".join([type(error).__name__, *first]))


def main() -> None:
    # Libraries print what they like: it goes to stderr, and stdout is ours alone.
    answers: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def emit(event: str, **what: Any) -> None:
        answers.write(json.dumps({"event": event} | what, allow_nan=False) + "\n")

    if told := sys.stdin.read():
        work(Job.from_json(told), emit)


if __name__ == "__main__":
    main()
