"""16-bit training beside stock: fused may be twice as far from fp32 as stock itself is."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 20
# Faster learning makes models with norms behind their blocks chaotic: stock's own curves part by a
# tenth. Slower, and 16-bit adapters round the steps away.
RATE = 5e-4


def in_fp32(model: Any) -> Any:
    """The same model in fp32, 4-bit weights as the floats that they stand for."""
    exact = copy.deepcopy(model)
    for module in list(exact.modules()):
        for key, layer in list(module._modules.items()):
            if type(layer).__name__ == "Linear4bit":
                module._modules[key] = dequantised(layer)
    return exact.float()


def dequantised(layer: Any) -> nn.Linear:
    import bitsandbytes as bnb

    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    plain = nn.Linear(*weight.shape[::-1], bias=layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight.float(), requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.data.float(), requires_grad=False)
    return plain


def no_further_from_fp32_than_stock(
    model: Any,
    fuse: Callable[[Any], Callable[[], None]],
    step: Callable[[Any], dict[str, Tensor]],
    curve: Callable[[Any, int, float], list[tuple[float, float]]],
) -> None:
    """A step's loss and gradients, and the curve of 20 steps.

    Args:
        model: in bf16, with its linear layers in NF4 or not.
        fuse: what fuses a model; it returns a check to be made after the first step.
        step: loss and gradients by name.
        curve: (loss, gradient norm) of each of so many steps at a learning rate.
    """
    exact, ours = in_fp32(model), copy.deepcopy(model)
    truth, stock = step(exact), step(model)
    check = fuse(ours)
    got = step(ours)
    check()
    assert set(got) == set(stock) == set(truth)
    whole = sum(float(g.norm()) ** 2 for n, g in truth.items() if n != "loss") ** 0.5
    for key, expected in truth.items():
        size = float(expected.norm()) if key == "loss" else max(float(expected.norm()), whole / 100)
        error, allowed = (float((x[key].float() - expected).norm()) / size for x in (got, stock))
        assert error <= 2 * allowed + 1e-2, (key, error, allowed)
    curves = [torch.tensor(curve(m, STEPS, RATE)) for m in (exact, model, ours)]
    # Of the steps' errors the median: a norm near zero makes one of them as large as it likes.
    ours_off, stock_off = (
        ((x - curves[0]) / curves[0]).abs().median(0).values.tolist()
        for x in (curves[2], curves[1])
    )
    # norms scatter by some percent in steps of 16 bit, stock's as well
    for what, error, allowed, floor in zip(
        ("loss", "gradient norm"), ours_off, stock_off, (2e-3, 1.5e-2), strict=True
    ):
        assert error <= 2 * allowed + floor, (what, error, allowed)
