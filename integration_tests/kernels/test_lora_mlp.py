"""The gated MLP with LoRA: every gradient, the norm in front, the residual behind."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorafuse.kernels.lora_linear import LoraProjection, NormPrologue
from lorafuse.kernels.lora_mlp import lora_mlp, reference


class Mlp:
    """Tensors of one MLP, and calls of the kernel and of its definition on them."""

    def __init__(self, randn, dtype, K=24, inner=40, ranks=(4, 3, 5), bias=False, one=False):
        widths = [(2 * inner, K)] if one else [(inner, K), (inner, K)]
        self.shapes = [*widths, (K, inner)]
        self.weights = [(randn(n, k) / k**0.5).to(dtype) for n, k in self.shapes]
        ranks = (ranks[0], ranks[-1]) if one else ranks
        self.ranks, self.bias = ranks, bias
        self.tensors: dict[str, Tensor] = {}
        for i, ((n, k), r) in enumerate(zip(self.shapes, ranks, strict=True)):
            if r:
                self.tensors[f"A{i}"] = (randn(r, k) / k**0.5).to(dtype)
                self.tensors[f"B{i}"] = randn(n, r).to(dtype)
            if bias:
                self.tensors[f"bias{i}"] = randn(n).to(dtype)
        self.norm = randn(K).to(dtype)

    def call(self, function: Callable[..., Tensor], activation, norm, residual, dropout=0.0):
        def run(h: Tensor, *tensors: Tensor) -> Tensor:
            given = dict(zip(self.tensors, tensors, strict=True))
            projections = [
                LoraProjection(
                    w.to(h.dtype),
                    given.get(f"bias{i}"),
                    given.get(f"A{i}"),
                    given.get(f"B{i}"),
                    0.5,
                    dropout,
                )
                for i, w in enumerate(self.weights)
            ]
            prologue = None if norm is None else NormPrologue(self.norm.to(h.dtype), 1e-5, norm)
            return function(h, projections[:-1], projections[-1], activation, prologue, residual)

        return run


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("norm", "residual"), [(None, False), (0.0, True), (1.0, True)])
@pytest.mark.parametrize("tokens", [1, 50])
def test_forward_and_every_gradient(
    oracle, randn, dtype, activation, norm, residual, tokens
) -> None:
    mlp = Mlp(randn, dtype, bias=tokens == 50)
    inputs = {"h": randn(2, tokens, 24, dtype=dtype), **mlp.tensors}
    oracle.check(
        mlp.call(lora_mlp, activation, norm, residual),
        mlp.call(reference, activation, norm, residual),
        inputs,
        list(inputs),
    )


@pytest.mark.parametrize("ranks", [(4, 0, 0), (0, 4, 0), (0, 0, 4), (0, 0, 0)])
@pytest.mark.parametrize("frozen_input", [True, False])
def test_any_subset_of_the_projections(oracle, randn, ranks, frozen_input) -> None:
    mlp = Mlp(randn, torch.float32, ranks=ranks)
    inputs = {"h": randn(30, 24), **mlp.tensors}
    needs = [name for name in inputs if name != "h" or not frozen_input]
    if not needs:
        return
    call = (mlp.call(f, "silu", 0.0, True) for f in (lora_mlp, reference))
    oracle.check(*call, inputs, needs)


def test_one_projection_for_gate_and_up_and_odd_sizes(oracle, randn, dtype) -> None:
    mlp = Mlp(randn, dtype, K=123, inner=37, one=True)
    inputs = {"h": randn(3, 123, dtype=dtype), **mlp.tensors}
    call = (mlp.call(f, "silu", 0.0, True) for f in (lora_mlp, reference))
    oracle.check(*call, inputs, list(inputs))


def test_gradcheck_in_fp64(randn) -> None:
    mlp = Mlp(randn, torch.float64, K=4, inner=6, ranks=(2, 1, 2), bias=True)
    inputs = [randn(3, 4, dtype=torch.float64), *mlp.tensors.values()]
    run = mlp.call(lora_mlp, "gelu_tanh", 1.0, True)
    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_second_backward_dropout_and_checkpointing(randn, dropout) -> None:
    mlp = Mlp(randn, torch.float64, K=16, inner=24)
    inputs = [
        t.requires_grad_() for t in (randn(20, 16, dtype=torch.float64), *mlp.tensors.values())
    ]
    results = []
    for function, wrap in (
        (reference, None),
        (lora_mlp, None),
        (lora_mlp, False),
        (lora_mlp, True),
    ):
        torch.manual_seed(7)
        run = mlp.call(function, "silu", 0.0, True, dropout)
        y = run(*inputs) if wrap is None else checkpoint(run, *inputs, use_reentrant=wrap)
        loss = (y * y).sum()
        if wrap is None:
            first = torch.autograd.grad(loss, inputs, retain_graph=True)
            # gate and up were overwritten in place by the first pass
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


def test_fp32_residual_stream_under_autocast(randn, device) -> None:
    mlp = Mlp(randn, torch.float32)
    h = randn(9, 24).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        y = mlp.call(lora_mlp, "silu", 0.0, True)(h, *mlp.tensors.values())
    exact = mlp.call(reference, "silu", 0.0, True)(h, *mlp.tensors.values())
    assert y.dtype == torch.float32
    assert (y - exact).norm() / exact.norm() < 2e-2
    (ours,) = torch.autograd.grad(y.square().sum(), h)
    (expected,) = torch.autograd.grad(exact.square().sum(), h)
    assert ours.dtype == torch.float32
    assert (ours - expected).norm() / expected.norm() < 4e-2


def test_sizes_that_do_not_fit_are_named(randn) -> None:
    mlp = Mlp(randn, torch.float32)
    gate, up, down = (LoraProjection(w) for w in mlp.weights)
    with pytest.raises(ValueError, match="expected twice the down projection's 40"):
        lora_mlp(randn(2, 24), [gate], down, "silu")
    with pytest.raises(ValueError, match="24 features"):
        lora_mlp(randn(2, 24), [down, up], down, "silu")
