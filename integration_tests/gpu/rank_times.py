"""Whole steps of all ranks and sizes of batches, stock and fused: is lorafuse ever slower?

    python integration_tests/gpu/rank_times.py --json ranks.json
    python integration_tests/gpu/rank_times.py --model tiny --device cpu --quants none \\
        --ranks 4 8 --shapes 1x32 2x64 --steps 2                    # that the script works

A few layers of one model, each base once, with other adapters for each rank. Stock and lorafuse
recompute nothing (`fused_checkpointing: off`), then both checkpoint (`selective`); of each rank all
shapes are timed stock, then fused, and the median of a shape's steps counts. The exit status is 1
where lorafuse was slower.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lorafuse import FuseConfig, fuse
from lorafuse.plugin.bench_job import Job
from lorafuse.plugin.bench_model import adapted, base_model
from lorafuse.plugin.bench_worker import Training, make_optimizer
from lorafuse.plugin.environment import gpu_name, versions
from lorafuse.plugin.geometries import find_model

RANKS = (4, 8, 16, 32, 64, 128, 256)
SHAPES = ("1x128", "1x512", "4x512", "2x4096")
MODES = {False: "off", True: "selective"}  # by whether stock checkpoints
WARM_UP = 3  # kernels of each rank and shape are compiled and tuned in these


@dataclass
class Pair:
    """One rank and shape: medians of whole steps, stock and fused."""

    quant: str
    rank: int
    batch: int
    tokens: int
    mode: str
    stock_ms: float
    fused_ms: float

    @property
    def ratio(self) -> float:
        return self.stock_ms / self.fused_ms

    def line(self) -> str:
        return (
            f"{self.quant}, r={self.rank}, {self.batch} x {self.tokens}, {self.mode}: stock "
            f"{self.stock_ms:.1f} ms, lorafuse {self.fused_ms:.1f} ms, {self.ratio:.2f} x"
        )


@contextmanager
def checkpointing(model: Any, on: bool) -> Iterator[None]:
    """The trainer's, while stock runs and while lorafuse stands in for it."""
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    try:
        yield
    finally:
        if on:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()


def median_ms(training: Training, steps: int) -> float:
    found = training.repeated(steps, WARM_UP)
    if found is None:
        raise SystemExit("out of memory: give fewer --layers, or smaller --shapes")
    return statistics.median(found.step_ms)


def measure(base: Any, job: Job, shapes: list[tuple[int, int]]) -> Iterator[Pair]:
    """All shapes of one rank."""
    model = adapted(base, job)
    optimizer = make_optimizer(model, torch.device(job.device))
    for on, mode in MODES.items():
        trainings = {
            shape: Training(model, optimizer, replace(job, batch=shape[0], tokens=shape[1]))
            for shape in shapes
        }
        with checkpointing(model, on):
            stock = {shape: median_ms(one, job.steps) for shape, one in trainings.items()}
            report = fuse(model, FuseConfig(fused_checkpointing=mode), optimizer=optimizer)
            try:
                for (batch, tokens), one in trainings.items():
                    fused_ms = median_ms(one, job.steps)
                    yield Pair(
                        job.quant, job.rank, batch, tokens, mode, stock[batch, tokens], fused_ms
                    )
                report.check_called()
            finally:
                report.unfuse()
    model.unload()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="4 of a published model, unless given")
    parser.add_argument("--quants", nargs="+", default=["nf4", "none"])
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="BATCHxTOKENS")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    layers = args.layers or (None if args.model == "tiny" else 4)
    shapes = [(int(b), int(n)) for b, n in (shape.split("x") for shape in args.shapes)]
    found = find_model(args.model, layers)
    pairs: list[Pair] = []
    for quant in args.quants:
        job = Job(
            "lorafuse", args.model, layers, quant, 1, 1, 2, 1, False, args.steps, "sdpa",
            args.device,
        )  # fmt: skip
        base = base_model(found, job)
        for rank in args.ranks:
            for pair in measure(base, replace(job, rank=rank), shapes):
                pairs.append(pair)
                print(pair.line(), flush=True)
            if args.json:
                content = {
                    "gpu": gpu_name(), "versions": versions(), "command": sys.argv,
                    "pairs": [asdict(one) for one in pairs],
                }  # fmt: skip
                args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        del base
        if args.device == "cuda":
            torch.cuda.empty_cache()
    least = min(pairs, key=lambda one: one.ratio)
    print(f"{len(pairs)} pairs; the least: {least.line()}")
    return int(least.ratio < 1)


if __name__ == "__main__":
    sys.exit(main())
