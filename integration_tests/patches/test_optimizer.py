"""bitsandbytes' 8-bit optimisers give the same bits with the waits taken out."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

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


@pytest.mark.parametrize("kind", ["AdamW8bit", "Lion8bit"])
def test_same_bits_and_state(device, kind):
    results = []
    for fused in (False, True):
        tensors = parameters(device)
        optimizer = make(kind, tensors)
        if fused:
            hooks = fuse_optimizer(optimizer)
            assert hooks.fused and hooks.reason == ""
        train(optimizer, tensors, skip=(2, 0))
        states = [t for p in tensors for t in optimizer.state[p].values()]
        flat = [t for t in states if isinstance(t, torch.Tensor)]
        results.append([*tensors, *flat])
        if fused:
            assert hooks.calls == 5
    assert len(results[0]) > 8
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[0][0], parameters(device)[0])


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
