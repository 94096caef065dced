"""Peaks of real steps against the planner's: the error table of `lorafuse plan`.

    export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
    python integration_tests/gpu/memory_points.py --json points.json      # an H100, under 150 s
    python integration_tests/gpu/memory_points.py --markdown points.json  # the table, for a page
    python integration_tests/gpu/memory_points.py --anew points.json      # predicts them again
    python integration_tests/gpu/memory_points.py --smoke                 # tiny, on a CPU too

Each point is one whole step (8-bit AdamW, bf16 autocast, clipped gradients) after an untimed one:
`torch.cuda.max_memory_allocated` over it is the measured peak. Models are built once and reused
with other adapters, modes and batches. Without a GPU nothing is measured: predictions are printed,
and with --smoke the steps run, so that the script is known to work before a GPU is leased.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lorafuse import FuseConfig, fuse
from lorafuse.plugin.bench_job import Job
from lorafuse.plugin.bench_model import adapted, base_model
from lorafuse.plugin.bench_worker import Training, make_optimizer
from lorafuse.plugin.environment import versions
from lorafuse.plugin.geometries import find_model
from lorafuse.plugin.plan_model import ModelShape, model_shape
from lorafuse.plugin.planner import MODES, Workload, predict

BOUND = 0.05


@dataclass(frozen=True)
class Case:
    """One base model, and by rank the (batch, tokens) that it is trained with.

    Attributes:
        layers: Only so many of the model's; None: all.
    """

    model: str
    layers: int | None
    quant: str
    shapes: dict[int, list[tuple[int, int]]]


# Each shape in three modes. Small models make most of the points: their steps are short.
CASES = (
    Case("llama-3.1-8b", None, "nf4", {32: [(2, 4096), (1, 16384)]}),
    Case("llama-3.2-1b", None, "none", {8: [(4, 512), (1, 8192)], 128: [(2, 2048)]}),
    Case("qwen3-8b", 12, "nf4", {64: [(1, 4096), (1, 24576)]}),
    Case("mistral-7b", 8, "none", {16: [(2, 2048), (1, 8192)]}),
    Case("gemma-2-9b", 8, "nf4", {32: [(1, 2048), (4, 3072)]}),
)
SMOKE = (Case("tiny", None, "nf4", {4: [(2, 32)], 8: [(1, 48)]}),)


@dataclass
class Point:
    """One step; bytes, None where it was not measured.

    Attributes:
        predicted_bytes, measured_bytes: Of the peak.
        rest_predicted_bytes, rest_measured_bytes: Between steps: weights, adapters, states; only
            the measured one has cuBLAS's workspaces, and what `offload` frees in the next step.
        step_s: Of the measured step.
        moment: When the planner has the peak.
        parts: Of the predicted peak.
        said: Why there is no measurement; or "".
        spilled: Layers whose gate/up waited on the host.
    """

    model: str
    layers: int
    quant: str
    rank: int
    batch: int
    tokens: int
    mode: str
    predicted_bytes: int
    moment: str
    parts: dict[str, int]
    rest_predicted_bytes: int = 0
    measured_bytes: int | None = None
    rest_measured_bytes: int | None = None
    step_s: float | None = None
    said: str = ""
    spilled: list[int] = field(default_factory=list)

    @property
    def error(self) -> float | None:
        """(predicted - measured) / measured."""
        if self.measured_bytes is None:
            return None
        return self.predicted_bytes / self.measured_bytes - 1

    def line(self) -> str:
        where = f"{self.model} ({self.layers}), {self.quant}, r={self.rank}"
        numbers = f"predicted {self.predicted_bytes / 1e9:6.2f} GB"
        if self.error is not None and self.measured_bytes is not None:
            numbers += f", measured {self.measured_bytes / 1e9:6.2f}, {self.error:+.1%}"
        if self.step_s is not None:
            numbers += f", {1e3 * self.step_s:.0f} ms"
        said = f" [{self.said}]" if self.said else ""
        return f"{where}, {self.batch} x {self.tokens}, {self.mode}: {numbers}{said}"


def predicted(
    case: Case,
    shape: ModelShape,
    rank: int,
    batch: int,
    tokens: int,
    mode: str,
    spilled: Sequence[int] = (),
) -> Point:
    """The point without a measurement. `spilled`: layers whose gate/up waits on the host."""
    quant: Any = case.quant
    waits = [i in spilled for i in range(len(shape.layers))]
    memory = predict(Workload(shape, tokens, batch, rank=rank, quant=quant), mode, waits)
    rest = sum(memory.parts[part] for part in ("weights", "optimizer"))
    adapters = 4 * Workload(shape, tokens, rank=rank, quant=quant).adapter_elements
    return Point(
        case.model, len(shape.layers), case.quant, rank, batch, tokens, mode, memory.peak_bytes,
        memory.moment, memory.parts, rest + adapters, spilled=list(spilled),
    )  # fmt: skip


class Runner:
    """Measures points one after the other, and stops beginning new ones when time is up."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.modes: list[str] = args.modes.split(",")
        self.device = args.device
        self.on_gpu = self.device == "cuda"
        self.begin = time.perf_counter()
        self.points: list[Point] = []

    @property
    def late(self) -> bool:
        return time.perf_counter() - self.begin > float(self.args.budget)

    def add(self, point: Point) -> None:
        self.points.append(point)
        print(point.line(), flush=True)

    def run(self, case: Case) -> None:
        """All points of one base model."""
        job = Job(
            "lorafuse", case.model, case.layers, case.quant, 1, 1, 2, 1, False, 1, "sdpa",
            self.device,
        )  # fmt: skip
        found = find_model(case.model, case.layers)
        shape = model_shape(case.model, found.config)
        plans = [
            predicted(case, shape, rank, batch, tokens, mode)
            for rank, shapes in case.shapes.items()
            for mode in self.modes
            for batch, tokens in shapes
        ]
        if self.args.predict_only or self.late:
            for point in plans:
                point.said = "" if self.args.predict_only else "not run: time was up"
                self.add(point)
            return
        base: Any = base_model(found, job)
        for rank in case.shapes:
            model = adapted(base, replace(job, rank=rank))
            optimizer = make_optimizer(model, torch.device(self.device))
            for mode in self.modes:
                chosen = [p for p in plans if (p.rank, p.mode) == (rank, mode)]
                with self.fused(model, optimizer, mode) as (report, why):
                    for point in chosen:
                        point.said = why
                        if not why:
                            self.measure(model, optimizer, replace(job, rank=rank), point)
                            waits = [i for i, yes in enumerate(report.checkpointing.spilled) if yes]
                            again = predicted(
                                case, shape, rank, point.batch, point.tokens, mode, waits
                            )
                            names = ("predicted_bytes", "parts", "moment", "spilled")
                            point = replace(point, **{n: getattr(again, n) for n in names})
                        self.add(point)
            base = model.unload()
            del model, optimizer
            self.clean()
        del base
        self.clean()

    @contextmanager
    def fused(self, model: Any, optimizer: Any, mode: str) -> Iterator[tuple[Any, str]]:
        """The report of the model fused in a mode; "" or why it is not."""
        report = fuse(model, FuseConfig(fused_checkpointing=mode), optimizer=optimizer)
        try:
            operations = report.to_dict()["operations"]
            missing = [
                f"{name} {one['fused']}/{one['found']}"
                for name, one in operations.items()
                if one["fused"] < one["found"]
            ]
            yield report, f"not fused: {', '.join(missing)}" if missing else ""
        finally:
            report.unfuse()

    def measure(self, model: Any, optimizer: Any, job: Job, point: Point) -> None:
        """Fills in what one step took."""
        if self.late:
            point.said = "not run: time was up"
            return
        training = Training(model, optimizer, replace(job, batch=point.batch, tokens=point.tokens))
        try:
            training.step()
            self.clean()
            if self.on_gpu:
                torch.cuda.reset_peak_memory_stats()
                point.rest_measured_bytes = torch.cuda.memory_allocated()
            seconds = training.timed_step()
        except torch.OutOfMemoryError:
            point.said = "out of memory"
            optimizer.zero_grad(set_to_none=True)
            self.clean()
            return
        training.check()
        if self.on_gpu:
            point.measured_bytes = torch.cuda.max_memory_allocated()
            point.step_s = seconds

    def clean(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def predicted_anew(points: Sequence[Point]) -> list[Point]:
    """The same measurements, beside what the planner says today."""
    shapes: dict[tuple[str, int], ModelShape] = {}
    found = []
    for p in points:
        key = p.model, p.layers
        if key not in shapes:
            shapes[key] = model_shape(p.model, find_model(*key).config)
        case = Case(p.model, p.layers, p.quant, {})
        again = predicted(case, shapes[key], p.rank, p.batch, p.tokens, p.mode, p.spilled)
        names = ("predicted_bytes", "moment", "parts", "rest_predicted_bytes")
        found.append(replace(p, **{name: getattr(again, name) for name in names}))
    return found


def write(file: Path, content: dict[str, Any], points: Sequence[Point]) -> None:
    content = content | {"points": [asdict(point) for point in points]}
    file.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def markdown(content: dict[str, Any]) -> str:
    """The table of a JSON file that this script wrote, and a line on its errors."""
    points = [Point(**one) for one in content["points"]]
    rows = [
        "| model | weights | r | batch × tokens | mode | predicted GB | measured GB | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in points:
        measured = "–" if p.measured_bytes is None else f"{p.measured_bytes / 1e9:.2f}"
        error = p.said or "–" if p.error is None else f"{p.error:+.1%}"
        weights = "NF4" if p.quant == "nf4" else "bf16"
        rows.append(
            f"| {p.model}, {p.layers} layers | {weights} | {p.rank} | {p.batch} × {p.tokens:,} | "
            f"{p.mode}{f', gate/up of {len(p.spilled)}' if p.spilled else ''} | "
            f"{p.predicted_bytes / 1e9:.2f} | {measured} | {error} |"
        )
    named = ", ".join(f"{k} {v}" for k, v in content["versions"].items() if v)
    where = f"{content['gpu'] or 'no GPU'}, {named}, {content['date']}"
    return "\n".join([f"{where}. {summary(points)}", "", *rows])


def summary(points: Sequence[Point]) -> str:
    """How far the predictions are off."""
    errors = [p.error for p in points if p.error is not None]
    if not errors:
        return f"{len(points)} points predicted, none measured."
    sizes = sorted(abs(error) for error in errors)
    within = sum(size <= BOUND for size in sizes)
    worst = max((p for p in points if p.error is not None), key=lambda p: abs(p.error or 0))
    return (
        f"{len(errors)} points measured, {within} within {BOUND:.0%}; error {min(errors):+.1%} to "
        f"{max(errors):+.1%}, median size {statistics.median(sizes):.1%}; the largest: "
        f"{worst.model}, {worst.batch} × {worst.tokens:,}, {worst.mode}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where something was measured and is further off than the bound."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--modes", default=",".join(MODES), help="with commas between")
    parser.add_argument("--models", help="of the cases, only these; with commas between")
    parser.add_argument("--budget", type=float, default=150, help="begin no point after so many s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--predict-only", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, steps on a CPU too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, metavar="JSON", help="print its table, and go")
    parser.add_argument("--anew", type=Path, metavar="JSON", help="predict it again, write, and go")
    args = parser.parse_args(arguments)
    if args.anew:
        content = json.loads(args.anew.read_text("utf-8"))
        write(args.anew, content, predicted_anew([Point(**one) for one in content["points"]]))
        return 0
    if args.markdown:
        print(markdown(json.loads(args.markdown.read_text("utf-8"))))
        return 0
    unknown = set(args.modes.split(",")) - set(MODES)
    if unknown:
        parser.error(f"--modes: {', '.join(sorted(unknown))} is none of {', '.join(MODES)}")
    if args.device == "cpu" and not args.smoke:
        args.predict_only = True
    runner = Runner(args)
    for case in SMOKE if args.smoke else CASES:
        if not args.models or case.model in args.models.split(","):
            runner.run(case)
    print(summary(runner.points))
    if args.json:
        content = {
            "gpu": torch.cuda.get_device_name() if runner.on_gpu else None,
            "versions": versions(),
            "date": time.strftime("%Y-%m-%d"),
        }
        write(args.json, content, runner.points)
    errors = [abs(p.error) for p in runner.points if p.error is not None]
    return int(bool(errors) and max(errors) > BOUND)


if __name__ == "__main__":
    sys.exit(main())
