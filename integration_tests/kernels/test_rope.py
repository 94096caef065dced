"""RoPE against transformers' form of it, forward and both gradients."""

from itertools import chain, combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorafuse.kernels.rope import reference, rope, rope_copy, rope_qk_


def stock(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """transformers' form for Llama (half-split) and Cohere (interleaved), partial as in Phi."""
    R = cos.shape[-1]

    def partner(x: Tensor) -> Tensor:
        if interleaved:
            return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
        return torch.cat((-x[..., R // 2 :], x[..., : R // 2]), -1)

    def turn(x: Tensor) -> Tensor:
        y = x[..., :R] * cos.unsqueeze(2) + partner(x[..., :R]) * sin.unsqueeze(2)
        return torch.cat((y.to(x.dtype), x[..., R:]), -1)

    return turn(q), turn(k)


def angles(randn: Any, B: int, S: int, R: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Unrelated numbers instead of a rotation's: each of them must reach its own place."""
    return {"cos": randn(B, S, R, dtype=dtype), "sin": randn(B, S, R, dtype=dtype)}


def check(
    oracle: Any, inputs: dict[str, Tensor], interleaved: bool, grads: Any = ("q", "k")
) -> None:
    oracle.check(
        lambda *args: rope(*args, interleaved),
        lambda *args: stock(*args, interleaved),
        inputs,
        grads,
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("B", "S", "Nq", "Nk", "D", "R"),
    [
        (2, 3, 4, 2, 16, 16),
        (1, 1, 9, 3, 64, 64),  # SmolLM2's heads, one token
        (2, 2, 3, 1, 80, 32),  # Phi-2: 0.4 of 80
        (1, 2, 3, 5, 12, 6),  # more keys than queries, R / 2 not a power of two
        (1, 3, 40, 33, 256, 256),  # Gemma's head size: several tiles of heads
        (1, 2, 2, 2, 7, 2),
    ],
)
def test_forward_and_gradients(oracle, randn, dtype, B, S, Nq, Nk, D, R, interleaved):
    inputs = {"q": randn(B, S, Nq, D, dtype=dtype), "k": randn(B, S, Nk, D, dtype=dtype)}
    check(oracle, inputs | angles(randn, B, S, R, dtype), interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_angles_of_one_batch_and_in_fp32(oracle, randn, dtype, interleaved):
    inputs = {"q": randn(2, 3, 4, 16, dtype=dtype), "k": randn(2, 3, 2, 16, dtype=dtype)}
    check(oracle, inputs | angles(randn, 1, 3, 16, torch.float32), interleaved)
    expanded = {n: t.expand(2, 3, 16) for n, t in angles(randn, 1, 3, 16, dtype).items()}
    check(oracle, inputs | expanded, interleaved)
    strided = {n: t[..., ::2] for n, t in angles(randn, 2, 3, 32, dtype).items()}
    check(oracle, inputs | strided, interleaved)


@pytest.mark.parametrize(
    "wanted", list(chain.from_iterable(combinations(("q", "k"), n) for n in range(3))), ids="-".join
)
def test_subsets_of_gradients(oracle, randn, dtype, wanted):
    inputs = {"q": randn(2, 3, 4, 8, dtype=dtype), "k": randn(2, 3, 2, 8, dtype=dtype)}
    check(oracle, inputs | angles(randn, 2, 3, 8, dtype), False, wanted)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "layout", ["qkv buffer", "heads first", "every other element", "no tokens"]
)
def test_layouts(oracle, randn, dtype, layout, interleaved):
    S = 0 if layout == "no tokens" else 3
    if layout == "qkv buffer":
        qkv = randn(2, S, 8 * 12 + 5, dtype=dtype)
        q, k = qkv[..., :48].unflatten(-1, (4, 12)), qkv[..., 48:72].unflatten(-1, (2, 12))
    elif layout == "heads first":
        q, k = (randn(2, n, S, 12, dtype=dtype).transpose(1, 2) for n in (4, 2))
    elif layout == "every other element":
        q, k = (randn(2, S, n, 24, dtype=dtype)[..., ::2] for n in (4, 2))
    else:
        q, k = (randn(2, S, n, 12, dtype=dtype) for n in (4, 2))
    check(oracle, {"q": q, "k": k} | angles(randn, 2, S, 8, dtype), interleaved)


def test_expanded_gradients(randn, dtype):
    """The gradient of a sum has stride 0 in every dimension."""
    q, k = (randn(2, 3, n, 8, dtype=dtype).requires_grad_() for n in (4, 2))
    cos, sin = angles(randn, 2, 3, 8, dtype).values()
    sum(y.sum() for y in rope(q, k, cos, sin)).backward()
    leaves = [t.detach().double().requires_grad_() for t in (q, k)]
    sum(y.sum() for y in stock(*leaves, cos.double(), sin.double())).backward()
    for ours, exact in zip((q, k), leaves, strict=True):
        torch.testing.assert_close(
            ours.grad.double(), exact.grad, rtol=torch.finfo(dtype).eps, atol=1e-6
        )


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_copy_from_attention_gradients_into_a_wide_buffer(
    oracle, randn, dtype, interleaved, backward
):
    """[B, N, S, D] gradients to slices of one [T, ..] buffer, whose other columns stay."""
    B, S, Nq, Nk, D, R = 2, 3, 4, 2, 12, 8
    src_q, src_k = (randn(B, n, S, D, dtype=dtype).transpose(1, 2) for n in (Nq, Nk))
    cos, sin = angles(randn, B, S, R, dtype).values()
    wide = randn(B, S, (Nq + 2 * Nk) * D + 3, dtype=dtype)
    guard = wide[..., (Nq + Nk) * D :].clone()
    dst_q = wide[..., : Nq * D].unflatten(-1, (Nq, D))
    dst_k = wide[..., Nq * D : (Nq + Nk) * D].unflatten(-1, (Nk, D))
    rope_copy(src_q, src_k, dst_q, dst_k, cos, sin, interleaved, backward)

    for name, src, dst in (("q", src_q, dst_q), ("k", src_k, dst_k)):
        x = src.double().requires_grad_()
        y, _ = stock(x, x, cos.double(), sin.double(), interleaved)
        exact = torch.autograd.grad(y, x, src.double())[0] if backward else y.detach()
        oracle.compare(name, dst, exact.to(dtype), exact)
    assert torch.equal(wide[..., (Nq + Nk) * D :], guard)

    in_place = [t.clone() for t in (src_q, src_k)]
    rope_qk_(*in_place, cos, sin, interleaved, backward)
    assert torch.equal(in_place[0], dst_q) and torch.equal(in_place[1], dst_k)


@pytest.mark.parametrize("layout", ["heads first", "expanded", "every other element", "fp32"])
@pytest.mark.parametrize(("Nk", "Nv", "D", "R"), [(2, 2, 12, 8), (3, 33, 256, 256), (1, 1, 7, 2)])
def test_v_comes_along_unturned(randn, dtype, layout, Nk, Nv, D, R):
    """Into the same buffer, from the layouts that gradients have; the columns behind it stay."""
    B, S, Nq = 2, 3, 4
    q, k = (randn(B, n, S, D, dtype=dtype).transpose(1, 2) for n in (Nq, Nk))
    cos, sin = angles(randn, B, S, R, dtype).values()
    if layout == "heads first":
        v = randn(B, Nv, S, D, dtype=dtype).transpose(1, 2)
    elif layout == "expanded":
        v = randn(1, dtype=dtype).expand(B, S, Nv, D)
    elif layout == "every other element":
        v = randn(B, S, Nv, 2 * D, dtype=dtype)[..., ::2]
    else:
        v = randn(B, S, Nv, D)
    wide = randn(B, S, (Nq + Nk + Nv) * D + 3, dtype=dtype)
    guard = wide[..., (Nq + Nk + Nv) * D :].clone()
    parts = wide[..., : (Nq + Nk + Nv) * D].unflatten(-1, (-1, D)).split((Nq, Nk, Nv), 2)
    rope_copy(q, k, parts[0], parts[1], cos, sin, False, True, v=(v, parts[2]))

    alone = torch.empty_like(parts[0]), torch.empty_like(parts[1])
    rope_copy(q, k, *alone, cos, sin, False, True)
    assert torch.equal(parts[0], alone[0]) and torch.equal(parts[1], alone[1])
    if layout == "fp32":  # Triton's interpreter truncates to bf16
        torch.testing.assert_close(parts[2].float(), v, rtol=torch.finfo(dtype).eps, atol=1e-6)
    else:
        assert torch.equal(parts[2], v)
    assert torch.equal(wide[..., (Nq + Nk + Nv) * D :], guard)


def test_only_q_in_place(randn):
    """q's destination is q itself, k's is not: k's elements past R are still copied."""
    q, k = randn(1, 2, 2, 8), randn(1, 2, 2, 8)
    cos, sin = angles(randn, 1, 2, 4, torch.float32).values()
    expected = rope(q, k, cos, sin)
    k_out = torch.empty_like(k)
    rope_copy(q, k, q, k_out, cos, sin)
    torch.testing.assert_close((q, k_out), expected, rtol=0, atol=0)


def test_tokens_beyond_2_to_the_31_elements(device, randn):
    """A token, then a head, at element 2^31 although its number and the stride fit 32 bits."""
    wide = torch.empty(2**31 + 8, dtype=torch.bfloat16, device=device)
    k = randn(1, 3, 2, 8, dtype=torch.bfloat16)
    cos, sin = angles(randn, 1, 3, 8, torch.float32).values()
    for shape, strides in (((1, 3, 1, 8), (0, 2**30, 0, 1)), ((1, 1, 3, 8), (0, 0, 2**30, 1))):
        q = randn(*shape, dtype=torch.bfloat16)
        c, s, keys = cos[:, : shape[1]], sin[:, : shape[1]], k[:, : shape[1]].clone()
        far = wide.as_strided(shape, strides)
        far.copy_(q)
        expected, _ = rope(q, keys, c, s)
        rope_qk_(far, keys, c, s)
        assert torch.equal(far, expected)


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("interleaved", [False, True])
def test_triton_equals_reference(randn, dtype, interleaved):
    q, k = randn(2, 3, 5, 20, dtype=dtype), randn(2, 3, 2, 20, dtype=dtype)
    cos, sin = angles(randn, 1, 3, 12, torch.float32).values()
    for got, x in zip(rope(q, k, cos, sin, interleaved), (q, k), strict=True):
        want = reference(x, cos, sin, interleaved)
        torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(
    B=st.integers(1, 3),
    S=st.integers(0, 4),
    Nq=st.integers(1, 5),
    Nk=st.integers(1, 5),
    pairs=st.integers(1, 20),
    rest=st.integers(0, 9),
    shared=st.booleans(),
    interleaved=st.booleans(),
)
def test_any_shape(oracle, randn, B, S, Nq, Nk, pairs, rest, shared, interleaved):
    D = 2 * pairs + rest
    inputs = {"q": randn(B, S, Nq, D), "k": randn(B, S, Nk, D)}
    inputs |= angles(randn, 1 if shared else B, S, 2 * pairs, torch.float32)
    check(oracle, inputs, interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(device, interleaved):
    q, k, cos, sin = (
        torch.randn(*shape, dtype=torch.float64, device=device)
        for shape in ((2, 3, 2, 6), (2, 3, 1, 6), (1, 3, 4), (1, 3, 4))
    )
    leaves = (q.requires_grad_(), k.requires_grad_())
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin, interleaved), leaves)


def test_wrong_arguments_are_refused(randn):
    q, k, cos = randn(2, 3, 4, 8), randn(2, 3, 2, 8), randn(2, 3, 8)
    with pytest.raises(ValueError, match=r"k \[B, S, Nk, D\]"):
        rope(q, randn(2, 3, 2, 10), cos, cos)
    with pytest.raises(ValueError, match=r"k \[B, S, Nk, D\]"):
        rope_copy(q, k, q, q, cos, cos)
    for v in ((k, q), (randn(2, 3, 2, 10),) * 2, (randn(2, 4, 2, 8),) * 2):
        with pytest.raises(ValueError, match=r"expected v \[2, 3, Nv, 8\]"):
            rope_copy(q, k, q, k, cos, cos, v=v)
    for bad in (randn(2, 3, 10), randn(2, 3, 3), randn(2, 4, 8), randn(3, 3, 8)):
        with pytest.raises(ValueError, match="expected cos and sin"):
            rope(q, k, bad, bad)
    with pytest.raises(ValueError, match="expected cos and sin"):
        rope(q, k, cos, cos[..., :6])
    with pytest.raises(ValueError, match="require a gradient"):
        rope(q, k, cos.requires_grad_(), cos)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("D", "R"), [(128, 128), (256, 256), (80, 32), (96, 96)])
def test_large(oracle, randn, dtype, D, R, interleaved):
    q, k = (randn(2, n, 4096, D, dtype=dtype).transpose(1, 2) for n in (32, 8))
    check(oracle, {"q": q, "k": k} | angles(randn, 1, 4096, R, dtype), interleaved)
