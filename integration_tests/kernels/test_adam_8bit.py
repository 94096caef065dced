"""8-bit AdamW over many tensors: the definition's numbers, and bitsandbytes' own."""

import copy

import pytest
import torch

from lorafuse.kernels import adam_8bit
from lorafuse.kernels.adam_8bit import AdamOptions, AdamTensor, adam_8bit_, reference_, serves

OPTIONS = AdamOptions(lr=1e-2, beta1=0.9, beta2=0.995, eps=1e-6, weight_decay=0.1, step=3)
SIZES = [(1,), (256,), (7, 300), (4096,), (33, 129)]


@pytest.fixture(scope="module")
def maps(device):
    functional = pytest.importorskip("bitsandbytes.functional")
    signed = functional.create_dynamic_map(signed=True)
    return signed.to(device), functional.create_dynamic_map(signed=False).to(device)


def make(randn, maps, shape, dtype):
    """A tensor in the middle of its training, with random states."""
    p, g = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
    blocks = -(-p.numel() // adam_8bit.BLOCK)
    c1, c2 = (torch.randint(0, 256, shape, device=p.device).to(torch.uint8) for _ in range(2))
    a1, a2 = randn(blocks).abs() + 0.1, randn(blocks).abs() + 0.1
    return AdamTensor(p, g, c1, c2, a1, a2, *maps)


def close(ours, exact, dtype):
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(ours.p, exact.p, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.a1, exact.a1)
    torch.testing.assert_close(ours.a2, exact.a2)
    for q, mine, theirs in zip(ours[6:], ours[2:4], exact[2:4], strict=True):
        # a value in the middle of two codes may go either way
        assert (mine.int() - theirs.int()).abs().max() <= 1
        assert (mine != theirs).float().mean() <= 2e-3
        assert (q[mine.int()] * q[theirs.int()] >= 0).all()


def test_many_tensors_in_one_launch(randn, maps, dtype):
    ours = [make(randn, maps, shape, dtype) for shape in SIZES]
    exact = copy.deepcopy(ours)
    adam_8bit_(ours, OPTIONS)
    for mine, theirs in zip(ours, exact, strict=True):
        reference_(theirs, OPTIONS)
        close(mine, theirs, dtype)
        assert torch.equal(mine.g, theirs.g)


def test_gradients_that_are_not_finite_and_all_zero_states(randn, maps):
    ours = make(randn, maps, (600,), torch.float32)
    ours.g[3], ours.g[300], ours.g[301] = float("nan"), float("inf"), -float("inf")
    ours.g[512:] = 0
    ours.a1[2], ours.a2[2] = 0, 0  # the last block has never seen a gradient
    before, exact = ours.p.clone(), copy.deepcopy(ours)
    adam_8bit_([ours], OPTIONS)
    reference_(exact, OPTIONS)
    close(ours, exact, torch.float32)
    assert torch.equal(ours.p[[3, 300, 301]], before[[3, 300, 301]])
    assert ours.p.isfinite().all() and ours.a1.isfinite().all() and ours.a1[2] == 0
    assert (maps[0][ours.c1[[3, 300]].int()] == 0).all()


def test_steps_are_bitsandbytes_own(randn, device):
    """Ten steps of AdamW8bit, and the same by hand from its own states."""
    bnb = pytest.importorskip("bitsandbytes")
    weights = [randn(8192), randn(70, 100)]
    stock = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = bnb.optim.AdamW8bit(stock, lr=1e-2, betas=(0.9, 0.995), weight_decay=0.01)
    # Its CPU code gives small second moments a code that is not the nearest.
    limit = 2e-3 if device.type == "cuda" else 2e-2
    ours = None
    for t in range(1, 11):
        gradients = [randn(*w.shape) for w in weights]
        for p, g in zip(stock, gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
        states = [optimizer.state[p] for p in stock]
        q1, q2 = states[0]["qmap1"], states[0]["qmap2"]
        if ours is None:
            ours = []
            for w, g, s in zip(weights, gradients, states, strict=True):
                # zero moments, with whatever code
                zeros = (s["state1"] * 0, s["state2"] * 0, s["absmax1"] * 0, s["absmax2"] * 0)
                ours.append(AdamTensor(w.clone(), g, *zeros, q1, q2))
        else:
            ours = [o._replace(g=g) for o, g in zip(ours, gradients, strict=True)]
        adam_8bit_(ours, AdamOptions(1e-2, 0.9, 0.995, 1e-8, 0.01, t))
        for w, o, p, s in zip(weights, ours, stock, states, strict=True):
            assert (o.p - p.detach()).norm() <= limit * (p.detach() - w).norm(), t
            torch.testing.assert_close(o.a1, s["absmax1"], rtol=3 * limit, atol=1e-6)
            torch.testing.assert_close(o.a2, s["absmax2"], rtol=3 * limit, atol=1e-6)


def test_a_map_of_another_length_is_refused(randn, maps):
    one = make(randn, maps, (300,), torch.float32)
    with pytest.raises(ValueError, match=r"\[256\] fp32"):
        adam_8bit_([one._replace(q1=maps[0][:16].contiguous())], OPTIONS)


def test_maps_at_another_place_for_each_tensor(randn, maps):
    """As states from a file have them; of other values, too."""
    ours = [make(randn, [m * (i + 1) for m in maps], (600,), torch.float32) for i in range(3)]
    exact = copy.deepcopy(ours)
    adam_8bit_(ours, OPTIONS)
    for mine, theirs in zip(ours, exact, strict=True):
        reference_(theirs, OPTIONS)
        close(mine, theirs, torch.float32)


@pytest.mark.usefixtures("triton_runs")
def test_what_the_kernel_does_not_serve(randn, maps):
    one = make(randn, maps, (8, 300), torch.float32)
    assert serves(one)
    turned = torch.empty(300, 8, device=one.p.device).t()
    off = torch.empty(2401, device=one.p.device)[1:].view(8, 300)
    for change in (
        {"g": one.g.half()},
        {"g": turned},
        {"p": turned},
        {"g": off},
        {"p": one.p.double(), "g": one.g.double()},
        {"c2": one.c2.int()},
        {"a1": one.a1.half()},
        {"q2": one.q2[:16].contiguous()},
        {"q1": one.q1.double()},
    ):
        assert not serves(one._replace(**change)), change


@pytest.mark.gpu
def test_as_many_as_an_8b_model_has(cuda, randn, maps):
    """448 tensors with offsets past a launch's first rows; nothing beside them is written."""
    shapes = [(32, 4096), (4096, 32), (1024, 32), (14336, 32)]
    ours = [make(randn, maps, shapes[i % 4], torch.float32) for i in range(64)]
    exact = copy.deepcopy(ours)
    adam_8bit_(ours, OPTIONS)
    for mine, theirs in zip(ours, exact, strict=True):
        reference_(theirs, OPTIONS)
        close(mine, theirs, torch.float32)
