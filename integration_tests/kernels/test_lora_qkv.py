"""q, k and v projections with LoRA, norm in front and RoPE behind; and the output projection."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorafuse.kernels import lora_o, lora_qkv
from lorafuse.kernels.lora_linear import LoraProjection, NormPrologue
from lorafuse.kernels.lora_qkv import Heads, Rotary

HEADS = Heads(query=4, key_value=2, size=8)


class Qkv:
    """Tensors of one attention's projections, and calls on them."""

    def __init__(self, randn, dtype, K=24, ranks=(4, 0, 3), bias=False, one=False):
        sizes = [HEADS.query * 8, HEADS.key_value * 8, HEADS.key_value * 8]
        if one:
            sizes, ranks = [sum(sizes)], ranks[:1]
        self.weights = [(randn(n, K) / K**0.5).to(dtype) for n in sizes]
        self.tensors: dict[str, Tensor] = {}
        for i, (n, r) in enumerate(zip(sizes, ranks, strict=True)):
            if r:
                self.tensors[f"A{i}"] = (randn(r, K) / K**0.5).to(dtype)
                self.tensors[f"B{i}"] = randn(n, r).to(dtype)
            if bias:
                self.tensors[f"bias{i}"] = randn(n).to(dtype)
        self.norm = randn(K).to(dtype)

    def call(self, function: Callable[..., tuple[Tensor, ...]], norm, cos_sin, interleaved=False):
        def run(h: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(self.tensors, tensors, strict=True))
            projections = [
                LoraProjection(
                    w.to(h.dtype),
                    given.get(f"bias{i}"),
                    given.get(f"A{i}"),
                    given.get(f"B{i}"),
                    2.0,
                )
                for i, w in enumerate(self.weights)
            ]
            prologue = None if norm is None else NormPrologue(self.norm.to(h.dtype), 1e-5, norm)
            rotary = None
            if cos_sin is not None:
                rotary = Rotary(*(t.to(h.dtype) for t in cos_sin), interleaved)
            q, k, v = function(h, projections, HEADS, prologue, rotary)
            # as attention wants them, so that gradients come back in a foreign layout
            return tuple(t.transpose(1, 2).contiguous() for t in (q, k, v))

        return run


def angles(randn: Callable[..., Tensor], batch: int, tokens: int, size: int, interleaved: bool):
    half = randn(batch, tokens, size // 2)
    full = half.repeat_interleave(2, -1) if interleaved else torch.cat((half, half), -1)
    return full.cos(), full.sin()


@pytest.mark.parametrize("norm", [None, 0.0, 1.0])
@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize(("rotary", "interleaved"), [(8, False), (4, False), (8, True)])
def test_forward_and_every_gradient(
    oracle, randn, dtype, norm, tokens, rotary, interleaved
) -> None:
    qkv = Qkv(randn, dtype, bias=tokens == 37)
    cos_sin = angles(randn, 1 if tokens == 1 else 2, tokens, rotary, interleaved)
    inputs = {"h": randn(2, tokens, 24, dtype=dtype), **qkv.tensors}
    oracle.check(
        qkv.call(lora_qkv.lora_qkv, norm, cos_sin, interleaved),
        qkv.call(lora_qkv.reference, norm, cos_sin, interleaved),
        inputs,
        list(inputs),
    )


def test_one_projection_without_rope_and_a_frozen_input(oracle, randn, dtype) -> None:
    qkv = Qkv(randn, dtype, K=123, one=True)
    inputs = {"h": randn(2, 5, 123, dtype=dtype), **qkv.tensors}
    calls = [qkv.call(f, 0.0, None) for f in (lora_qkv.lora_qkv, lora_qkv.reference)]
    oracle.check(*calls, inputs, ["A0", "B0"])


def test_gradcheck_in_fp64(randn) -> None:
    qkv = Qkv(randn, torch.float64, K=5, bias=True)
    cos_sin = angles(randn, 1, 2, 8, False)
    inputs = [randn(1, 2, 5, dtype=torch.float64), *qkv.tensors.values()]
    run = qkv.call(lora_qkv.lora_qkv, 1.0, cos_sin)
    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs])


def test_sizes_that_do_not_fit_are_named(randn) -> None:
    projection = LoraProjection(randn(60, 24))
    with pytest.raises(ValueError, match="expected \\[B, S, K\\] and 64 features"):
        lora_qkv.lora_qkv(randn(2, 3, 24), [projection], HEADS)
    with pytest.raises(ValueError, match="residual is"):
        lora_o.lora_o(randn(2, 24), projection, randn(2, 24))


def test_the_output_projection_with_its_residual(oracle, randn, dtype) -> None:
    weight = (randn(24, 32) / 6).to(dtype)
    inputs = {
        "o": randn(2, 9, 32, dtype=dtype).transpose(0, 1),
        "residual": randn(9, 2, 24, dtype=dtype),
        "A": (randn(4, 32) / 6).to(dtype),
        "B": randn(24, 4, dtype=dtype),
    }

    def call(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(o: Tensor, residual: Tensor, A: Tensor, B: Tensor) -> Tensor:
            return function(o, LoraProjection(weight.to(o.dtype), None, A, B, 0.5), residual)

        return run

    oracle.check(call(lora_o.lora_o), call(lora_o.reference), inputs, list(inputs))
