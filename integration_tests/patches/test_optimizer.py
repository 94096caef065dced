"""bitsandbytes' 8-bit optimisers train the same with the waits taken out."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from lorafuse.patches import optimizer as module
from lorafuse.patches.optimizer import UnwaitingStep, fuse_optimizer


def parameters(device):
    torch.manual_seed(0)
    shapes = [(64, 128), (4096, 2), (7,), (32, 200)]
    return [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]


def train(optimizer, tensors, steps=5, skip=None):
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for i, p in enumerate(tensors):
            gradient = torch.randn(p.shape, generator=generator).to(p.device)
            p.grad = None if (step, i) == skip else gradient
        kept = [p.grad for p in tensors]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(tensors, kept, strict=True))
        optimizer.zero_grad()


def make(kind, tensors):
    return getattr(bnb.optim, kind)(tensors, lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("kind", ["AdamW8bit", "Adam8bit", "Lion8bit"])
def test_same_parameters_and_state(device, kind, monkeypatch):
    launches = []
    real = module.adam_8bit_
    monkeypatch.setattr(module, "adam_8bit_", lambda *a: launches.append(len(a[0])) or real(*a))
    results = []
    for fused in (False, True):
        tensors = parameters(device)
        optimizer = make(kind, tensors)
        if fused:
            hooks = fuse_optimizer(optimizer)
            assert hooks.fused and hooks.reason == ""
        train(optimizer, tensors, skip=(2, 0))
        states = [(k, v) for p in tensors for k, v in optimizer.state[p].items()]
        assert [v for k, v in states if k == "step"] == [4, 5, 5, 5]
        results.append((tensors, [v for _, v in states if isinstance(v, torch.Tensor)]))
        if fused:
            assert hooks.calls == 5
    (stock, stock_states), (ours, our_states) = results
    start = parameters(device)
    if device.type == "cuda" and "Adam" in kind:
        # (64, 128), (4096, 2) and (32, 200) in one launch a step; one of them had no gradient once
        # and is a step behind from then on. (7,) is too small for 8 bits.
        assert launches == [3, 3, 2, 1, 2, 1, 2]
        for a, b, w in zip(stock, ours, start, strict=True):
            assert (a - b).norm() <= 2e-3 * (a - w).norm()
        for a, b in zip(stock_states, our_states, strict=True):
            off = (a.float() - b.float()).abs()
            assert (off > 1e-2 * a.float().abs().max()).float().mean() < 1e-2
    else:  # the very methods of bitsandbytes
        assert not launches and len(stock_states) > 8
        assert all(torch.equal(a, b) for a, b in zip(stock, ours, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(stock_states, our_states, strict=True))
    assert not torch.equal(ours[0], start[0])


def test_undo_and_a_closure_go_the_stock_way(device):
    tensors = parameters(device)
    optimizer = make("AdamW8bit", tensors)
    hooks = fuse_optimizer(optimizer)
    assert fuse_optimizer(optimizer) is None, "the hooks are there already"
    for p in tensors:
        p.grad = torch.ones_like(p)
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0
    assert hooks.calls == 0 and sum(hooks.stock_calls.values()) == 1
    hooks.undo()
    before = tensors[0].clone()
    optimizer.step()
    assert hooks.calls == 0 and not torch.equal(before, tensors[0])
    assert isinstance(fuse_optimizer(optimizer), UnwaitingStep)


def test_no_wait_is_left(device, monkeypatch):
    waits = []
    monkeypatch.setattr(bnb.optim.optimizer, "sync_gpu", waits.append)
    tensors = parameters(device)
    optimizer = make("AdamW8bit", tensors)
    train(optimizer, tensors, steps=1)
    assert len(waits) == len(tensors)
    fuse_optimizer(optimizer)
    train(optimizer, tensors, steps=1)
    assert len(waits) == len(tensors)


def test_schedulers_see_the_step(device, recwarn):
    tensors = parameters(device)
    optimizer = make("AdamW8bit", tensors)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    fuse_optimizer(optimizer)
    train(optimizer, tensors, steps=1)
    scheduler.step()
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


def test_what_is_left_alone(device):
    tensors = parameters(device)
    assert fuse_optimizer(torch.optim.AdamW(tensors)) is None
    assert fuse_optimizer(None) is None

    class Own(bnb.optim.AdamW8bit):
        def step(self, closure=None):
            return super().step(closure)

    hooks = fuse_optimizer(Own(tensors))
    assert not hooks.fused and "step of its own" in hooks.reason
