"""Experts with LoRA: the output and every gradient, the router's among them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorafuse.kernels import grouped_linear as grouped
from lorafuse.kernels import moe as moe_file
from lorafuse.kernels import runtime
from lorafuse.kernels.clamped_swiglu import ClampedSwiglu
from lorafuse.kernels.expert_glu import expert_glu_bwd_
from lorafuse.kernels.expert_glu import reference as glu_reference
from lorafuse.kernels.expert_order import sort_by_expert
from lorafuse.kernels.moe import ExpertProjection, moe, reference
from lorafuse.kernels.nf4 import dequantise

from .conftest import four_bit

# Triton's interpreter truncates where a GPU rounds fp32 to bf16: twice the error, and all one way.
TRUNCATED = 3


class Experts:
    """Tensors of one layer's experts, and calls of the kernel and of its definition on them."""

    def __init__(
        self,
        randn,
        dtype,
        E=4,
        H=24,
        inner=20,
        ranks=(3, 5),
        nf4=False,
        transposed=False,
        biased=False,
    ) -> None:
        self.E, self.shapes, self.transposed = E, [(2 * inner, H), (H, inner)], transposed
        self.weights: list[Any] = [(randn(E, n, k) / k**0.5).to(dtype) for n, k in self.shapes]
        if transposed:
            self.weights = [w.transpose(1, 2).contiguous() for w in self.weights]
        self.biases = [randn(E, n).to(dtype) if biased else None for n, _ in self.shapes]
        self.plain = self.weights
        if nf4:
            self.weights = [four_bit(w.float().flatten(0, 1)) for w in self.plain]
            self.plain = [torch.empty_like(w) for w in self.plain]
            for packed, w in zip(self.weights, self.plain, strict=True):
                dequantise(packed, w.flatten(0, 1))
        self.tensors: dict[str, Tensor] = {}
        for i, ((n, k), r) in enumerate(zip(self.shapes, ranks, strict=True)):
            if r:
                self.tensors[f"A{i}"] = (randn(E, r, k) / k**0.5).to(dtype)
                self.tensors[f"B{i}"] = (randn(n, r, E) / 4).to(dtype)  # as PEFT stores it

    def call(self, function, index, activation="silu", weights=None):
        def run(x: Tensor, w: Tensor, *tensors: Tensor) -> Tensor:
            given = dict(zip(self.tensors, tensors, strict=True))
            projections = [
                ExpertProjection(
                    base.to(x.dtype) if isinstance(base, Tensor) else base,
                    self.E,
                    given.get(f"A{i}"),
                    given[f"B{i}"].permute(2, 0, 1) if f"B{i}" in given else None,
                    0.5,
                    self.transposed,
                    None if self.biases[i] is None else self.biases[i].to(x.dtype),
                )
                for i, base in enumerate(weights or self.weights)
            ]
            return function(x, index, w, *projections, activation)

        return run


# With a limit that many reach here; and, for 16 bit, its own one, which none does: where a rounding
# takes a gate over the limit, it decides about the whole gradient (`test_clamped_swiglu`).
GPT_OSS = ClampedSwiglu(1.702, 0.8, 1.0, interleaved=True)
OUT_OF_REACH = replace(GPT_OSS, limit=7.0)


def gpt_oss(dtype: torch.dtype) -> ClampedSwiglu:
    if dtype == torch.bfloat16 and runtime.interpreting():
        pytest.skip("the interpreter truncates, five times in this activation; fp16 it rounds")
    return GPT_OSS if dtype == torch.float32 else OUT_OF_REACH


def like_gpt_oss(randn, dtype, *args, **kwargs) -> Experts:
    return Experts(randn, dtype, *args, transposed=True, biased=True, **kwargs)


def route(device, tokens, E, k, spared=True) -> Tensor:
    """[T, k] distinct experts; the last one gets none."""
    experts = E - 1 if spared and E > k else E
    return torch.rand(tokens, experts).topk(k, dim=1).indices.to(device)


def check(oracle, randn, experts, dtype, index, activation="silu", frozen=()) -> None:
    tokens, k = index.shape
    H = experts.shapes[0][1]
    inputs = {"x": randn(tokens, H, dtype=dtype), "w": randn(tokens, k, dtype=dtype).sigmoid()}
    inputs |= experts.tensors
    if dtype == torch.bfloat16 and runtime.interpreting():
        # In dw = <D, m> truncation adds up where roundings cancel out.
        frozen = (*frozen, "w")
    oracle.check(
        experts.call(moe, index, activation),
        experts.call(reference, index, activation, experts.plain),
        inputs,
        [name for name in inputs if name not in frozen],
    )


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_forward_and_every_gradient(oracle, randn, dtype, device, activation) -> None:
    check(oracle, randn, Experts(randn, dtype), dtype, route(device, 19, 4, 2), activation)


@pytest.mark.parametrize(
    ("tokens", "E", "k", "ranks"),
    [(7, 1, 1, (4, 4)), (9, 3, 1, (1, 1)), (1, 5, 2, (2, 3)), (12, 6, 6, (4, 7))],
)
def test_few_and_many_experts(oracle, randn, dtype, device, tokens, E, k, ranks) -> None:
    check(oracle, randn, Experts(randn, dtype, E, ranks=ranks), dtype, route(device, tokens, E, k))


def test_all_tokens_at_one_expert_and_odd_sizes(oracle, randn, dtype, device) -> None:
    index = torch.full((33, 1), 2, device=device)
    check(oracle, randn, Experts(randn, dtype, 4, 37, 23, (5, 2)), dtype, index)


@pytest.mark.parametrize("ranks", [(4, 0), (0, 4), (0, 0)])
@pytest.mark.parametrize("frozen", [(), ("x",), ("w",), ("x", "w")])
def test_any_subset_of_the_adapters(oracle, randn, device, ranks, frozen) -> None:
    if ranks == (0, 0) and len(frozen) == 2:
        return
    experts = Experts(randn, torch.float32, ranks=ranks)
    check(oracle, randn, experts, torch.float32, route(device, 11, 4, 2), frozen=frozen)


@pytest.mark.parametrize("ranks", [(4, 3), (0, 0), (0, 2)])
def test_4_bit_experts(oracle, randn, dtype, device, ranks) -> None:
    """Folded: W goes into the wider buffer, LoRA beside it."""
    check(
        oracle, randn, Experts(randn, dtype, ranks=ranks, nf4=True), dtype, route(device, 9, 4, 2)
    )


def by_grouped_mm(monkeypatch) -> list[bool]:
    """Takes that way in what follows; the list says for which products it did."""
    used: list[bool] = []

    def uses(x: Tensor, n: int, k: int) -> bool:
        used.append(x.dtype == torch.bfloat16 and min(n, k) >= 16)
        return used[-1]

    monkeypatch.setattr(grouped, "uses_grouped_mm", uses)
    monkeypatch.setattr(moe_file, "uses_grouped_mm", uses)
    return used


@pytest.mark.parametrize("ranks", [(4, 3), (0, 0)])
@pytest.mark.parametrize("nf4", [True, False])
def test_the_way_through_grouped_mm(
    oracle, randn, device, monkeypatch, triton_runs, nf4, ranks
) -> None:
    """Torch has grouped_mm on a CPU, too: what is gathered, folded and added around it is right."""
    used = by_grouped_mm(monkeypatch)
    experts = Experts(randn, torch.bfloat16, 4, 32, 24, ranks, nf4)
    check(oracle, randn, experts, torch.bfloat16, route(device, 13, 4, 2))
    assert sum(used) >= 4  # gate/up and down, forward and dX


@pytest.mark.parametrize("nf4", [True, False])
@pytest.mark.parametrize("ranks", [(3, 5), (0, 4), (4, 0), (0, 0), (16, 64)])
def test_experts_like_gpt_oss(oracle, randn, dtype, device, ranks, nf4) -> None:
    """Transposed, biased, alternating, clamped; frozen or with LoRA on either."""
    experts = like_gpt_oss(randn, dtype, ranks=ranks, nf4=nf4)
    check(oracle, randn, experts, dtype, route(device, 15, 4, 2), gpt_oss(dtype))


@pytest.mark.parametrize(
    ("tokens", "E", "k", "H", "inner"),
    [(21, 1, 1, 24, 20), (9, 3, 1, 37, 23), (1, 5, 2, 24, 24), (12, 6, 6, 40, 20)],
)
def test_other_sizes_like_gpt_oss(oracle, randn, dtype, device, tokens, E, k, H, inner) -> None:
    """H = I and H = 2I among them."""
    experts = like_gpt_oss(randn, dtype, E, H, inner, (4, 4))
    check(oracle, randn, experts, dtype, route(device, tokens, E, k), gpt_oss(dtype))


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("activation", [ClampedSwiglu(limit=0.8), GPT_OSS, "silu"])
def test_each_difference_alone(oracle, randn, device, transposed, biased, activation) -> None:
    experts = Experts(randn, torch.float32, transposed=transposed, biased=biased)
    if activation == "silu":
        experts.biases[0] = None
    check(oracle, randn, experts, torch.float32, route(device, 11, 4, 2), activation)


@pytest.mark.parametrize("frozen", [("x",), ("w",), ("x", "w")])
def test_any_subset_of_gradients_like_gpt_oss(oracle, randn, device, frozen) -> None:
    experts = like_gpt_oss(randn, torch.float32)
    check(oracle, randn, experts, torch.float32, route(device, 9, 4, 2), GPT_OSS, frozen)


@pytest.mark.parametrize("ranks", [(4, 3), (0, 0)])
@pytest.mark.parametrize("nf4", [True, False])
def test_the_way_through_grouped_mm_like_gpt_oss(
    oracle, randn, device, monkeypatch, triton_runs, nf4, ranks
) -> None:
    used = by_grouped_mm(monkeypatch)
    experts = like_gpt_oss(randn, torch.bfloat16, 4, 32, 24, ranks, nf4)
    check(oracle, randn, experts, torch.bfloat16, route(device, 13, 4, 2), OUT_OF_REACH)
    assert sum(used) >= 4


def test_gradcheck_like_gpt_oss(randn, device) -> None:
    """With fewer experts than the index names: their slots count for nothing, in any gradient."""
    experts = like_gpt_oss(randn, torch.float64, 3, 4, 3, (2, 1))
    inputs = [randn(3, 4, dtype=torch.float64), randn(3, 2, dtype=torch.float64)]
    inputs = [t.requires_grad_() for t in (*inputs, *experts.tensors.values())]
    index = torch.tensor([[0, 2], [5, 1], [3, 4]], device=device)
    assert torch.autograd.gradcheck(experts.call(moe, index, GPT_OSS), inputs)


def test_gradcheck_in_fp64(randn, device) -> None:
    experts = Experts(randn, torch.float64, E=3, H=4, inner=3, ranks=(2, 1))
    inputs = [randn(3, 4, dtype=torch.float64), randn(3, 2, dtype=torch.float64)]
    inputs = [t.requires_grad_() for t in (*inputs, *experts.tensors.values())]
    run = experts.call(moe, route(device, 3, 3, 2, False), "gelu_tanh")
    assert torch.autograd.gradcheck(run, inputs)


def test_second_backward_and_checkpointing(randn, device) -> None:
    experts = Experts(randn, torch.float64)
    index = route(device, 15, 4, 2)
    inputs = [randn(15, 24, dtype=torch.float64), randn(15, 2, dtype=torch.float64)]
    inputs = [t.requires_grad_() for t in (*inputs, *experts.tensors.values())]
    results = []
    for function, wrap in ((reference, None), (moe, None), (moe, False), (moe, True)):
        run = experts.call(function, index)
        y = run(*inputs) if wrap is None else checkpoint(run, *inputs, use_reentrant=wrap)
        loss = (y * y).sum()
        if wrap is None:
            first = torch.autograd.grad(loss, inputs, retain_graph=True)
            again = torch.autograd.grad(loss, inputs)
            for a, b in zip(first, again, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        else:
            loss.backward()
            first = [t.grad for t in inputs]
            for t in inputs:
                t.grad = None
        results.append([loss.detach(), *first])
    for ours in results[1:]:
        for a, b in zip(ours, results[0], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("nf4", [True, False])
def test_fp32_stream_and_masters_under_autocast(randn, device, nf4) -> None:
    """x and the adapters in fp32, products in bf16, gradients in fp32."""
    experts = Experts(randn, torch.float32, nf4=nf4)
    index = route(device, 17, 4, 2)
    inputs = [randn(17, 24), randn(17, 2).sigmoid()]
    inputs = [t.requires_grad_() for t in (*inputs, *experts.tensors.values())]
    with torch.autocast(device.type, torch.bfloat16):
        y = experts.call(moe, index)(*inputs)
    exact = experts.call(reference, index, weights=experts.plain)(*inputs)
    assert y.dtype == torch.float32
    roundings = TRUNCATED if runtime.interpreting() else 1
    assert (y - exact).norm() / exact.norm() < 2e-2 * roundings
    ours = torch.autograd.grad(y.square().sum(), inputs)
    expected = torch.autograd.grad(exact.square().sum(), inputs)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() / b.norm() < 4e-2 * roundings


def test_slots_of_other_ranks_are_left_out(randn, device) -> None:
    experts = Experts(randn, torch.float32)
    index = torch.tensor([[0, 4], [4, 4], [3, 1]], device=device)
    inputs = [randn(3, 24), randn(3, 2)]
    inputs = [t.requires_grad_() for t in (*inputs, *experts.tensors.values())]
    results = []
    for function in (moe, reference):
        y = experts.call(function, index)(*inputs)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nf4", [True, False])
def test_what_is_saved_is_as_small_as_it_can_be(randn, device, nf4) -> None:
    """x once, gate/up, the narrow tensors: no k copies of x, no outputs of experts, no weights."""
    T, k, E, H, inner, ranks = 50, 2, 4, 24, 20, (3, 5)
    experts = Experts(randn, torch.float32, E, H, inner, ranks, nf4)
    tensors = [t.requires_grad_() for t in experts.tensors.values()]
    sizes: dict[int, int] = {}

    def count(t: Tensor) -> Tensor:
        if all(t.data_ptr() != own.data_ptr() for own in tensors):
            sizes[t.data_ptr()] = t.numel()
        return t

    x, w = randn(T, H).requires_grad_(), randn(T, k).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        experts.call(moe, route(device, T, E, k))(x, w, *tensors)
    S = T * k
    assert sum(sizes.values()) == T * H + S + S * (2 * inner + sum(ranks)) + 3 * S + E


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("width", [1, 40, 130])
def test_expert_glu_backward(randn, dtype, device, activation, width) -> None:
    T, k, E = 13, 2, 4
    rows = sort_by_expert(route(device, T, E, k), E)
    gu, D = randn(T * k, 2 * width + 3, dtype=dtype), randn(T * k, width, dtype=dtype)
    w = randn(T, k, dtype=dtype)

    def run(function, gu, D, w):
        out, m = torch.zeros_like(gu), D.clone()
        halves = [t[:, s : s + width] for t in (gu, out) for s in (0, width)]
        dw = function(*halves[:2], m, w, rows, activation, *halves[2:])
        return dw, m, out

    wide = [t.double() for t in (gu, D, w)]
    for ours, stock, exact in zip(
        run(expert_glu_bwd_, gu, D, w),
        run(glu_reference, gu, D, w),
        run(glu_reference, *wide),
        strict=True,
    ):
        truncates = dtype == torch.bfloat16 and runtime.interpreting()
        allowed = 2 * (stock - exact).norm() * (TRUNCATED if truncates else 1)
        error = (ours - exact).norm()
        assert error <= allowed + torch.finfo(ours.dtype).eps * exact.norm()
    assert run(expert_glu_bwd_, gu, D, w)[0].dtype == torch.float32


def test_sizes_that_do_not_fit_are_named(randn, device) -> None:
    experts = Experts(randn, torch.float32, ranks=(0, 0))
    gate_up, down = (ExpertProjection(w, 4) for w in experts.weights)
    x, index, w = randn(3, 24), route(device, 3, 4, 2), randn(3, 2)
    with pytest.raises(ValueError, match=r"expected \[E, 2I, H\] and \[E, H, I\]"):
        moe(randn(3, 20), index, w, down, down, "silu")
    with pytest.raises(ValueError, match=r"expected x \[T, 24\]"):
        moe(randn(3, 20), index, w, gate_up, down, "silu")
    with pytest.raises(ValueError, match="3 tokens, but index has 2"):
        moe(x, index[:2], w[:2], gate_up, down, "silu")
    with pytest.raises(ValueError, match=r"expected a contiguous \(4, 40\)"):
        moe(x, index, w, replace(gate_up, bias=randn(4, 24)), down, GPT_OSS)
    with pytest.raises(ValueError, match="added by `ClampedSwiglu` alone"):
        moe(x, index, w, replace(gate_up, bias=randn(4, 40)), down, "silu")
    with pytest.raises(ValueError, match="A and B of down come together"):
        moe(x, index, w, gate_up, ExpertProjection(down.weight, 4, randn(4, 2, 20)), "silu")


@pytest.mark.gpu
@pytest.mark.parametrize("base", ["grouped_mm", "triton"])
@pytest.mark.parametrize("nf4", [True, False])
def test_large(cuda, randn, oracle, monkeypatch, base, nf4) -> None:
    """A real layer's widths, with fewer experts: both ways to the large products."""
    monkeypatch.setattr(grouped, "BASE", base)
    experts = Experts(randn, torch.bfloat16, 16, 2048, 768, (16, 16), nf4)
    check(oracle, randn, experts, torch.bfloat16, route(cuda, 2000, 16, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("base", ["grouped_mm", "triton"])
@pytest.mark.parametrize("nf4", [True, False])
@pytest.mark.parametrize("ranks", [(16, 16), (0, 0)])
def test_large_like_gpt_oss(cuda, randn, oracle, monkeypatch, base, nf4, ranks) -> None:
    """gpt-oss-20b's widths, with fewer experts."""
    monkeypatch.setattr(grouped, "BASE", base)
    experts = like_gpt_oss(randn, torch.bfloat16, 8, 2880, 2880, ranks, nf4)
    check(oracle, randn, experts, torch.bfloat16, route(cuda, 1500, 8, 4), OUT_OF_REACH)
