"""Speed of the memory-bound kernels at Llama-3.1-8B's shapes, beside the plain torch form of each.

    python integration_tests/gpu/bench_elements.py           # needs a CUDA GPU; about 20 s
    TRITON_INTERPRET=1 python integration_tests/gpu/bench_elements.py --tiny    # smoke check on CPU

GB/s counts each input read once and each output written once (GB = 1e9 bytes), for the torch form
too, whose true traffic is larger. An H100 SXM's memory moves 3,350 GB/s on paper; the first line
shows what a plain copy reaches. "host us" is what the launch of our kernel costs the CPU.
"""

import argparse
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafuse.kernels.glu import ACTIVATIONS, glu_bwd_, glu_fwd
from lorafuse.kernels.nf4 import Quantised4bit, dequantise
from lorafuse.kernels.rms_norm import rms_norm_bwd, rms_norm_fwd
from lorafuse.kernels.rope import rope_copy, rope_qk_

DTYPE = torch.bfloat16
EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """Tokens B * S, hidden K, intermediate I, heads, and a weight [N, K] to dequantise."""

    B: int = 2
    S: int = 4096
    K: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head: int = 128
    N: int = 28672
    repeats: int = 20


TINY = Shape(B=1, S=4, K=64, inner=96, heads=4, kv_heads=2, head=16, N=64, repeats=1)


@dataclass(frozen=True)
class Case:
    """One kernel, the torch form of the same work, and the bytes that either has to move."""

    name: str
    ours: Callable[[], object]
    stock: Callable[[], object] | None
    moved_bytes: float


def copy_cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    x = torch.randn(shape.B * shape.S, 4 * shape.K, dtype=DTYPE, device=device)
    y = torch.empty_like(x)
    yield Case("torch's copy_, the yardstick", lambda: y.copy_(x), None, 4 * x.numel())


def rms_norm_cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    T, K = shape.B * shape.S, shape.K
    x, dy, stream, residual = (torch.randn(T, K, dtype=DTYPE, device=device) for _ in range(4))
    wide = torch.empty(T, K + 96, dtype=DTYPE, device=device)
    y, h, weight = wide[:, :K], torch.empty_like(x), torch.ones(K, dtype=DTYPE, device=device)
    rstd = rms_norm_fwd(x, weight, EPS, 0.0, y)
    row_bytes = 2 * K

    def stock(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)

    leaf, leaf_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    graph = stock(leaf, weight)
    graph_dw = stock(leaf, leaf_weight)

    yield Case(
        "rms_norm forward",
        lambda: rms_norm_fwd(x, weight, EPS, 0.0, y),
        lambda: stock(x, weight),
        T * row_bytes * 2,
    )
    yield Case(
        "rms_norm forward, residual add",
        lambda: rms_norm_fwd(x, weight, EPS, 0.0, y, residual, h),
        lambda: stock(x + residual, weight),
        T * row_bytes * 4,
    )
    yield Case(
        "rms_norm dx + residual gradient",
        lambda: rms_norm_bwd(dy, x, weight, rstd, 0.0, stream, False, out=h),
        lambda: torch.autograd.grad(graph, leaf, dy, retain_graph=True)[0] + stream,
        T * row_bytes * 4,
    )
    yield Case(
        "rms_norm dx and dweight",
        lambda: rms_norm_bwd(dy, x, weight, rstd, 0.0, None, True, out=h),
        lambda: torch.autograd.grad(graph_dw, (leaf, leaf_weight), dy, retain_graph=True),
        T * row_bytes * 3,
    )
    qkv_width = (shape.heads + 2 * shape.kv_heads) * shape.head
    qkv = torch.randn(T, qkv_width, dtype=DTYPE, device=device)
    q = qkv[:, : shape.heads * shape.head].unflatten(1, (shape.heads, shape.head))
    head_weight = torch.ones(shape.head, dtype=DTYPE, device=device)
    yield Case(
        "rms_norm of q's heads, in place",
        lambda: rms_norm_fwd(q, head_weight, EPS, 0.0, q),
        lambda: stock(q, head_weight),
        q.numel() * 4,
    )


def rope_cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    B, S, D = shape.B, shape.S, shape.head
    heads, kv_heads = shape.heads, shape.kv_heads
    qkv = torch.randn(B, S, (heads + 2 * kv_heads) * D, dtype=DTYPE, device=device)
    q = qkv[..., : heads * D].unflatten(-1, (heads, D))
    k = qkv[..., heads * D : (heads + kv_heads) * D].unflatten(-1, (kv_heads, D))
    dq, dk = (torch.randn(B, n, S, D, dtype=DTYPE, device=device) for n in (heads, kv_heads))
    angles = torch.rand(1, S, D, device=device)
    cos, sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)

    def turn(x: Tensor) -> Tensor:
        partner = torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1)
        return x * cos.unsqueeze(2) + partner * sin.unsqueeze(2)

    def stock_copy() -> None:
        q.copy_(turn(dq.transpose(1, 2)))
        k.copy_(turn(dk.transpose(1, 2)))

    moved_bytes = 4 * (q.numel() + k.numel())
    for interleaved in (False, True):
        yield Case(
            "rope in place, interleaved" if interleaved else "rope in place",
            lambda interleaved=interleaved: rope_qk_(q, k, cos, sin, interleaved),  # type: ignore[misc]
            None if interleaved else lambda: (turn(q), turn(k)),
            moved_bytes,
        )
    yield Case(
        "rope backward, heads first to qkv buffer",
        lambda: rope_copy(dq.transpose(1, 2), dk.transpose(1, 2), q, k, cos, sin, backward=True),
        stock_copy,
        moved_bytes,
    )


def glu_cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    T, inner = shape.B * shape.S, shape.inner
    gate_up = torch.randn(T, 2 * inner + 64, dtype=DTYPE, device=device)
    gate, up = gate_up[:, :inner], gate_up[:, inner : 2 * inner]
    m = torch.randn(T, inner + 32, dtype=DTYPE, device=device)[:, :inner]

    def stock(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        if activation == "silu":
            return F.silu(gate) * up
        return F.gelu(gate, approximate="none" if activation == "gelu" else "tanh") * up

    for activation in ACTIVATIONS:
        leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
        graph = stock(*leaves, activation)
        yield Case(
            f"glu forward, {activation}",
            lambda a=activation: glu_fwd(gate, up, a, m),  # type: ignore[misc]
            lambda a=activation: stock(gate, up, a),  # type: ignore[misc]
            6 * m.numel(),
        )
        # The torch form leaves m to the caller, so its work is smaller than ours here.
        yield Case(
            f"glu backward in place, {activation}",
            lambda a=activation: glu_bwd_(gate, up, m, a),  # type: ignore[misc]
            lambda g=graph, x=leaves: torch.autograd.grad(g, x, m, retain_graph=True),  # type: ignore[misc]
            12 * m.numel(),
        )


def nf4_cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    N, K = shape.N, shape.K
    out = torch.empty(N, K + 96, dtype=DTYPE, device=device)[:, :K]
    blocks = N * K // 64
    for nested in (True, False):
        stock = None
        if importlib.util.find_spec("bitsandbytes"):
            import bitsandbytes.functional as bnb

            weight = torch.randn(N, K, dtype=DTYPE, device=device)
            packed, state = bnb.quantize_4bit(weight, compress_statistics=nested, quant_type="nf4")
            stock = lambda p=packed, s=state: bnb.dequantize_4bit(p, s)  # noqa: E731
            del weight
        scales: dict[str, Tensor | int] = {"absmax": torch.rand(blocks, device=device)}
        if nested:
            scales = {
                "absmax": torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device),
                "code2": torch.randn(256, device=device),
                "absmax2": torch.rand(-(-blocks // 256), device=device),
                "offset": torch.rand((), device=device),
                "blocksize2": 256,
            }
        w = Quantised4bit(
            packed=torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8, device=device),
            code=torch.randn(16, device=device),
            blocksize=64,
            shape=(N, K),
            **scales,  # type: ignore[arg-type]
        )
        yield Case(
            f"nf4 dequantise, {'nested' if nested else 'single'}",
            lambda w=w: dequantise(w, out),  # type: ignore[misc]
            stock,
            N * K * 2.5 + blocks * (1 if nested else 4),
        )


def measure(
    function: Callable[[], object], repeats: int, device: torch.device
) -> tuple[float, float]:
    """(median ms of one call on the device, mean µs of the host to launch it).

    The tensors are larger than the L2 cache, so no call finds its input there.
    """
    for _ in range(min(3, repeats)):
        function()
    if device.type == "cpu":
        start = time.perf_counter()
        function()
        elapsed = time.perf_counter() - start
        return elapsed * 1e3, elapsed * 1e6
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    busy = torch.empty(8192, 8192, dtype=DTYPE, device=device)
    torch.cuda.synchronize()
    # About 15 ms of GEMMs first: the host gets ahead, and no launch is timed as the kernel's own.
    for _ in range(10):
        torch.mm(busy, busy)
    start = time.perf_counter()
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    host_us = (time.perf_counter() - start) / repeats * 1e6
    torch.cuda.synchronize()
    times_ms = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events))
    return times_ms[len(times_ms) // 2], host_us


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to check that it runs")
    shape = TINY if parser.parse_args().tiny else Shape()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    if device.type == "cpu" and shape is not TINY:
        parser.error("no CUDA GPU here; --tiny checks on CPU that the script runs")
    print(f"{name}, torch {torch.__version__}, bf16, {shape}\n")
    print(
        f"{'kernel':42} {'ms':>8} {'GB/s':>6} {'host us':>8}"
        f" {'torch ms':>9} {'GB/s':>6} {'times':>6}"
    )
    torch.manual_seed(0)
    for cases in (copy_cases, rms_norm_cases, rope_cases, glu_cases, nf4_cases):
        for case in cases(shape, device):
            ours_ms, host_us = measure(case.ours, shape.repeats, device)
            line = f"{case.name:42} {ours_ms:8.3f} {case.moved_bytes / ours_ms / 1e6:6.0f}"
            line += f" {host_us:8.0f}"
            if case.stock is not None:
                stock_ms, _ = measure(case.stock, shape.repeats, device)
                line += f" {stock_ms:9.3f} {case.moved_bytes / stock_ms / 1e6:6.0f}"
                line += f" {stock_ms / ours_ms:6.2f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
