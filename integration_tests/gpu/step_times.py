"""Many settings of one model in one process: what a short lease of a GPU is best spent on.

    python integration_tests/gpu/step_times.py --json times.json
    python integration_tests/gpu/step_times.py --model tiny --quant none --device cpu --tokens 64

First the same step, stock and fused, from the same state: loss and gradient norm must agree. Then
whole steps are timed, stock and fused, plain and packed, in FP8, recomputed and not, down to short
batches. `lorafuse bench` times the same steps one system a process; here models, caches and the
allocator are shared, so peaks and times of a setting are rougher, and there are more of them.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorafuse import FuseConfig, fuse
from lorafuse.plugin.bench_job import Job
from lorafuse.plugin.bench_model import adapted, base_model
from lorafuse.plugin.bench_worker import make_optimizer
from lorafuse.plugin.geometries import find_model

SHORT = (128, 512, 2048)
DOCUMENT = 512


class Timer:
    """Steps of one model as trainers make them, in bf16 autocast."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.on_gpu = self.device.type == "cuda"
        job = Job(
            "lorafuse", args.model, args.layers, args.quant, args.rank, 2, args.tokens, 1, False,
            args.steps, "sdpa", args.device,
        )  # fmt: skip
        self.model = adapted(base_model(find_model(job.model, job.layers), job), job)
        self.optimizer = make_optimizer(self.model, self.device)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.vocabulary = self.model.config.get_text_config().vocab_size
        self.times: dict[str, dict[str, float]] = {}

    def backward(self, rows: int, tokens: int, packed: bool) -> tuple[Tensor, Tensor]:
        """(loss, gradient norm); the gradients stay."""
        generator = torch.Generator().manual_seed(5)
        ids = torch.randint(0, self.vocabulary, (rows, tokens), generator=generator)
        ids = ids.to(self.device)
        more = {}
        if packed:
            positions = torch.arange(tokens, device=self.device) % min(DOCUMENT, tokens // 2)
            more["position_ids"] = positions.expand(rows, -1).contiguous()
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(input_ids=ids, labels=ids, use_cache=False, **more).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        return loss.detach(), norm.detach()

    def numbers(self, packed: bool) -> list[float]:
        """Loss and gradient norm of one batch; nothing is trained."""
        pair = [float(x) for x in self.backward(2, self.args.tokens, packed)]
        self.optimizer.zero_grad(set_to_none=True)
        return pair

    def time(self, name: str, rows: int = 2, tokens: int = 0, packed: bool = False) -> None:
        """Median of whole steps with their waits, and the peak of memory."""
        tokens = tokens or self.args.tokens

        def step() -> float:
            start = time.perf_counter()
            self.backward(rows, tokens, packed)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.on_gpu:
                torch.cuda.synchronize()
            return 1e3 * (time.perf_counter() - start)

        try:
            for _ in range(2):
                step()
            if self.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            steps = [step() for _ in range(self.args.steps)]
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            print(f"{name}: out of memory", flush=True)
            return
        median = statistics.median(steps)
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.on_gpu else 0.0
        self.times[name] = {
            "step_ms": median,
            "spread_ms": max(steps) - min(steps),
            "tokens_per_s": 1e3 * rows * tokens / median,
            "peak_GB": peak,
        }
        print(
            f"{name}: {median:.1f} ms, {1e3 * rows * tokens / median:,.0f} tokens/s, {peak:.2f} GB",
            flush=True,
        )

    def fused(self, run: Callable[[], Any], **flags: Any) -> Any:
        """`run` on the fused model, which is the stock one again afterwards."""
        report = fuse(self.model, FuseConfig(**flags), optimizer=self.optimizer)
        try:
            return run()
        finally:
            report.unfuse()

    def both(self) -> list[list[float]]:
        return [self.numbers(packed) for packed in (False, True)]

    def pair(self, name: str) -> None:
        self.time(name)
        self.time(f"{name}, packed", packed=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--quant", default="nf4")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json")
    args = parser.parse_args()
    timer = Timer(args)
    short = [n for n in SHORT if n < args.tokens]

    # Checkpointed first: stock's activations of a whole 8B model do not fit.
    timer.model.gradient_checkpointing_enable({"use_reentrant": False})
    timer.model.enable_input_require_grads()
    stock = timer.both()
    same = {"stock": stock, "fused": timer.fused(timer.both)}
    print("same step, plain and packed (loss, gradient norm):", same, flush=True)
    timer.pair("stock, checkpointing")
    timer.fused(lambda: timer.pair("fused, checkpointing"))
    timer.model.gradient_checkpointing_disable()
    for n in short:
        timer.time(f"stock, 1 x {n}", 1, n)
    timer.fused(lambda: [timer.time(f"fused, 1 x {n}", 1, n) for n in short])
    timer.fused(lambda: timer.pair("fused"))
    if timer.on_gpu:
        timer.fused(lambda: timer.pair("fused, FP8"), fused_fp8=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            what = torch.cuda.get_device_name() if timer.on_gpu else "cpu"
            found = {"gpu": what, "torch": torch.__version__, "args": vars(args)}
            json.dump(found | {"same_step": same, "times": timer.times}, file, indent=1)


if __name__ == "__main__":
    main()
