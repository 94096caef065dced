"""The LoRA engine: groups of projections, folding, dropout, biases, 4-bit weights."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorafuse.kernels.lora_linear import (
    Group,
    LoraProjection,
    compute_dtype,
    flat_tensors,
    folding_pays,
    lora_linear,
    reference,
    with_tensors,
)

Projections = Sequence[LoraProjection]


def named(projections: Projections) -> dict[str, Tensor]:
    """The differentiable tensors by name, without the absent ones."""
    names = [f"{kind}{i}" for i in range(len(projections)) for kind in ("A", "B", "bias")]
    pairs = zip(names, flat_tensors(projections), strict=True)
    return {name: tensor for name, tensor in pairs if tensor is not None}


def rebuilt(projections: Projections, tensors: dict[str, Tensor], x: Tensor) -> Projections:
    """The projections with `tensors`, and weights in `x`'s dtype."""
    names = [f"{kind}{i}" for i in range(len(projections)) for kind in ("A", "B", "bias")]
    changed = with_tensors(projections, [tensors.get(name) for name in names])
    return [
        LoraProjection(p.weight.to(x.dtype), p.bias, p.A, p.B, p.scale, p.dropout)  # type: ignore[union-attr]
        for p in changed
    ]


@pytest.fixture
def make(randn: Callable[..., Tensor]) -> Callable[..., LoraProjection]:
    def projection(
        N: int, K: int, r: int, dtype: torch.dtype, bias: bool = False, dropout: float = 0.0
    ) -> LoraProjection:
        return LoraProjection(
            (randn(N, K) / K**0.5).to(dtype),
            randn(N, dtype=dtype) if bias else None,
            (randn(r, K) / K**0.5).to(dtype) if r else None,
            randn(N, r, dtype=dtype) if r else None,
            0.5,
            dropout,
        )

    return projection


SHAPES = [  # tokens, K, ((N, rank, bias), ...)
    (1, 16, ((8, 4, False),)),
    (3, 123, ((17, 5, True), (9, 0, False), (9, 3, True))),
    (40, 32, ((48, 4, False), (16, 8, True), (16, 8, False))),
    (64, 8, ((40, 1, True), (40, 2, False))),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_every_gradient(oracle, randn, make, dtype, shape) -> None:
    T, K, parts = shape
    group = [make(N, K, r, dtype, bias) for N, r, bias in parts]
    inputs = {"x": randn(2, T, K, dtype=dtype), **named(group)}

    def call(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(list(inputs)[1:], tensors, strict=True))
            return function(x, rebuilt(group, given, x))

        return run

    oracle.check(call(lora_linear), call(reference), inputs, list(inputs))


def test_residual_is_added_and_gets_its_gradient(oracle, randn, make, dtype) -> None:
    p = make(24, 16, 4, dtype)
    inputs = {"x": randn(5, 16, dtype=dtype), "residual": randn(5, 24, dtype=dtype), **named([p])}

    def fused(x: Tensor, residual: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return lora_linear(x, rebuilt([p], {"A0": A, "B0": B}, x), residual)[0]

    def stock(x: Tensor, residual: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return residual + reference(x, rebuilt([p], {"A0": A, "B0": B}, x))[0]

    oracle.check(fused, stock, inputs, list(inputs))


@pytest.mark.parametrize("tokens", [2, 60])
@pytest.mark.parametrize("subset", [("x",), ("A0",), ("B1",), ("bias0",), ("x", "A1", "B0")])
def test_only_what_is_needed_gets_a_gradient(oracle, randn, make, subset, tokens) -> None:
    group = [make(12, 8, 4, torch.float32, bias=True), make(12, 8, 2, torch.float32)]
    inputs = {"x": randn(tokens, 8), **named(group)}

    def call(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(list(inputs)[1:], tensors, strict=True))
            return function(x, rebuilt(group, given, x))

        return run

    oracle.check(call(lora_linear), call(reference), inputs, subset)


def test_gradcheck_in_fp64(randn, make) -> None:
    group = [make(3, 4, 2, torch.float64, bias=True), make(2, 4, 1, torch.float64)]
    tensors = [t.requires_grad_() for t in named(group).values()]
    x = randn(2, 3, 4, dtype=torch.float64).requires_grad_()

    def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(named(group), tensors, strict=True))
        return lora_linear(x, rebuilt(group, given, x))

    assert torch.autograd.gradcheck(run, (x, *tensors))


def test_folding_is_used_where_it_moves_fewer_bytes(make) -> None:
    assert folding_pays(8192, 4096, 14336, copies_input=True, copies_weight=True)
    assert not folding_pays(128, 4096, 14336, copies_input=True, copies_weight=True)
    assert folding_pays(128, 4096, 14336, copies_input=False, copies_weight=False)
    assert not folding_pays(8192, 4096, 4096, copies_input=True, copies_weight=False)
    group = Group([make(64, 8, 4, torch.float32)], torch.float32)
    assert group.folds_forward(100, copies_input=True)
    assert not group.folds_forward(4, copies_input=True)


def test_dropout_draws_stocks_masks_and_draws_them_again(randn, make, device) -> None:
    group = [make(16, 8, 4, torch.float64, dropout=0.4), make(8, 8, 2, torch.float64, dropout=0.4)]
    tensors = {name: t.requires_grad_() for name, t in named(group).items()}
    x = randn(2, 30, 8, dtype=torch.float64).requires_grad_()
    leaves = [x, *tensors.values()]

    def run(function: Callable[..., tuple[Tensor, ...]]) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(5)
        outputs = function(x, rebuilt(group, tensors, x))
        after = torch.rand(3)
        loss = sum((y * y).sum() for y in outputs)
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        again = torch.autograd.grad(loss, leaves)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        return [*(y.detach() for y in outputs), after], list(first)

    for ours, stock in zip(run(lora_linear), run(reference), strict=True):
        for a, b in zip(ours, stock, strict=True):
            torch.testing.assert_close(a, b)
    state = torch.get_rng_state()
    torch.autograd.grad(sum(y.sum() for y in lora_linear(x, rebuilt(group, tensors, x))), leaves)
    torch.set_rng_state(state)  # the backward pass itself left the generator alone
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_activation_checkpointing_with_dropout(randn, make, reentrant) -> None:
    group = [make(24, 8, 4, torch.float32, dropout=0.3)]
    tensors = {name: t.requires_grad_() for name, t in named(group).items()}
    x = randn(6, 8).requires_grad_()
    results = []
    for wrapped in (False, True):
        torch.manual_seed(3)

        def run(x: Tensor) -> Tensor:
            return lora_linear(x, rebuilt(group, tensors, x))[0]

        y = checkpoint(run, x, use_reentrant=reentrant) if wrapped else run(x)
        loss = (y * y).sum()
        loss.backward()
        leaves = [x, *tensors.values()]
        results.append([loss.detach(), *(leaf.grad.clone() for leaf in leaves)])
        for leaf in leaves:
            leaf.grad = None
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_saved_tensors_may_be_moved_away(randn, make) -> None:
    group = [make(24, 8, 4, torch.float32)]
    x = randn(40, 8).requires_grad_()
    moved = []

    def pack(t: Tensor) -> Tensor:
        moved.append(t)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.clone()):
        y = lora_linear(x, group)[0]
    expected = torch.autograd.grad(lora_linear(x, group)[0].sum(), x)[0]
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)
    assert moved


def test_autocast_decides_the_dtype_and_the_residual_stream_stays(randn, make, device) -> None:
    p = make(16, 16, 4, torch.float32)
    x, residual = randn(9, 16), randn(9, 16)
    A, B = (t.clone().requires_grad_() for t in named([p]).values())
    with torch.autocast(device.type, torch.bfloat16):
        assert compute_dtype(x) == torch.bfloat16
        projection = LoraProjection(p.weight, None, A, B, p.scale)
        y = lora_linear(x, [projection])[0]
        h = lora_linear(x, [projection], residual)[0]
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32
    h.sum().backward()
    assert A.grad.dtype == B.grad.dtype == torch.float32
    exact = residual + reference(x, [p])[0]
    assert (h - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("tokens", [3, 90])
def test_4bit_weights_of_bitsandbytes(randn, make, device, kind, nested, tokens) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    from lorafuse.patches.weights import from_state

    bnb = pytest.importorskip("bitsandbytes")
    weight = bnb.nn.Params4bit(
        randn(48, 64), requires_grad=False, quant_type=kind, compress_statistics=nested
    )._quantize(device)
    plain = functional.dequantize_4bit(weight.data, weight.quant_state).to(torch.float32)
    p = make(48, 64, 4, torch.float32)
    x = randn(tokens, 64)
    runs = []
    for w in (from_state(weight.data, weight.quant_state), plain):
        leaves = [t.clone().requires_grad_() for t in (x, p.A, p.B)]
        y = lora_linear(leaves[0], [LoraProjection(w, None, leaves[1], leaves[2], 0.5)])[0]
        runs.append([y.detach(), *torch.autograd.grad((y * y).sum(), leaves)])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_shapes_that_do_not_fit_are_named(randn, make) -> None:
    p = make(8, 16, 4, torch.float32)
    with pytest.raises(ValueError, match=r"weight is \[8, 16\] but the input has 12 features"):
        lora_linear(randn(3, 12), [p])
    with pytest.raises(ValueError, match="A and B come together"):
        lora_linear(randn(3, 16), [LoraProjection(p.weight, None, p.A, None)])
    with pytest.raises(ValueError, match="a residual goes with one projection"):
        lora_linear(randn(3, 16), [p, p], randn(3, 16))


@pytest.mark.parametrize("tokens", [3, 96])
def test_gradients_of_any_strides(randn, make, tokens) -> None:
    group = [make(48, 16, 4, torch.float32)]
    x = randn(2, tokens, 16).requires_grad_()
    dense = torch.ones(2, tokens, 48, device=x.device)
    transposed = randn(48, tokens, 2).to(x.device).permute(2, 1, 0)
    for dy, same in ((dense[:1, :1, :1].expand_as(dense), dense), (transposed, transposed.clone())):
        (got,) = torch.autograd.grad(lora_linear(x, group)[0], x, dy)
        (want,) = torch.autograd.grad(reference(x, group)[0], x, same)
        torch.testing.assert_close(got, want)


def test_a_gradient_of_a_gradient_is_refused(randn, make) -> None:
    x = randn(4, 16).requires_grad_()
    loss = lora_linear(x, [make(8, 16, 2, torch.float32)])[0].square().sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
