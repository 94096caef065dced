"""Gradients that leave room for G: who takes it, who must not, and that numbers stay right."""

import gc
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorafuse.kernels import gradient_room, lora_linear, lora_mlp, lora_o, lora_qkv
from lorafuse.kernels.gradient_room import ask_for_room, give_room, take_room, wide_gradient
from lorafuse.kernels.lora_linear import LoraProjection, NormPrologue
from lorafuse.kernels.rms_norm import reference as norm_reference
from lorafuse.kernels.rms_norm import rms_norm

HEADS = lora_qkv.Heads(query=3, key_value=3, size=8)
K, INNER, RANK = 24, 40, 4
# More tokens than features, or a fold doesn't pay where weights have to be copied.
B, S = 2, 30
FUSED = SimpleNamespace(qkv=lora_qkv.lora_qkv, o=lora_o.lora_o, mlp=lora_mlp.lora_mlp)


def _stock_qkv(h: Tensor, *args: Any, pass_through: bool) -> tuple[Tensor, ...]:
    return *lora_qkv.reference(h, *args), h


STOCK = SimpleNamespace(qkv=_stock_qkv, o=lora_o.reference, mlp=lora_mlp.reference)


class Layers:
    """Two decoder layers with an attention that is no more than a product."""

    def __init__(self, randn: Callable[..., Tensor], dtype: torch.dtype) -> None:
        shapes = {"q": (K, K), "k": (K, K), "v": (K, K), "o": (K, K)}
        shapes |= {"gate": (INNER, K), "up": (INNER, K), "down": (K, INNER)}
        self.weights, self.tensors = {}, {}
        for layer in range(2):
            for name, (n, k) in shapes.items():
                key = f"{layer}.{name}"
                self.weights[key] = (randn(n, k) / k**0.5).to(dtype)
                self.tensors[f"{key}.A"] = (randn(RANK, k) / k**0.5).to(dtype)
                self.tensors[f"{key}.B"] = (randn(n, RANK) / 4).to(dtype)
        self.norm = (1 + randn(K) / 4).to(dtype)

    def call(
        self,
        kernels: SimpleNamespace,
        between: Callable[[Tensor], Tensor] = lambda h: h,
        wrap: Callable[..., Tensor] = lambda function, *args: function(*args),
    ) -> Callable[..., Tensor]:
        """The function of (h, *tensors); `between` is applied to each block's output."""

        def run(h: Tensor, *tensors: Tensor) -> Tensor:
            given = dict(zip(self.tensors, tensors, strict=True))
            norm = NormPrologue(self.norm.to(h.dtype), 1e-5)

            def projection(key: str) -> LoraProjection:
                A, B = given[f"{key}.A"], given[f"{key}.B"]
                return LoraProjection(self.weights[key].to(h.dtype), None, A, B, 0.5)

            def layer(h: Tensor, i: int) -> Tensor:
                qkv = [projection(f"{i}.{name}") for name in "qkv"]
                q, k, v, around = kernels.qkv(h, qkv, HEADS, norm, None, pass_through=True)
                attended = (q * k.sigmoid() + v).flatten(2)
                h2 = between(kernels.o(attended, projection(f"{i}.o"), around))
                gate_up = [projection(f"{i}.{name}") for name in ("gate", "up")]
                return between(
                    kernels.mlp(h2, gate_up, projection(f"{i}.down"), "silu", norm, True)
                )

            return wrap(layer, wrap(layer, h, 0), 1)

        return run

    def inputs(self, randn: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        return {"h": randn(B, S, K, dtype=dtype), **self.tensors}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """(who, shape of the buffer) of each room that was taken."""
    found: list[tuple[str, tuple[int, ...]]] = []

    def record(ctx: Any, dy: Tensor) -> Tensor | None:
        wide = take_room(ctx, dy)
        if wide is not None:
            found.append((type(ctx).__name__.removesuffix("FunctionBackward"), tuple(wide.shape)))
        return wide

    monkeypatch.setattr(lora_linear, "take_room", record)
    monkeypatch.setattr(lora_mlp, "take_room", record)
    yield found


# Of two layers: o of both, and the first one's down; what the last one gets is the caller's.
ALL = ["LoraLinear", "LoraMlp", "LoraLinear"]


def test_gradients_arrive_with_room_and_are_right(oracle, randn, dtype, taken) -> None:
    layers = Layers(randn, dtype)
    inputs = layers.inputs(randn, dtype)
    oracle.check(layers.call(FUSED), layers.call(STOCK), inputs, list(inputs))
    assert [who for who, _ in taken] == ALL
    room = lora_linear.fold_alignment(inputs["h"].device)
    assert {shape for _, shape in taken} == {(B * S, K + room)}


def test_frozen_input_and_adapters_of_some(oracle, randn, taken) -> None:
    layers = Layers(randn, torch.float32)
    inputs = layers.inputs(randn, torch.float32)
    wanted = [name for name in inputs if name.startswith(("0.v", "0.gate", "1.down", "1.q"))]
    oracle.check(layers.call(FUSED), layers.call(STOCK), inputs, wanted)
    assert [who for who, _ in taken] == ALL


@pytest.mark.parametrize("shape", [(B, S), (B * S,), (2, B, S // 2)], ids=str)
def test_a_norm_behind_the_block(oracle, randn, dtype, taken, shape) -> None:
    weight, down = 1 + randn(K) / 4, (randn(K, INNER) / 8).to(dtype)
    inputs = {
        "x": randn(*shape, INNER, dtype=dtype),
        "A": (randn(RANK, INNER) / 8).to(dtype),
        "B": randn(K, RANK, dtype=dtype),
    }

    def call(linear: Callable[..., Tensor], norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
            y = linear(x, LoraProjection(down.to(x.dtype), None, A, B, 0.5))
            return norm(y, weight.to(x.dtype), 1e-5)

        return run

    calls = call(lora_o.lora_o, rms_norm), call(lora_o.reference, norm_reference)
    oracle.check(*calls, inputs, list(inputs))
    assert [who for who, _ in taken] == ["LoraLinear"]


def gradients(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    function(*leaves).square().sum().backward()
    return [x.grad for x in leaves]  # type: ignore[misc]


def _hooked(function: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor]:
    def between(h: Tensor) -> Tensor:
        h.register_hook(function)
        return h

    return between


def _through_cat(h: Tensor) -> Tensor:
    """h's gradient is a sum; that of each half is a narrow view of one wide buffer."""
    left, right = torch.cat((h, 2 * h), -1).split(K, -1)
    return left + 0.5 * right


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (_hooked(lambda dh: None), ALL),
        (_hooked(lambda dh: dh.clone()), []),
        (_hooked(lambda dh: dh * 1), []),
        (lambda h: h + h.sin() * 0.5, []),
        (lambda h: h.view_as(h), []),
        (_through_cat, []),
        (lambda h: h.transpose(0, 1).contiguous().transpose(0, 1), []),
    ],
    ids=["looked at", "cloned", "replaced", "summed", "viewed", "cat", "transposed"],
)
def test_what_comes_in_between(randn, taken, between, expected) -> None:
    layers = Layers(randn, torch.float64)
    inputs = layers.inputs(randn, torch.float64)
    ours = gradients(layers.call(FUSED, between), inputs)
    assert [who for who, _ in taken] == expected
    torch.testing.assert_close(ours, gradients(layers.call(STOCK, between), inputs))


def test_a_second_reader_of_the_hidden_states(randn, taken) -> None:
    """Autograd adds what comes back both ways: a new tensor."""
    layers = Layers(randn, torch.float64)
    inputs = layers.inputs(randn, torch.float64)
    results = []
    for kernels in (FUSED, STOCK):
        seen: list[Tensor] = []

        def keep(h: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(h)
            return h

        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        y = layers.call(kernels, keep)(*leaves)
        for h in seen:
            h.retain_grad()
        (y.square().sum() + sum((h**3).sum() for h in seen)).backward()
        results.append([x.grad for x in leaves] + [h.grad for h in seen])
    torch.testing.assert_close(*results)
    assert not taken


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(randn, taken, reentrant) -> None:
    layers = Layers(randn, torch.float64)
    inputs = layers.inputs(randn, torch.float64)

    def wrap(function: Callable[..., Tensor], *args: Any) -> Tensor:
        return checkpoint(function, *args, use_reentrant=reentrant)

    ours = gradients(layers.call(FUSED, wrap=wrap), inputs)
    # A reentrant checkpoint reads its input's gradient off a leaf, which gets a contiguous one.
    assert [who for who, _ in taken] == (["LoraLinear"] * 2 if reentrant else ALL)
    torch.testing.assert_close(ours, gradients(layers.call(STOCK), inputs))


def test_a_graph_may_be_walked_twice(randn, taken) -> None:
    layers = Layers(randn, torch.float64)
    leaves = [x.requires_grad_() for x in layers.inputs(randn, torch.float64).values()]
    loss = layers.call(FUSED)(*leaves).square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [x.clone() for x in first]
    again = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    torch.testing.assert_close(list(first), kept, rtol=0, atol=0)
    assert [who for who, _ in taken] == ALL * 2


def test_a_gradient_that_someone_keeps_is_not_written_to(randn, taken) -> None:
    layers = Layers(randn, torch.float64)
    kept: list[tuple[Tensor, Tensor]] = []
    keep = _hooked(lambda dh: kept.append((dh, dh.clone())))
    gradients(layers.call(FUSED, keep), layers.inputs(randn, torch.float64))
    assert [who for who, _ in taken] == ALL
    for dh, copy in kept:
        assert torch.equal(dh, copy)


def test_the_step_leaves_no_buffer_behind(randn, monkeypatch) -> None:
    made: list[weakref.ref[Tensor]] = []

    def record(x: Tensor, room: int) -> Tensor | None:
        wide = wide_gradient(x, room)
        if wide is not None:
            made.append(weakref.ref(wide))
        return wide

    monkeypatch.setattr(lora_qkv, "wide_gradient", record)
    monkeypatch.setattr(lora_mlp, "wide_gradient", record)
    layers = Layers(randn, torch.float32)
    inputs = layers.inputs(randn, torch.float32)
    gc.disable()  # nothing may wait for the collector of cycles
    try:
        result = gradients(layers.call(FUSED), inputs)
        assert len(made) == 3 and all(reference() is None for reference in made)
    finally:
        gc.enable()
    assert all(x.is_contiguous() for x in result)


def test_an_fp32_residual_stream_under_autocast_asks_for_none(randn, device, taken) -> None:
    layers = Layers(randn, torch.float32)
    inputs = layers.inputs(randn, torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        ours = gradients(layers.call(FUSED), inputs)
    assert not taken
    for x, exact in zip(ours, gradients(layers.call(STOCK), inputs), strict=True):
        assert (x - exact).norm() / exact.norm() < 0.1


def test_only_the_very_gradient_is_recognised(randn) -> None:
    ctx, dx = SimpleNamespace(), randn(B, S, K)

    def give(room: int = 8) -> tuple[Tensor, Tensor]:
        wide = wide_gradient(dx.flatten(0, 1), room)
        assert wide is not None
        return give_room(wide[:, :K].view(B, S, K), wide), wide

    dy, wide = give()
    assert take_room(ctx, dy) is None, "taken by one who has not asked"
    ask_for_room(ctx, 8)
    found = take_room(ctx, dy)
    assert found is not None and found.data_ptr() == wide.data_ptr() and found.shape == wide.shape
    assert take_room(ctx, dy) is None, "taken twice"

    dy, wide = give()
    assert take_room(ctx, wide[:, :K].view(B, S, K)) is None, "told by its layout"
    dy.data = dx.clone()
    assert take_room(ctx, dy) is None, "other memory"
    dy, _ = give(room=7)
    assert take_room(ctx, dy) is None, "less than was asked for"
    dy, _ = give(room=16)
    assert take_room(ctx, dy).shape == (B * S, K + 8)  # type: ignore[union-attr]
    assert gradient_room.room_asked_by_the_maker(dx) == 0
    assert wide_gradient(dx.flatten(0, 1), 0) is None
