"""RMSNorm against transformers' form of it, forward and every gradient."""

from itertools import chain, combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorafuse.kernels import rms_norm as module
from lorafuse.kernels.rms_norm import reference, rms_norm, rms_norm_bwd, rms_norm_fwd, weigh_

EPS = 1e-6
NAMES = ("x", "weight", "residual")


def stock(x: Tensor, weight: Tensor, residual: Tensor | None = None, offset: float = 0.0) -> Any:
    """LlamaRMSNorm, or with offset 1 Gemma's, on x + residual."""
    h = x if residual is None else x + residual
    wide = h if h.dtype == torch.float64 else h.float()
    n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    y = n * (offset + weight.to(wide.dtype)) if offset else weight * n.to(h.dtype)
    y = y.to(x.dtype)
    return y if residual is None else (y, h)


def ours(x: Tensor, weight: Tensor, residual: Tensor | None = None, offset: float = 0.0) -> Any:
    if residual is None:
        return rms_norm(x, weight, EPS, offset)
    return rms_norm(x, weight, EPS, offset, residual)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 123), (5, 64), (2, 3, 576), (7, 2), (2, 4097), (123,)])
def test_forward_and_gradients(oracle, randn, dtype, shape, offset):
    inputs = {"x": randn(*shape, dtype=dtype), "weight": randn(shape[-1], dtype=dtype)}
    oracle.check(
        lambda x, w: ours(x, w, offset=offset),
        lambda x, w: stock(x, w, offset=offset),
        inputs,
        grads=("x", "weight"),
    )


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(
    "wanted", list(chain.from_iterable(combinations(NAMES, n) for n in range(4))), ids="-".join
)
def test_residual_and_subsets_of_gradients(oracle, randn, dtype, wanted, offset):
    inputs = {name: randn(2, 3, 40, dtype=dtype) for name in ("x", "residual")}
    inputs = {"x": inputs["x"], "weight": randn(40, dtype=dtype), "residual": inputs["residual"]}
    _, h = oracle.check(
        lambda x, w, r: ours(x, w, r, offset),
        lambda x, w, r: stock(x, w, r, offset),
        inputs,
        wanted,
    )
    expected = inputs["x"].double() + inputs["residual"].double()
    torch.testing.assert_close(h, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype", "out_dtype"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_mixed_dtypes(oracle, randn, x_dtype, weight_dtype, out_dtype):
    inputs = {"x": randn(4, 96, dtype=x_dtype), "weight": randn(96, dtype=weight_dtype)}

    def mixed_stock(x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = stock(x, weight.to(x.dtype))
        return y if x.dtype == torch.float64 else y.to(out_dtype)

    (y,) = oracle.check(
        lambda x, w: rms_norm(x, w, EPS, out_dtype=out_dtype),
        mixed_stock,
        inputs,
        grads=("x", "weight"),
    )
    assert y.dtype == out_dtype


def test_the_rounded_sum_is_what_is_normalised(randn, dtype):
    """Backward and the next layer see the rounded x + residual: y must be its norm, to the bit."""
    x, residual = (randn(4, 96, dtype=dtype) for _ in range(2))
    weight = randn(96)
    y, h = rms_norm(x, weight, EPS, 0.0, residual)
    assert torch.equal(y, rms_norm(h, weight, EPS))


def test_wider_residual_stream(oracle, randn):
    """A bf16 branch onto an fp32 stream: the sum stays fp32, the norm goes out in bf16."""
    inputs = {
        "x": randn(4, 96, dtype=torch.bfloat16),
        "weight": randn(96),
        "residual": randn(4, 96),
    }
    y, h = oracle.check(ours, stock, inputs, NAMES)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)


def layouts(randn: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """[.., 24] tensors with every kind of stride that callers bring."""
    return {
        "slice of a wide buffer": randn(6, 40, dtype=dtype)[:, :24],
        "heads of a qkv buffer": randn(2, 3, 128, dtype=dtype)[..., :96].unflatten(-1, (4, 24)),
        "heads before tokens": randn(2, 4, 3, 24, dtype=dtype).transpose(1, 2),
        "cut sequence": randn(2, 5, 24, dtype=dtype)[:, 1:],
        "every other element": randn(6, 48, dtype=dtype)[:, ::2],
        "expanded": randn(1, 24, dtype=dtype).expand(3, 24),
        "no tokens": randn(2, 0, 24, dtype=dtype),
        "no heads": randn(2, 0, 24, dtype=dtype).unsqueeze(1),
    }


@pytest.mark.parametrize("layout", list(layouts(torch.empty, torch.float32)))
def test_layouts(oracle, randn, dtype, layout):
    x = layouts(randn, dtype)[layout]
    inputs = {"x": x, "weight": randn(24, dtype=dtype), "residual": randn(*x.shape, dtype=dtype)}
    oracle.check(ours, stock, inputs, NAMES)
    oracle.check(ours, stock, {"x": x, "weight": inputs["weight"]}, ("x", "weight"))


def test_launchers_write_only_their_columns(oracle, randn, dtype):
    """Forward and backward between slices of wide buffers, one norm for each of several heads."""
    x = randn(5, 4 * 16 + 8, dtype=dtype)[:, :64].unflatten(1, (4, 16))
    wide_y, wide_dx = randn(5, 72, dtype=dtype), randn(5, 80, dtype=dtype)
    y = wide_y[:, :64].unflatten(1, (4, 16))
    dx = wide_dx[:, 8:72].unflatten(1, (4, 16))
    guards = [wide_y[:, 64:].clone(), wide_dx[:, :8].clone(), wide_dx[:, 72:].clone()]
    weight, dy = randn(16, dtype=dtype), randn(5, 4, 16, dtype=dtype)

    rstd = rms_norm_fwd(x, weight, EPS, 1.0, y)
    result, dweight = rms_norm_bwd(dy, x, weight, rstd, 1.0, None, True, out=dx)

    leaves = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = stock(*leaves, offset=1.0)
    exact.backward(dy.double())
    assert result is dx and dweight is not None
    assert (rstd.shape, rstd.dtype) == ((5, 4), torch.float32)
    for name, got, want in (
        ("y", y, exact.detach()),
        ("dx", dx, leaves[0].grad),
        ("dweight", dweight, leaves[1].grad),
    ):
        oracle.compare(name, got, want.to(dtype), want)
    for guard, now in zip(guards, (wide_y[:, 64:], wide_dx[:, :8], wide_dx[:, 72:]), strict=True):
        assert torch.equal(guard, now)


def test_backward_adds_the_residual_gradient_in_place(oracle, randn, dtype):
    x, weight, dy = randn(6, 48, dtype=dtype), randn(48, dtype=dtype), randn(6, 48, dtype=dtype)
    stream = randn(6, 56, dtype=dtype)
    before = stream.clone()
    rstd = rms_norm_fwd(x, weight, EPS, 0.0, torch.empty_like(x))
    dx, dweight = rms_norm_bwd(dy, x, weight, rstd, 0.0, stream[:, :48], False, out=stream[:, :48])

    leaf = x.double().requires_grad_()
    stock(leaf, weight.double()).backward(dy.double())
    exact = leaf.grad + before[:, :48].double()
    assert dweight is None and dx.data_ptr() == stream.data_ptr()
    oracle.compare("dx + residual_grad", dx, exact.to(dtype), exact)
    assert torch.equal(stream[:, 48:], before[:, 48:])


@pytest.mark.parametrize("programs", [1, 2, 3])
def test_dweight_over_several_tiles_repeats_bit_for_bit(oracle, randn, monkeypatch, programs):
    """Fewer programs than tiles, and a last program with fewer tiles than the others."""
    monkeypatch.setattr(module, "_DWEIGHT_PROGRAMS", programs)
    x, weight = randn(7, 1500), randn(1500)
    oracle.check(ours, stock, {"x": x, "weight": weight}, ("x", "weight"))
    dy = randn(7, 1500)
    rstd = rms_norm_fwd(x, weight, EPS, 0.0, torch.empty_like(x))
    first, second = (rms_norm_bwd(dy, x, weight, rstd, 0.0, None, True)[1] for _ in range(2))
    assert first is not None and second is not None and torch.equal(first, second)


def test_rows_beyond_2_to_the_31_elements(oracle, device, randn):
    """A row that starts at element 2^31 although its number and the stride fit 32 bits."""
    buffer = torch.empty(
        2**31 + 64, dtype=torch.bfloat16, device=device
    )  # on CPU, of untouched pages
    wide = buffer.as_strided((3, 64), (2**30, 1))
    wide.copy_(randn(3, 64))
    near, weight = wide.clone(), randn(64, dtype=torch.bfloat16)
    oracle.check(ours, stock, {"x": wide, "weight": weight}, ("x", "weight"))
    y = torch.empty_like(near)
    rms_norm_fwd(near, weight, EPS, 0.0, y)
    rms_norm_fwd(near, weight, EPS, 0.0, wide)
    assert torch.equal(wide, y)


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("residual", [False, True])
def test_triton_equals_reference(randn, dtype, residual):
    x, weight = randn(5, 123, dtype=dtype), randn(123)
    r = randn(5, 123, dtype=dtype)
    if residual:
        got, want = rms_norm(x, weight, EPS, 1.0, r), reference(x, weight, EPS, 1.0, r)
    else:
        got, want = (rms_norm(x, weight, EPS, 1.0),), (reference(x, weight, EPS, 1.0),)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 40), (9, 256), (130, 5000), (0, 8)])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_columns_are_weighed_in_place(randn, shape, weight_dtype):
    x, weight = randn(*shape, dtype=torch.float32), randn(shape[1], dtype=weight_dtype)
    want = x * (weight.float() + 1.0)
    found = weigh_(x, weight, 1.0)
    assert found is x
    torch.testing.assert_close(found, want)


def test_one_element_a_row(oracle, randn, dtype):
    oracle.check(ours, stock, {"x": randn(7, 1, dtype=dtype), "weight": randn(1)}, ("weight",))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    K=st.integers(2, 300),  # of one element the norm is a sign: its gradient is all cancellation
    offset=st.sampled_from([0.0, 1.0]),
    residual=st.booleans(),
)
def test_any_shape(oracle, randn, shape, K, offset, residual):
    inputs = {"x": randn(*shape, K), "weight": randn(K)}
    if residual:
        inputs["residual"] = randn(*shape, K)
    oracle.check(
        lambda *args: ours(*args, offset=offset),
        lambda *args: stock(*args, offset=offset),
        inputs,
        tuple(inputs),
    )


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradcheck(device, offset):
    x, residual = (torch.randn(2, 3, 5, dtype=torch.float64, device=device) for _ in range(2))
    weight = torch.randn(5, dtype=torch.float64, device=device)
    leaves = [t.requires_grad_() for t in (x, weight, residual)]
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3, offset), leaves[:2])
    assert torch.autograd.gradcheck(lambda x, w, r: rms_norm(x, w, 1e-3, offset, r), leaves)


def test_wrong_arguments_are_refused(randn):
    x, weight = randn(4, 8), randn(8)
    rstd = rms_norm_fwd(x, weight, EPS, 0.0, torch.empty_like(x))
    with pytest.raises(ValueError, match=r"weight \[K\]"):
        rms_norm(x, randn(7), EPS)
    with pytest.raises(ValueError, match="residual must be"):
        rms_norm(x, weight, EPS, 0.0, randn(1, 8))
    with pytest.raises(ValueError, match="out must be"):
        rms_norm_fwd(x, weight, EPS, 0.0, randn(4, 9))
    with pytest.raises(ValueError, match="contiguous rows"):
        rms_norm_fwd(x, weight, EPS, 0.0, randn(4, 16)[:, ::2])
    with pytest.raises(ValueError, match="go together"):
        rms_norm_fwd(x, weight, EPS, 0.0, torch.empty_like(x), residual=x)
    with pytest.raises(ValueError, match="dy must be"):
        rms_norm_bwd(randn(3, 8), x, weight, rstd, 0.0, None, False)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    "shape", [(8192, 4096), (8192, 32, 128), (2048, 576), (1024, 16384), (300, 20000), (64, 53248)]
)
def test_large(oracle, randn, dtype, shape):
    inputs = {"x": randn(*shape, dtype=dtype), "weight": randn(shape[-1], dtype=dtype)}
    inputs["residual"] = randn(*shape, dtype=dtype)
    oracle.check(ours, stock, inputs, NAMES)
