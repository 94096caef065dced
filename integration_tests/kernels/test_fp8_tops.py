"""Largest magnitudes of a group's weights and of r-wide columns: exact, in one launch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorafuse.kernels import fp8_tops
from lorafuse.kernels.fp8_tops import group_tops, group_tops_reference
from lorafuse.kernels.nf4 import reference as dequantised

from .conftest import four_bit

Randn = Callable[..., Tensor]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "single"])
@pytest.mark.parametrize(("N", "K"), [(16, 128), (48, 80), (33, 160)])
def test_the_largest_element_comes_from_the_blocks(randn: Randn, quant_type, nested, N, K) -> None:
    w = four_bit(randn(N, K), quant_type, nested)
    tops = group_tops([w], None)
    # Every block holds the code of largest magnitude, for absmax is an element of it.
    torch.testing.assert_close(tops[0], dequantised(w).abs().max(), rtol=1e-6, atol=0)
    torch.testing.assert_close(tops, group_tops_reference([w], None), rtol=1e-6, atol=0)


@pytest.mark.parametrize("R", [None, 0, 5, 24])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_largest_of_several_weights_and_of_columns(randn: Randn, dtype, count, R) -> None:
    """Whichever weight it is in."""
    shapes = [(40, 48), (3, 5000), (16, 16), (7, 9), (1, 1)][:count]
    S = None if R is None else randn(300, R, dtype=dtype) * 3
    for largest in range(count):
        weights = [
            randn(*shape, dtype=dtype) * (5 if i == largest else 1)
            for i, shape in enumerate(shapes)
        ]
        weights[0] = weights[0].t()
        tops = group_tops(weights, S)
        assert tops.dtype == torch.float32 and torch.equal(tops, group_tops_reference(weights, S))
        assert tops[0] == max(weight.abs().max().float() for weight in weights)
        if S is not None:
            assert torch.equal(tops[1:], S.float().abs().amax(0))


KINDS = {
    "nf4": [{}, {}, {}],
    "layouts": [{}, {"blocksize": 128}, {"nested": False}],
    "4 bits and floats": [{}, None, {}, None],
    "one": [{}],
    "two": [{"nested": False}, {"nested": False}],
}


@pytest.mark.parametrize("turned", [False, True], ids=["sB", "A transposed"])
@pytest.mark.parametrize("kinds", KINDS.values(), ids=list(KINDS))
def test_four_bits_in_a_group(randn: Randn, kinds, turned) -> None:
    K = 128
    S = randn(70, 8).bfloat16()
    S = S.t().contiguous().t() if turned else S
    for largest in range(len(kinds)):
        W = [randn(32, K) * (4 if i == largest else 1) for i in range(len(kinds))]
        weights = [w if k is None else four_bit(w, **k) for w, k in zip(W, kinds, strict=True)]
        tops, expected = group_tops(weights, S), group_tops_reference(weights, S)
        torch.testing.assert_close(tops, expected, rtol=1e-6, atol=0)
        assert torch.equal(tops[1:], expected[1:])


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("packed", [True, False])
def test_one_launch_a_group(randn: Randn, monkeypatch, packed) -> None:
    weights = [randn(32, 128) for _ in range(3)]
    name = "_launch_4bit" if packed else "_launch"
    launches, real = [], getattr(fp8_tops, name)
    monkeypatch.setattr(fp8_tops, name, lambda *a: launches.append(a) or real(*a))
    group_tops([four_bit(w) for w in weights] if packed else weights, randn(40, 8))
    assert len(launches) == 1


@pytest.mark.usefixtures("triton_runs")
def test_more_tiles_than_programs(randn: Randn, monkeypatch) -> None:
    """Of floats, each program takes several tiles; of 4 bits, a weight has several."""
    monkeypatch.setattr(fp8_tops, "_TILE", 64)
    monkeypatch.setattr(fp8_tops, "_PROGRAMS", 3)
    for weights in ([randn(9, 123), randn(5, 300)], [four_bit(randn(96, 128)) for _ in range(2)]):
        S = randn(33, 4)
        torch.testing.assert_close(
            group_tops(weights, S), group_tops_reference(weights, S), rtol=1e-6, atol=0
        )


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [(4096, 1024, 1024), (14336, 14336), (4096,)], ids=str)
@pytest.mark.parametrize("packed", [True, False])
def test_large_groups(cuda, rows, packed) -> None:
    W = [torch.randn(n, 4096, device=cuda).bfloat16() for n in rows]
    weights = [four_bit(w) for w in W] if packed else W
    for S in (torch.randn(sum(rows), 96, device=cuda), torch.randn(96, 4096, device=cuda).t()):
        S = S.bfloat16()[:, :90]
        tops, expected = group_tops(weights, S), group_tops_reference(weights, S)
        torch.testing.assert_close(tops, expected, rtol=1e-6, atol=0)
        assert torch.equal(tops[1:], expected[1:])
