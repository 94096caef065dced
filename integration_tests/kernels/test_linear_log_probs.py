"""Log-probabilities of a linear head: values, and gradients of losses that weigh each row anew."""

import pytest
import torch

from lorafuse.kernels.cross_entropy_rows import CrossEntropyOptions
from lorafuse.kernels.linear_log_probs import linear_log_probs, reference

OPTIONS = {
    "plain": CrossEntropyOptions(),
    "scaled": CrossEntropyOptions(logit_scale=0.25),
    "capped": CrossEntropyOptions(logit_softcap=2.0),
    "chunks": CrossEntropyOptions(logit_scale=1.5, logit_softcap=3.0, chunk_bytes=2000),
}


def inputs(randn, dtype, V=123, N=23, H=40):
    labels = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    hidden, weight = randn(N, H, dtype=dtype), randn(V, H, dtype=dtype) / H**0.5
    return hidden, weight, labels.to(hidden.device), randn(V, dtype=dtype)


@pytest.mark.parametrize("entropy", [False, True], ids=["log_probs", "entropy too"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_the_gradient_of_weighed_rows(
    oracle, randn, dtype, name, biased, entropy
) -> None:
    hidden, weight, labels, bias = inputs(randn, dtype)
    up = [randn(hidden.shape[0]) for _ in range(2)]

    def run(function, wide):
        x, w, b = (t.double() if wide else t for t in (hidden, weight, bias))
        x = x.detach().requires_grad_()
        log_probs, own, prediction = function(x, w, labels, OPTIONS[name], b if biased else None)
        loss = (log_probs * up[0]).sum() + ((own * up[1]).sum() if entropy else 0.0)
        return log_probs, own, torch.autograd.grad(loss, x)[0], prediction

    ours, stock, exact = (run(*x) for x in ((linear_log_probs, 0), (reference, 0), (reference, 1)))
    for what, *three in zip(("log_probs", "entropy", "gradient"), ours, stock, exact, strict=False):
        oracle.compare(what, *three)
    assert (ours[3] == exact[3]).float().mean() >= (0.9 if dtype != torch.float32 else 1.0)
    assert ours[0].dtype == ours[1].dtype == torch.float32 and ours[2].dtype == dtype


def test_under_autocast_and_without_gradients(randn, device) -> None:
    hidden, weight, labels, _ = inputs(randn, torch.float32)
    exact, _, _ = reference(hidden, weight, labels)
    with torch.autocast(device.type, torch.bfloat16):
        got, _, _ = linear_log_probs(hidden.requires_grad_(), weight, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, exact, rtol=5e-2, atol=5e-2)
    got.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32
    with torch.no_grad():
        assert not linear_log_probs(hidden, weight, labels)[0].requires_grad


def test_no_rows_at_all(randn) -> None:
    hidden, weight, labels, _ = inputs(randn, torch.float32)
    hidden = hidden[:0].requires_grad_()
    log_probs, entropy, prediction = linear_log_probs(hidden, weight, labels[:0])
    assert log_probs.shape == entropy.shape == prediction.shape == (0,)
    log_probs.sum().backward()
    assert hidden.grad.shape == hidden.shape


def test_what_it_cannot_compute_is_named(randn) -> None:
    hidden, weight, labels, _ = inputs(randn, torch.float32)
    with pytest.raises(ValueError, match="the head is trained"):
        linear_log_probs(hidden, weight.requires_grad_(), labels)
    weight = weight.detach()
    with pytest.raises(ValueError, match="label smoothing"):
        linear_log_probs(hidden, weight, labels, CrossEntropyOptions(label_smoothing=0.1))
    with pytest.raises(ValueError, match=r"hidden must be \[N, H\]"):
        linear_log_probs(hidden[:, 1:], weight, labels)
    with pytest.raises(ValueError, match=r"labels must be \[23\] int64"):
        linear_log_probs(hidden, weight, labels[1:])
