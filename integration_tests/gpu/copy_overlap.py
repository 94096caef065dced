"""Do offload's copies run while the GPU computes? One step, seen by torch.profiler.

    python integration_tests/gpu/copy_overlap.py --json copy_overlap.json      # an H100, under 60 s
    python integration_tests/gpu/copy_overlap.py --model tiny --tokens 64 --quant none --device cpu
    python integration_tests/gpu/copy_overlap.py --read trace.json --plot copies.png

For each length: how long copies to and from the host took in all, for how much of that a kernel ran
beside them, and how long neither ran within the step. `--trace FOLDER` keeps the traces, for
chrome://tracing or Perfetto; `--read` takes one of them, and `--plot` draws it.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from step_times import Timer, model_arguments
from torch.profiler import ProfilerActivity, profile

from lorafuse.plugin.bench_worker import Training

Spans = list[tuple[float, float]]  # begin and end in us, apart and in order


def united(spans: Iterable[tuple[float, float]]) -> Spans:
    """The same time, without overlaps."""
    found: Spans = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def length(spans: Spans) -> float:
    return sum(end - begin for begin, end in spans)


def shared(a: Spans, b: Spans) -> float:
    """Time that lies in both."""
    return length(a) + length(b) - length(united([*a, *b]))


def spans_of(trace: dict[str, Any]) -> tuple[Spans, Spans, Spans]:
    """Copies to the host, copies from it, and kernels, of a trace in Chrome's format."""
    to_host, from_host, kernels = [], [], []
    for event in trace["traceEvents"]:
        category, name = event.get("cat"), event.get("name", "")
        span = event.get("ts", 0.0), event.get("ts", 0.0) + event.get("dur", 0.0)
        if category == "kernel":
            kernels.append(span)
        elif category == "gpu_memcpy" and "DtoH" in name:
            to_host.append(span)
        elif category == "gpu_memcpy" and "HtoD" in name:
            from_host.append(span)
    return united(to_host), united(from_host), united(kernels)


def overlap(trace: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a step; `hidden`: the share of the copies beside which a kernel ran."""
    to_host, from_host, kernels = spans_of(trace)
    copies = united([*to_host, *from_host])
    busy = united([*copies, *kernels])
    found = {
        "step": busy[-1][1] - busy[0][0] if busy else 0.0, "kernels": length(kernels),
        "to_host": length(to_host), "from_host": length(from_host), "copies": length(copies),
        "copies_alone": length(copies) - shared(copies, kernels),
        "idle": (busy[-1][1] - busy[0][0] if busy else 0.0) - length(busy),
    }  # fmt: skip
    found = {f"{name}_ms": us / 1e3 for name, us in found.items()}
    return found | {"hidden": 1 - found["copies_alone_ms"] / max(found["copies_ms"], 1e-9)}


def plot(trace: dict[str, Any], path: Path) -> None:
    """Kernels and copies of a step as bars over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    to_host, from_host, kernels = spans_of(trace)
    begin = min(spans[0][0] for spans in (to_host, from_host, kernels) if spans)
    figure, axes = pyplot.subplots(figsize=(11, 2.4))
    rows = (
        ("from the host", from_host, "C1"),
        ("to the host", to_host, "C2"),
        ("kernels", kernels, "C0"),
    )
    for place, (_, spans, colour) in enumerate(rows):
        bars = [((a - begin) / 1e3, (b - a) / 1e3) for a, b in spans]
        axes.broken_barh(bars, (place - 0.35, 0.7), facecolors=colour)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set_xlabel("ms")
    axes.set_title(f"{overlap(trace)['hidden']:.1%} of the copies' time beside kernels")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def traced(training: Training, path: Path) -> dict[str, Any]:
    """One step after two others."""
    for _ in range(2):
        training.step()
    activities = [ProfilerActivity.CPU]
    if training.on_gpu:
        torch.cuda.synchronize()
        activities = [ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        training.step()
        if training.on_gpu:
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    trace: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return trace


def main() -> None:
    parser = model_arguments(__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 16384])
    parser.add_argument("--trace", type=Path, default=Path("."), help="folder for the traces")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--read", type=Path, help="a trace: no step is run")
    parser.add_argument("--plot", type=Path, help="of --read")
    args = parser.parse_args()
    if args.read:
        trace = json.loads(args.read.read_text(encoding="utf-8"))
        print(json.dumps(overlap(trace), indent=1))
        if args.plot:
            plot(trace, args.plot)
        return
    lengths, args.tokens, args.steps = args.tokens, args.tokens[0], 1
    timer = Timer(args)
    found: dict[str, dict[str, float]] = {}

    def run() -> None:
        for n in lengths:
            training = timer.training(batch=1, tokens=n)
            path = args.trace / f"offload_1x{n}.json"
            found[f"1 x {n}"] = overlap(traced(training, path))
            print(f"1 x {n}: {json.dumps(found[f'1 x {n}'])}", flush=True)

    timer.fused(run, fused_checkpointing="offload")
    if args.json:
        what = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        args.json.write_text(
            json.dumps({"gpu": what, "torch": torch.__version__, "steps": found}, indent=1),
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
