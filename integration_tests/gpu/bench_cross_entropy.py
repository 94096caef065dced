"""Time and peak memory of the head and the loss, both ways: ours, stock, and the GEMMs alone.

    python integration_tests/gpu/bench_cross_entropy.py            # 8,192 x 4,096 x 128,256 in bf16
    python integration_tests/gpu/bench_cross_entropy.py --tiny     # on any CPU

Stock is what a transformers model does: the head's logits, in fp32, shifted into
`torch.nn.functional.cross_entropy`. The floor is the two GEMMs of a frozen head, in our chunks.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafuse.kernels.linear_cross_entropy import chunk_rows, linear_cross_entropy


def stock(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    loss = F.cross_entropy(F.linear(hidden, weight).float(), labels)
    loss.backward()


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    linear_cross_entropy(hidden, weight, labels).loss.backward()


@torch.no_grad()
def gemms(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    (T, _), V = hidden.shape, weight.shape[0]
    chunk = chunk_rows(T, V, hidden.itemsize, 512 * 2**20)
    logits, dX = hidden.new_empty(min(T, chunk), V), torch.empty_like(hidden)
    for start in range(0, T, chunk):
        X = hidden[start : start + chunk]
        Z = torch.mm(X, weight.t(), out=logits[: X.shape[0]])
        torch.mm(Z, weight, out=dX[start : start + chunk])


def measure(run: Callable[..., None], inputs: tuple[Tensor, ...], repeats: int) -> dict[str, Any]:
    hidden = inputs[0]
    times = []
    peak = None
    for i in range(repeats + 2):
        hidden.grad = None
        if hidden.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        run(*inputs)
        if hidden.is_cuda:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        if i >= 2:  # the first ones compile, choose algorithms and fill the allocator
            times.append((time.perf_counter() - start) * 1e3)
    return {"ms": round(statistics.median(times), 3), "peak_bytes_above_inputs": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tiny", action="store_true", help="a small problem on the CPU")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--ignored", type=float, default=0.0, help="share of rows without a label")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    if options.tiny:
        options.tokens, options.hidden, options.vocabulary = 300, 64, 2000
    device = torch.device("cpu" if options.tiny or not torch.cuda.is_available() else "cuda")
    generator = torch.Generator(device).manual_seed(0)
    shape = (options.tokens, options.hidden)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    hidden = torch.randn(shape, device=device, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(options.vocabulary, options.hidden, device=device, generator=generator)
    weight = (weight / options.hidden**0.5).to(dtype)
    labels = torch.randint(
        options.vocabulary, (options.tokens,), device=device, generator=generator
    )
    dropped = torch.rand(options.tokens, device=device, generator=generator) < options.ignored
    labels[dropped] = -100

    results: dict[str, Any] = {
        name: measure(run, (hidden, weight, labels), options.repeats)
        for name, run in (("gemms", gemms), ("ours", ours), ("stock", stock))
    }
    gradients = []
    for run in (ours, stock):
        hidden.grad = None
        run(hidden, weight, labels)
        assert hidden.grad is not None
        gradients.append(hidden.grad.float())
    difference = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    results["gradient_difference"] = difference.item()
    results["problem"] = {k: v for k, v in vars(options).items() if k != "tiny"}
    results["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
