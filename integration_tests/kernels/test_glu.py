"""SwiGLU and GeGLU against torch's activations, forward and both gradients."""

from itertools import chain, combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorafuse.kernels.glu import ACTIVATIONS, glu, glu_bwd_, glu_fwd, reference


def stock(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """transformers' gated MLP between its GEMMs."""
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="none" if activation == "gelu" else "tanh") * up


def check(
    oracle: Any, inputs: dict[str, Tensor], activation: str, grads: Any = ("gate", "up")
) -> None:
    oracle.check(
        lambda g, u: glu(g, u, activation), lambda g, u: stock(g, u, activation), inputs, grads
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 123), (5, 64), (2, 3, 576), (7, 1), (3, 2500), (123,)])
def test_forward_and_gradients(oracle, randn, dtype, shape, activation):
    gate, up = 2 * randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
    check(oracle, {"gate": gate, "up": up}, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "wanted",
    list(chain.from_iterable(combinations(("gate", "up"), n) for n in range(3))),
    ids="-".join,
)
def test_subsets_of_gradients(oracle, randn, dtype, activation, wanted):
    inputs = {"gate": randn(4, 40, dtype=dtype), "up": randn(4, 40, dtype=dtype)}
    check(oracle, inputs, activation, wanted)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layouts(oracle, randn, dtype, activation):
    wide = randn(2, 3, 90, dtype=dtype)
    check(oracle, {"gate": wide[..., :40], "up": wide[..., 40:80]}, activation)
    across = randn(40, 6, dtype=dtype).t()
    check(oracle, {"gate": across, "up": randn(6, 40, dtype=dtype)}, activation)
    check(oracle, {"gate": wide[:, 1:, ::2], "up": wide[:, :2, 1::2]}, activation)
    check(oracle, {"gate": wide[:, :0], "up": wide[:, :0]}, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_launchers_in_place_in_a_wide_buffer(oracle, randn, dtype, activation):
    """gate <- dgate, up <- dup, dm <- m in slices of wide buffers, whose other columns stay."""
    inner = 52
    gate_up, wide_m = randn(6, 2 * inner + 8, dtype=dtype), randn(6, inner + 4, dtype=dtype)
    gate, up, m = gate_up[:, :inner], gate_up[:, inner : 2 * inner], wide_m[:, :inner]
    guards = (gate_up[:, 2 * inner :].clone(), wide_m[:, inner:].clone())
    leaves = [t.detach().clone().requires_grad_() for t in (gate, up)]
    wide = [t.detach().double().requires_grad_() for t in (gate, up)]
    dm = randn(6, inner, dtype=dtype)
    results = {}
    for name, tensors in (("stock", leaves), ("exact", wide)):
        y = stock(*tensors, activation)
        y.backward(dm.to(y.dtype))
        results[name] = (y.detach(), tensors[0].grad, tensors[1].grad)

    glu_fwd(gate, up, activation, m)
    forward = m.clone()
    m.copy_(dm)
    glu_bwd_(gate, up, m, activation)
    for name, got, of_torch, exact in zip(
        ("m", "dgate", "dup"), (m, gate, up), results["stock"], results["exact"], strict=True
    ):
        oracle.compare(name, got, of_torch, exact)
    oracle.compare("forward", forward, results["stock"][0], results["exact"][0])
    assert torch.equal(gate_up[:, 2 * inner :], guards[0])
    assert torch.equal(wide_m[:, inner:], guards[1])


@pytest.mark.filterwarnings("ignore:overflow encountered")  # exp of the interpreter's numpy
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_gates_stay_finite(device, dtype, activation):
    """z, exp and the derivative's products overflow fp32 for some of these, computed plainly."""
    largest = min(torch.finfo(dtype).max, 1e38)
    gates = [0.0, 1.0, 5.0, 9.0, 15.0, 17.0, 30.0, 90.0, 1e4, largest / 2, largest]
    gate = torch.tensor([[*gates, *(-g for g in gates)]], device=device).to(dtype)
    up = torch.full_like(gate, 0.25)
    m = glu(gate, up, activation)
    dgate, dup, recomputed = gate.clone(), up.clone(), torch.ones_like(gate)
    glu_bwd_(dgate, dup, recomputed, activation)

    wide_gate, wide_up = gate.double().requires_grad_(), up.double().requires_grad_()
    exact = stock(wide_gate, wide_up, activation)
    exact.sum().backward()
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-6}
    for got, want in (
        (m, exact.detach()),
        (recomputed, exact.detach()),
        (dgate, wide_gate.grad),
        (dup, wide_up.grad),
    ):
        torch.testing.assert_close(got.double(), want, **tolerance)


def test_rows_beyond_2_to_the_31_elements(oracle, device, randn):
    """A row that starts at element 2^31 although its number and the stride fit 32 bits."""
    buffer = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    wide = buffer.as_strided((3, 64), (2**30, 1))
    wide.copy_(randn(3, 64))
    near, up = wide.clone(), randn(3, 64, dtype=torch.bfloat16)
    check(oracle, {"gate": wide, "up": up}, "silu")
    dm = randn(3, 64, dtype=torch.bfloat16)
    far_copies, near_copies = (up.clone(), dm.clone()), (up.clone(), dm.clone())
    glu_bwd_(wide, *far_copies, "silu")
    glu_bwd_(near, *near_copies, "silu")
    assert torch.equal(wide, near)
    assert all(torch.equal(a, b) for a, b in zip(far_copies, near_copies, strict=True))


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_triton_equals_reference(randn, dtype, activation):
    gate, up = randn(5, 123, dtype=dtype), randn(5, 123, dtype=dtype)
    got, want = glu(gate, up, activation), reference(gate, up, activation)
    torch.testing.assert_close(got, want, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    inner=st.integers(1, 1200),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_any_shape(oracle, randn, shape, inner, activation):
    # Positive, for a lone element near the zero of the slope has nothing but its rounding.
    inputs = {"gate": randn(*shape, inner).abs(), "up": randn(*shape, inner)}
    check(oracle, inputs, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(device, activation):
    gate, up = (torch.randn(3, 5, dtype=torch.float64, device=device) for _ in range(2))
    leaves = ((3 * gate).requires_grad_(), up.requires_grad_())
    assert torch.autograd.gradcheck(lambda g, u: glu(g, u, activation), leaves)


def test_wrong_arguments_are_refused(randn):
    x = randn(4, 8)
    with pytest.raises(ValueError, match="'relu' is not one of silu, gelu, gelu_tanh"):
        glu(x, x, "relu")
    with pytest.raises(ValueError, match="differ in shape"):
        glu(x, randn(1, 8), "silu")
    with pytest.raises(ValueError, match="one shape"):
        glu_fwd(x, x, "silu", randn(4, 9))
    with pytest.raises(ValueError, match="one shape"):
        glu_bwd_(x, x, randn(3, 8), "silu")
    with pytest.raises(ValueError, match="contiguous rows"):
        glu_fwd(x, x, "silu", randn(4, 16)[:, ::2])


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(8192, 14336), (4096, 11008), (1, 14336), (3000, 4864)])
def test_large(oracle, randn, dtype, shape, activation):
    gate, up = 2 * randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
    check(oracle, {"gate": gate, "up": up}, activation)
