"""Rows sorted by expert, and the products on them, against plain torch, expert by expert."""

import pytest
import torch

from lorafuse.kernels import grouped_linear as grouped
from lorafuse.kernels.expert_order import (
    ExpertOrder,
    combine,
    gather,
    sort_by_expert,
)
from lorafuse.kernels.grouped_linear import (
    grouped_linear,
    grouped_linear_reference,
    grouped_outer,
    grouped_outer_reference,
)
from lorafuse.kernels.runtime import mm_fp32


def route(device, tokens: int, experts: int, k: int, only: int | None = None) -> torch.Tensor:
    """[T, k] distinct experts a token; the last expert gets none, `only` gets all where given."""
    if only is not None:
        return torch.full((tokens, k), only, device=device)
    scores = torch.rand(tokens, max(experts - 1, k))
    return scores.topk(k, dim=1).indices.to(device)


ROUTES = {  # tokens, experts, k, only
    "some empty": (13, 5, 2, None),
    "one expert": (9, 1, 1, None),
    "all to one": (21, 4, 1, 2),
    "top 1": (40, 3, 1, None),
    "top 4 of 8": (11, 8, 4, None),
    "one token": (1, 6, 2, None),
}


@pytest.fixture(params=list(ROUTES))
def rows(request, device) -> ExpertOrder:
    tokens, experts, k, only = ROUTES[request.param]
    return sort_by_expert(route(device, tokens, experts, k, only), experts)


@pytest.mark.parametrize("name", list(ROUTES))
def test_order_is_stable_and_complete(device, name) -> None:
    tokens, experts, k, only = ROUTES[name]
    index = route(device, tokens, experts, k, only)
    rows = sort_by_expert(index, experts)
    flat = index.flatten()
    expected = sorted(range(tokens * k), key=lambda slot: int(flat[slot]))  # sorted is stable
    assert rows.order.tolist() == expected
    assert rows.order[rows.place.long()].tolist() == list(range(tokens * k))
    counts = torch.bincount(flat, minlength=experts)
    assert rows.ends.tolist() == counts.cumsum(0).tolist()
    assert rows.ends.dtype == rows.order.dtype == rows.place.dtype == torch.int32


def test_slots_of_other_ranks_come_last_and_count_for_nothing(device, randn) -> None:
    index = torch.tensor([[1, 4], [0, 4], [7, 2]], device=device)
    rows = sort_by_expert(index, 4)
    assert rows.ends.tolist() == [1, 2, 3, 3]
    y = randn(6, 5)
    y[3:] = float("nan")  # rows past the last end are undefined
    out = torch.empty(3, 5, device=device)
    combine(y, rows, None, out)
    torch.testing.assert_close(out, y[:3][[1, 0, 2]])


@pytest.mark.parametrize("width", [1, 7, 64])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_gather_and_combine(randn, device, dtype, rows, width, weighted, biased) -> None:
    tokens = rows.rows // rows.k
    x = randn(tokens, width + 3, dtype=dtype)[:, 3:]
    wide = torch.zeros(rows.rows, width + 2, dtype=dtype, device=device)
    gather(x, rows, wide[:, :width])
    assert torch.equal(wide[:, :width], x[rows.order.long() // rows.k])
    assert not wide[:, width:].any()
    weights = randn(tokens, rows.k) if weighted else None
    out = torch.zeros(tokens, width + 2, dtype=dtype, device=device)
    bias = randn(rows.ends.shape[0], width, dtype=dtype) if biased else None
    combine(wide[:, :width], rows, weights, out[:, :width], bias)
    slots = x.double().repeat_interleave(rows.k, 0)
    if bias is not None:
        slots += bias.double()[rows.index]
    if weights is not None:
        slots *= weights.double().view(-1, 1)
    wanted = slots.view(tokens, rows.k, width).sum(1)
    limit = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(out[:, :width].double(), wanted, rtol=limit, atol=limit)
    assert not out[:, width:].any()


def near(ours, stock, exact) -> None:
    """At most twice the error of plain torch at this dtype, and a rounding."""
    error, allowed = (ours.double() - exact).norm(), 2 * (stock.double() - exact).norm()
    eps = torch.finfo(ours.dtype).eps
    assert error <= allowed + eps * exact.norm(), (float(error), float(allowed))


@pytest.mark.parametrize(
    ("by_token", "rank", "N", "K"),
    [
        (True, 0, 24, 33),
        (False, 4, 24, 33),
        (True, 17, 38, 16),
        (False, 1, 1, 40),
        (False, 32, 64, 64),
        (True, 64, 40, 128),
    ],
)
def test_grouped_linear(randn, dtype, rows, by_token, rank, N, K) -> None:
    E, S = rows.ends.shape[0], rows.rows
    x = randn(S // rows.k if by_token else S, K + 3, dtype=dtype)[:, 3:]
    w = randn(E, K, N, dtype=dtype).transpose(1, 2) if N == 38 else randn(E, N, K, dtype=dtype)
    u = randn(S, rank + 2, dtype=dtype)[:, 2:] if rank else None
    v = randn(N, rank, E, dtype=dtype).permute(2, 0, 1) if rank else None  # as PEFT stores B
    given = x[rows.tokens] if by_token else x
    exact = grouped_linear_reference(
        given.double(), w.double(), rows, *(None if t is None else t.double() for t in (u, v))
    )
    stock = grouped_linear_reference(given, w, rows, u, v)
    near(grouped_linear(x, w, rows, u, v, by_token=by_token), stock, exact)
    out = torch.zeros(S, N + 3, dtype=dtype, device=x.device)
    assert grouped_linear(x, w, rows, u, v, by_token=by_token, out=out[:, :N]) is not None
    near(out[:, :N], stock, exact)
    assert not out[:, N:].any()


@pytest.mark.parametrize(("by_token", "rank"), [(True, 1), (False, 4), (True, 19)])
def test_grouped_outer(randn, dtype, rows, by_token, rank) -> None:
    S, K = rows.rows, 37
    p = randn(S, rank + 2, dtype=dtype)[:, 2:]
    q = randn(S // rows.k if by_token else S, K, dtype=dtype)
    ours = grouped_outer(p, q, rows, by_token=by_token)
    assert ours.dtype == torch.float32
    given = q[rows.tokens] if by_token else q
    stock = grouped_outer_reference(p, given, rows)
    near(ours, stock, grouped_outer_reference(p.double(), given.double(), rows))
    again = grouped_outer(p, q, rows, by_token=by_token)
    assert torch.equal(ours, again)


@pytest.mark.parametrize("rank", [4, 16, 32, 64])
@pytest.mark.parametrize("w_by_rows", [True, False])
@pytest.mark.parametrize("v_by_rows", [True, False])
@pytest.mark.parametrize(("N", "K"), [(24, 40), (20, 24)])
def test_factors_that_lie_differently(
    randn, dtype, device, rank, w_by_rows, v_by_rows, N, K
) -> None:
    """As with transposed weights: W by rows and LoRA's A by columns."""
    index = torch.rand(15, 3).topk(2, 1).indices.to(device)
    rows = sort_by_expert(index, 4)

    def factor(k: int, by_rows: bool) -> torch.Tensor:
        made = randn(4, N, k, dtype=dtype) / 4
        return made if by_rows else made.transpose(1, 2).contiguous().transpose(1, 2)

    x, u = randn(30, K, dtype=dtype), randn(30, rank, dtype=dtype)
    w, v = factor(K, w_by_rows), factor(rank, v_by_rows)
    exact = grouped_linear_reference(x.double(), w.double(), rows, u.double(), v.double())
    near(grouped_linear(x, w, rows, u, v), grouped_linear_reference(x, w, rows, u, v), exact)


def test_an_empty_batch(randn, device) -> None:
    rows = sort_by_expert(torch.empty(0, 2, dtype=torch.long, device=device), 3)
    assert grouped_linear(randn(0, 8), randn(3, 5, 8), rows).shape == (0, 5)
    assert not grouped_outer(randn(0, 2), randn(0, 8), rows).any()


def test_sizes_that_do_not_fit_are_named(randn, device) -> None:
    rows = sort_by_expert(route(device, 4, 3, 2), 3)
    with pytest.raises(ValueError, match=r"expected x \[8, K\] and w \[3, N, K\]"):
        grouped_linear(randn(7, 8), randn(3, 5, 8), rows)
    with pytest.raises(ValueError, match="come together"):
        grouped_linear(randn(8, 8), randn(3, 5, 8), rows, randn(8, 2))
    with pytest.raises(ValueError, match=r"expected p \[8, R\]"):
        grouped_outer(randn(6, 2), randn(8, 8), rows)
    with pytest.raises(ValueError, match="integers"):
        sort_by_expert(randn(4, 2), 3)


@pytest.mark.gpu
@pytest.mark.parametrize("base", ["grouped_mm", "triton"])
@pytest.mark.parametrize(("E", "k", "N", "K"), [(8, 2, 2048, 4096), (128, 8, 1536, 2048)])
def test_large(cuda, monkeypatch, base, E, k, N, K) -> None:
    """Both ways to the large product, with LoRA's added."""
    monkeypatch.setattr(grouped, "BASE", base)
    rows = sort_by_expert(torch.rand(4096, E, device=cuda).topk(k, dim=1).indices, E)
    S = rows.rows
    x, w = (torch.randn(*s, device=cuda, dtype=torch.bfloat16) for s in ((4096, K), (E, N, K)))
    u, v = (torch.randn(*s, device=cuda, dtype=torch.bfloat16) for s in ((S, 16), (E, N, 16)))
    given = x[rows.tokens]
    exact = grouped_linear_reference(given.float(), w.float(), rows, u.float(), v.float()).double()
    stock = grouped_linear_reference(given, w, rows, u, v)
    near(grouped_linear(x, w, rows, u, v, by_token=True), stock, exact)
    # torch's own: the tensor cores' sums of 16-bit operands, as stock's gradients are
    spans = list(rows.spans())
    theirs = torch.stack([mm_fp32(u[a:b].t(), given[a:b]) for a, b in spans])
    near(
        grouped_outer(u, x, rows, by_token=True),
        theirs,
        grouped_outer_reference(u.double(), given.double(), rows),
    )
