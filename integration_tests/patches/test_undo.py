"""Fusing leaves no trace, and undoing it restores the model exactly."""

import random

import pytest
import torch

from lorafuse.patches.apply import BUILTIN_WEIGHT_FORMATS, OPERATIONS, apply
from lorafuse.patches.bind import FusedForward

ALL = dict.fromkeys(OPERATIONS, True)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes: packed weights that are stored as bfloat16 hold NaNs, which equal nothing."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def bound(model) -> list[FusedForward]:
    return [m.__dict__["forward"] for m in model.modules() if "forward" in m.__dict__]


@pytest.mark.parametrize("nf4", [False, True])
def test_unfuse_restores_bit_for_bit(make_peft, step, nf4) -> None:
    model = make_peft("qwen3", nf4=nf4)
    before = step(model)
    attributes = {id(m): set(m.__dict__) for m in model.modules()}
    fused = apply(model, ALL)
    assert bound(model)
    step(model)
    fused.unfuse()
    assert not bound(model)
    # transformers marks a module that it has run; lorafuse adds nothing
    assert all(set(m.__dict__) == attributes[id(m)] for m in model.modules())
    after = step(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("nf4", [False, True])
def test_applying_leaves_no_trace(make_peft, step, nf4) -> None:
    model = make_peft("gemma3", nf4=nf4)
    step(model)
    model.get_base_model().model.layers[0].eval()
    state = {k: raw(v).clone() for k, v in model.state_dict().items()}
    needs = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    pointers = {n: p.data_ptr() for n, p in model.named_parameters()}
    versions = {n: p._version for n, p in model.named_parameters()}
    rng, python_rng = torch.get_rng_state(), random.getstate()
    apply(model, ALL)
    assert torch.equal(torch.get_rng_state(), rng) and random.getstate() == python_rng
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(raw(after[k]), state[k]) for k in state)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == needs
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == pointers
    assert {n: p._version for n, p in model.named_parameters()} == versions
    assert all(p.grad is None for p in model.parameters())


def test_a_copy_and_a_pickle_compute_with_their_own_weights(make_peft, step, twins) -> None:
    model = make_peft("llama")
    make_twins = twins(model)
    stock = step(model)
    apply(model, ALL)
    for replica in make_twins():
        own = {id(m) for m in replica.modules()}
        assert bound(replica) and all(id(f.module) in own for f in bound(replica))
        with torch.no_grad():
            for name, parameter in replica.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        changed = step(replica)
        assert float(changed["loss"]) != float(stock["loss"])
        unchanged = step(model)
        assert abs(float(unchanged["loss"]) - float(stock["loss"])) < 1e-5


def test_a_foreign_forward_on_top_is_not_torn_off(make_peft) -> None:
    model = make_peft("llama")
    fused = apply(model, ALL)
    layer = model.get_base_model().model.layers[0]
    ours = layer.forward

    def wrapped(*args, **kwargs):
        return ours(*args, **kwargs)

    layer.forward = wrapped
    with pytest.raises(RuntimeError, match="undo that replacement first"):
        fused.unfuse()
    assert layer.forward is wrapped and bound(model)
    layer.forward = ours
    fused.unfuse()
    assert not bound(model)
    fused.unfuse()  # a second time does nothing


def test_an_error_while_fusing_leaves_the_model_stock(make_peft, step) -> None:
    model = make_peft("llama")
    stock = step(model)

    last = model.get_base_model().model.layers[1].mlp.down_proj.base_layer

    def broken(layer):
        if layer is last:  # by now the first layer is bound
            assert bound(model)
            raise ZeroDivisionError("a third party's weight format")
        return None

    with pytest.raises(ZeroDivisionError):
        apply(model, ALL, weight_formats=(broken, *BUILTIN_WEIGHT_FORMATS))
    assert not bound(model)
    assert all(torch.equal(v, stock[k]) for k, v in step(model).items())
