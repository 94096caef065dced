"""Many settings of one model in one process: what a short lease of a GPU is best spent on.

    python integration_tests/gpu/step_times.py --json times.json
    python integration_tests/gpu/step_times.py --model tiny --quant none --device cpu --tokens 64

First the same step, stock and in each mode of `fused_checkpointing`, from the same state: loss and
gradient norm must agree. Then whole steps are timed: stock and fused, plain and packed, in FP8, in
each mode, for long and for short rows, and with graphs. `lorafuse bench` times the same steps one
system a process; here models, caches and the allocator are shared, so peaks and times of a setting
are rougher, and there are more of them.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from lorafuse import FuseConfig, fuse
from lorafuse.patches.layer_graphs import WARM
from lorafuse.plugin.bench_job import Job
from lorafuse.plugin.bench_model import adapted, base_model
from lorafuse.plugin.bench_worker import WARM_UP, Training, make_optimizer
from lorafuse.plugin.geometries import find_model

SHORT = (128, 512, 2048)
MODES = ("off", "selective", "offload")
DOCUMENTS = 8  # a row


class Timer:
    """One model and its optimiser, and what was measured on them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.job = Job(
            "lorafuse", args.model, args.layers, args.quant, args.rank, 2, args.tokens, 1, False,
            args.steps, "sdpa", args.device,
        )  # fmt: skip
        base = base_model(find_model(self.job.model, self.job.layers), self.job)
        self.model = adapted(base, self.job)
        self.optimizer = make_optimizer(self.model, torch.device(args.device))
        self.times: dict[str, dict[str, float]] = {}

    def training(self, **changes: int) -> Training:
        return Training(self.model, self.optimizer, replace(self.job, **changes))

    def numbers(self) -> list[list[float]]:
        """Loss and gradient norm of a plain and of a packed batch; nothing is trained."""
        found = []
        for documents in (1, DOCUMENTS):
            found.append([float(x) for x in self.training(documents=documents).backward()])
            self.optimizer.zero_grad(set_to_none=True)
        return found

    def time(self, name: str, warm_up: int = WARM_UP + WARM, **changes: int) -> None:
        """Median of whole steps that follow each other, and the peak of memory."""
        training = self.training(**changes)
        if training.on_gpu:  # of graphs' memory only what is reserved tells
            torch.cuda.empty_cache()
        found = training.repeated(self.job.steps, warm_up)
        if found is None:
            print(f"{name}: out of memory", flush=True)
            return
        median, peak, reserved = (
            statistics.median(found.step_ms), found.allocated_GB, found.reserved_GB
        )  # fmt: skip
        rate = 1e3 * training.job.batch * training.job.tokens / median
        spread = max(found.step_ms) - min(found.step_ms)
        self.times[name] = {
            "step_ms": median, "spread_ms": spread, "tokens_per_s": rate, "peak_GB": peak,
            "reserved_GB": reserved,
        }  # fmt: skip
        memory = f"{peak:.2f} GB, {reserved:.2f} reserved"
        print(f"{name}: {median:.1f} ms, {rate:,.0f} tokens/s, {memory}", flush=True)

    def pair(self, name: str) -> None:
        self.time(name)
        self.time(f"{name}, packed", documents=DOCUMENTS)

    def short(self, name: str) -> None:
        for n in SHORT:
            if n < self.job.tokens:
                self.time(f"{name}, 1 x {n}", batch=1, tokens=n)

    def long(self, mode: str, lengths: list[int]) -> None:
        """A mode at the usual shape, and at rows of other lengths alone."""
        self.pair(mode)
        for n in lengths:
            self.time(f"{mode}, 1 x {n}", 1, batch=1, tokens=n)

    def fused(self, run: Callable[[], Any], **flags: Any) -> Any:
        """`run` on the fused model, which is the stock one again afterwards."""
        report = fuse(self.model, FuseConfig(**flags), optimizer=self.optimizer)
        try:
            return run()
        finally:
            rows = report.operations()
            for name in ("fp8", "graphs"):
                if name in rows and rows[name].found:
                    row = rows[name]
                    print(f"{name}: {row.called} called, {row.runtime_fallbacks}", flush=True)
            report.unfuse()


def model_arguments(description: str | None) -> argparse.ArgumentParser:
    """What a `Timer` is made of, but for the tokens and the steps."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--quant", default="nf4")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--device", default="cuda")
    return parser


def main() -> None:
    parser = model_arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--long", type=int, nargs="*", default=[16384])
    parser.add_argument("--auto", type=float, nargs="*", default=[12.5, 14.5, 22.5], help="GB")
    parser.add_argument("--only-modes", action="store_true", help="of fused_checkpointing")
    parser.add_argument("--json")
    args = parser.parse_args()
    timer = Timer(args)
    on_gpu = args.device == "cuda"

    # Checkpointed first: stock's activations of a whole 8B model may not fit.
    timer.model.gradient_checkpointing_enable({"use_reentrant": False})
    timer.model.enable_input_require_grads()
    same = {"stock": timer.numbers()}
    for mode in MODES:
        same[mode] = timer.fused(timer.numbers, fused_checkpointing=mode)
    print("same step, plain and packed (loss, gradient norm):", same, flush=True)
    if not args.only_modes:
        timer.pair("stock, checkpointing")
    timer.model.gradient_checkpointing_disable()
    for mode in MODES[1:]:
        timer.fused(partial(timer.long, mode, args.long), fused_checkpointing=mode)
    for budget in args.auto:
        name = f"auto, {budget:g} GB"
        timer.fused(partial(timer.time, name), fused_checkpointing="auto", fused_memory_gb=budget)
    timer.fused(lambda: timer.pair("fused"), fused_checkpointing="off")
    if not args.only_modes:
        timer.short("stock")
        timer.fused(lambda: timer.short("fused"))
        if on_gpu:
            timer.fused(lambda: timer.pair("fused, FP8"), fused_fp8=True)
            graphs = {"fused_checkpointing": "off", "fused_graphs": True}
            timer.fused(lambda: timer.short("fused, graphs"), **graphs)
            timer.fused(lambda: timer.pair("fused, graphs"), **graphs)
            timer.fused(lambda: timer.pair("fused, FP8, graphs"), fused_fp8=True, **graphs)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            what = torch.cuda.get_device_name() if on_gpu else "cpu"
            found = {"gpu": what, "torch": torch.__version__, "args": vars(args)}
            json.dump(found | {"same_step": same, "times": timer.times}, file, indent=1)


if __name__ == "__main__":
    main()
