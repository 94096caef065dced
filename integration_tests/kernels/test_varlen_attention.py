"""Attention within documents, against a dense mask in fp64."""

import pytest
import torch
import torch.nn.functional as F

from lorafuse.kernels import varlen_attention as module
from lorafuse.kernels.varlen_attention import Documents, varlen_attention

STARTS = [(0,), (0, 1), (0, 5, 6, 40), (0, 64)]


def dense(q, k, v, documents, scale):
    """The same through one mask over all tokens."""
    T, repeats = q.shape[0], q.shape[1] // k.shape[1]
    place = torch.arange(T, device=q.device)
    document = torch.bucketize(place, torch.tensor(documents.starts, device=q.device), right=True)
    mask = (document[:, None] == document) & (place[:, None] >= place)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("starts", STARTS, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=["equal heads", "shared keys"])
def test_against_fp64(randn, oracle, device, dtype, starts, heads):
    T, D = 80, 16
    documents = Documents(starts, T, device)
    # q, k and v as `lora_qkv` hands them out: views of one buffer
    Hq, Hk = heads
    scale = 0.3

    def run(function):
        def of_buffer(buffer):
            q, k, v = buffer.split([Hq, Hk, Hk], 1)
            return function(q, k, v, documents, scale)

        return of_buffer

    inputs = {"qkv": randn(T, Hq + 2 * Hk, D, dtype=dtype)}
    oracle.check(run(varlen_attention), run(dense), inputs, grads=["qkv"])


def test_lengths_and_bounds():
    documents = Documents((0, 5, 6, 40), 80, torch.device("cpu"))
    assert documents.bounds == (0, 5, 6, 40, 80) and documents.longest == 40
    assert documents.cu_seqlens.dtype == torch.int32
    assert documents.cu_seqlens.tolist() == [0, 5, 6, 40, 80]


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [((7, 4, 8), (7, 4, 8), "8 tokens"), ((8, 4, 8), (8, 3, 8), "a divisor of 4 heads")],
)
def test_shapes_that_do_not_fit(device, q, k, message):
    q, k = torch.zeros(q, device=device), torch.zeros(k, device=device)
    with pytest.raises(ValueError, match=message):
        varlen_attention(q, k, k, Documents((0,), 8, device), 1.0)


@pytest.mark.gpu
def test_many_documents_of_a_real_layer(cuda):
    """torch's varlen kernels, against torch's dense ones, forward and backward."""
    T, Hq, Hk, D = 8192, 32, 8, 128
    starts = tuple(sorted({0, *torch.randint(1, T, (37,)).tolist()}))
    documents = Documents(starts, T, cuda)
    qkv = torch.randn(T, Hq + 2 * Hk, D, device=cuda, dtype=torch.bfloat16)
    assert module._torch_varlen() is not None and module.serves(qkv)
    place = torch.arange(T, device=cuda)
    document = torch.bucketize(place, torch.tensor(starts, device=cuda), right=True)
    mask = (document[:, None] == document) & (place[:, None] >= place)
    results = []
    for dtype, function in ((torch.bfloat16, None), (torch.bfloat16, "dense"), (None, "fp32")):
        x = qkv.detach().to(dtype or torch.float32).requires_grad_()
        q, k, v = x.split([Hq, Hk, Hk], 1)
        if function is None:
            o = varlen_attention(q, k, v, documents, D**-0.5)
        else:
            q, k, v = (y.transpose(0, 1)[None] for y in (q, k, v))
            k, v = (y.repeat_interleave(Hq // Hk, 1) for y in (k, v))
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)
        torch.manual_seed(1)
        (dx,) = torch.autograd.grad(o, x, torch.randn(o.shape, device=cuda).to(o.dtype))
        results.append((o.detach().float(), dx.float()))
    ours, stock, exact = results
    for mine, theirs, truth in zip(ours, stock, exact, strict=True):
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm()
