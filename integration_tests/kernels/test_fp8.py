"""FP8 codes: of rows, of weights and their transposes, and of r-wide columns in two parts."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorafuse.kernels import fp8_weight, runtime
from lorafuse.kernels.fp8 import (
    E4M3,
    MAX,
    Fold,
    balance,
    fold_width,
    quantise_rows,
    quantise_rows_reference,
    weight_scale,
)
from lorafuse.kernels.fp8_tops import group_tops
from lorafuse.kernels.fp8_weight import (
    codes,
    codes_reference,
    codes_transposed,
    fold,
    fold_reference,
)
from lorafuse.kernels.nf4 import Quantised4bit
from lorafuse.kernels.nf4 import reference as dequantised

from .conftest import four_bit

Randn = Callable[..., Tensor]


def empty_codes(rows: int, columns: int, device: torch.device) -> Tensor:
    """Codes that no kernel writes: NaN."""
    return torch.full((rows, columns), 0x7F, dtype=torch.uint8, device=device).view(E4M3)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal as numbers, none of them NaN: the two zeros are one."""
    return torch.equal(a.float(), b.float())


def quantised(x: Tensor, fold: Fold | None = None, extra: int = 0) -> tuple[Tensor, Tensor]:
    rank = 0 if fold is None else fold.rank
    out = empty_codes(x.shape[0], x.shape[1] + 3 * rank + extra, x.device)
    scale = torch.empty(x.shape[0], 1, device=x.device)
    quantise_rows(x, out, scale, fold)
    return out, scale


@pytest.mark.parametrize("shape", [(1, 16), (5, 123), (3, 512), (2, 4096)], ids=str)
def test_codes_of_rows_are_torchs_own(randn: Randn, dtype, shape) -> None:
    x = (
        randn(*shape, dtype=dtype)
        * torch.logspace(-3, 3, shape[0], device=randn(1).device)[:, None]
    )
    x = x.to(dtype)
    out, scale = quantised(x, extra=5)
    expected = x.float().abs().amax(1, keepdim=True) / MAX
    torch.testing.assert_close(scale, expected, rtol=1e-6, atol=0)
    assert same(out[:, : shape[1]], (x.float() * (1 / scale)).clamp(-MAX, MAX).to(E4M3))
    assert not out[:, shape[1] :].float().any()
    largest = out.float().abs().amax(1)
    assert (largest == MAX).all()


def test_rows_longer_than_registers_hold_are_read_twice(randn: Randn, monkeypatch) -> None:
    x = randn(3, 300)
    expected = quantised(x)
    monkeypatch.setattr("lorafuse.kernels.fp8._WHOLE_ROW", 100)
    monkeypatch.setattr("lorafuse.kernels.fp8._CHUNK", 128)
    for ours, same_as in zip(quantised(x), expected, strict=True):
        assert same(ours, same_as)


def test_zeros_tiny_rows_and_rows_that_are_not_finite(randn: Randn) -> None:
    x = randn(5, 48)
    x[0] = 0
    x[1] *= 1e-25
    x[2, 7] = float("nan")
    x[3, 9] = float("inf")
    out, scale = quantised(x)
    assert not out[0].float().any() and scale.isfinite()[:2].all()
    torch.testing.assert_close(out[1].float() * scale[1], x[1], rtol=0.07, atol=1e-27)
    # Triton's interpreter has no NaN in e4m3; a GPU has.
    for row in (3,) if runtime.interpreting() else (2, 3):
        assert (out[row].float() * scale[row]).isnan().any()
    assert (out[4].float() * scale[4]).isfinite().all()


def test_any_row_stride(randn: Randn) -> None:
    wide = randn(6, 200, dtype=torch.bfloat16)
    target = empty_codes(6, 300, wide.device)
    scale = torch.empty(6, 1, device=wide.device)
    quantise_rows(wide[:, 8:136], target[:, 16:144], scale)
    expected, expected_scale = quantised(wide[:, 8:136].contiguous())
    assert same(target[:, 16:144], expected) and torch.equal(scale, expected_scale)
    assert target[:, :16].float().isnan().all() and target[:, 144:].float().isnan().all()


def test_what_does_not_fit_is_refused(randn: Randn) -> None:
    x = randn(4, 32)
    scale = torch.empty(4, 1, device=x.device)
    for out, at in ((empty_codes(4, 31, x.device), scale), (x.clone(), scale)):
        with pytest.raises(ValueError, match="columns beside it; got out"):
            quantise_rows(x, out, at)
    with pytest.raises(ValueError, match="scale"):
        quantise_rows(x, empty_codes(4, 32, x.device), scale[:2])
    with pytest.raises(ValueError, match="contiguous rows"):
        quantise_rows(x.t(), empty_codes(32, 4, x.device), torch.empty(32, 1, device=x.device))


@pytest.mark.parametrize(("K", "R"), [(64, 8), (123, 5), (48, 16)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_columns_beside_the_rows_keep_eight_bits(randn: Randn, dtype, K, R, size) -> None:
    x, U = randn(7, K, dtype=dtype), (randn(7, R + 2) * min(size, 1e3)).to(dtype)
    tops = torch.rand(1 + R, device=x.device) + 0.5
    given = Fold(U, tops, R, 3)
    out, scale = quantised(x, given, extra=3)
    c = balance(tops[1:], weight_scale(tops), 3)
    hi, lo, again = (out[:, K + i * R : K + (i + 1) * R].float() for i in range(3))
    assert same(hi, again) and not out[:, K + 3 * R :].float().any()
    scaled = U[:, :R].float() * c / scale
    assert scaled.abs().max() <= MAX * 1.001
    # Half a unit of the low part, or of the smallest code.
    torch.testing.assert_close(hi + lo, scaled, rtol=2**-8, atol=2**-10)
    both = torch.cat((x.float(), U[:, :R].float() * c), 1)
    torch.testing.assert_close(scale, both.abs().amax(1, keepdim=True) / MAX, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize(("K", "R", "extra"), [(64, 0, 0), (80, 4, 36), (123, 3, 1), (16, 40, 8)])
def test_triton_rows_equal_the_reference(randn: Randn, dtype, K, R, extra) -> None:
    x = (randn(9, K) * torch.logspace(-2, 2, 9, device=randn(1).device)[:, None]).to(dtype)
    x[4] = 0
    given = None
    if R:
        given = Fold(randn(9, R, dtype=dtype), torch.rand(1 + R, device=x.device), R, 3)
    out, scale = quantised(x, given, extra)
    expected, expected_scale = empty_codes(*out.shape, x.device), torch.empty_like(scale)
    quantise_rows_reference(x, expected, expected_scale, given)
    assert torch.equal(scale, expected_scale)
    assert same(out, expected)


@pytest.mark.parametrize("log2", [3, 6])
def test_balance_is_a_power_of_two_below_the_bound(device, log2) -> None:
    top = torch.cat((torch.logspace(-12, 12, 97), torch.tensor([0.0, 1.0, 8.0, 7.9999995])))
    top, scale = top.to(device), torch.tensor(0.003, device=device)
    c = balance(top, scale, log2)
    assert (torch.frexp(c).mantissa == 0.5).all()
    ratio = (top / (c * scale))[top > 0]
    assert (ratio < 2**log2).all() and (ratio >= 2.0 ** (log2 - 1)).all()


WEIGHTS = ["bf16", "fp32", "fp16", "nf4", "nf4 single", "fp4", "nf4 128"]


def make_weight(kind: str, W: Tensor) -> Tensor | Quantised4bit:
    if kind in ("bf16", "fp32", "fp16"):
        dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
        return W.to(dtypes[kind])
    quant_type, _, how = kind.partition(" ")
    return four_bit(W, quant_type, how != "single", 128 if how == "128" else 64)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(("N", "K"), [(16, 64), (48, 80), (272, 128)])
def test_a_weight_and_its_transpose_have_the_same_codes(randn: Randn, kind, N, K) -> None:
    weight = make_weight(kind, randn(N, K))
    device = randn(1).device
    tops = group_tops([weight], None)
    plain, turned = empty_codes(N, K + 32, device), empty_codes(K, -(-N // 64) * 64 + 64, device)
    with pytest.raises(ValueError, match="row stride of a multiple of 64"):
        codes_transposed([weight], tops, turned.flatten()[: K * (N + 4)].view(K, N + 4)[:, :N])
    codes([weight], tops, plain[:, :K])
    codes_transposed([weight], tops, turned[:, 16 : 16 + N])
    assert same(plain[:, :K], turned[:, 16 : 16 + N].t())
    assert same(plain[:, :K], codes_reference(weight, tops))
    for untouched in (plain[:, K:], turned[:, :16], turned[:, 16 + N :]):
        assert untouched.float().isnan().all()
    exact = dequantised(weight) if isinstance(weight, Quantised4bit) else weight.float()
    near = plain[:, :K].float() * weight_scale(tops)
    torch.testing.assert_close(near, exact, rtol=2**-4, atol=float(tops[0]) / MAX * 2**-10)


GROUPS = {  # kinds; N of each; K
    "4-bit": (["nf4", "nf4"], (64, 48), 80),
    "three of 4 bits": (["nf4", "fp4", "nf4"], (128, 64, 272), 64),
    "single": (["nf4 single"] * 3, (64, 16, 32), 144),
    "layouts": (["nf4", "nf4 128", "nf4 single"], (64, 16, 48), 64),
    "floats": (["bf16", "fp32", "fp16"], (64, 128, 16), 192),
    "within a row of 64": (["bf16", "bf16"], (16, 48), 80),
    "4 bits and floats": (["nf4", "bf16"], (64, 64), 80),
    "five": (["bf16"] * 5, (64, 16, 32, 16, 16), 48),
}


@pytest.mark.parametrize(("kinds", "rows", "K"), GROUPS.values(), ids=list(GROUPS))
def test_the_codes_of_a_group_are_those_of_its_weights(randn: Randn, kinds, rows, K) -> None:
    weights = [make_weight(kind, randn(n, K)) for kind, n in zip(kinds, rows, strict=True)]
    N, device = sum(rows), randn(1).device
    tops = group_tops(weights, None)
    plain, turned = empty_codes(N, K + 32, device), empty_codes(K, -(-N // 64) * 64 + 64, device)
    codes(weights, tops, plain[:, :K])
    codes_transposed(weights, tops, turned[:, :N])
    expected = torch.cat([codes_reference(weight, tops).float() for weight in weights])
    assert torch.equal(plain[:, :K].float(), expected)
    assert torch.equal(turned[:, :N].float(), expected.t())
    for untouched in (plain[:, K:], turned[:, N:]):
        assert untouched.float().isnan().all()


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("kind", ["nf4", "bf16"])
def test_one_launch_writes_the_codes_of_a_group(randn: Randn, monkeypatch, kind) -> None:
    weights = [make_weight(kind, randn(n, 128)) for n in (64, 64, 32)]
    suffix = "4bit_kernel" if kind == "nf4" else "kernel"
    launches = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(fp8_weight, name)

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            launches.append(self.name)
            return self.kernel[grid]

    names = [f"_codes_{suffix}", f"_codes_transposed_{suffix}"]
    for name in names:
        monkeypatch.setattr(fp8_weight, name, Recorder(name))
    tops = group_tops(weights, None)
    codes(weights, tops, empty_codes(160, 128, tops.device))
    codes_transposed(weights, tops, empty_codes(128, 192, tops.device)[:, :160])
    assert launches == names


def test_one_scale_serves_rows_of_any_size(randn: Randn) -> None:
    """Down to rows 2^-10 of the largest: the noise is that of a scale for each row."""
    W = randn(12, 512) * torch.exp2(-torch.arange(12.0, device=randn(1).device))[:, None]
    tops = group_tops([W], None)
    one = codes_reference(W, tops).float() * weight_scale(tops)
    out, scale = quantised(W)
    each = out.float() * scale
    noise = [(y - W).square().sum(1) / W.square().sum(1) for y in (one, each)]
    assert (noise[0][:11] < 1.3 * noise[1][:11]).all(), (noise[0] / noise[1]).tolist()


@pytest.mark.parametrize("log2", [3, 6])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("J", "R"), [(40, 8), (123, 5), (16, 96)])
def test_the_fold_of_the_frozen_side(randn: Randn, dtype, J, R, turned, log2) -> None:
    S = randn(J, R, dtype=dtype) * torch.logspace(-2, 2, R, device=randn(1).device)
    S = S.to(dtype)
    S = S.t().contiguous().t() if turned else S
    tops = torch.cat((torch.full((1,), 0.3, device=S.device), S.float().abs().amax(0)))
    out, scale = empty_codes(J, 3 * R + 7, S.device), torch.empty(1, J, device=S.device)
    fold(S, R, tops, log2, out, scale)
    expected, expected_scale = torch.empty_like(out), torch.empty_like(scale)
    fold_reference(S, R, tops, log2, expected, expected_scale)
    assert same(out, expected) and torch.equal(scale, expected_scale)
    s = weight_scale(tops)
    assert (scale == s).all() and not out[:, 3 * R :].float().any()
    hi, again, lo = (out[:, i * R : (i + 1) * R].float() for i in range(3))
    assert same(hi, again) and hi.abs().max() <= 2**log2
    scaled = S.float() / balance(tops[1:], s, log2) / s
    torch.testing.assert_close(hi + lo, scaled, rtol=2**-8, atol=2**-10)


def test_nothing_to_fold(device) -> None:
    tops = torch.tensor([0.5], device=device)
    out, scale = empty_codes(20, 16, device), torch.empty(1, 20, device=device)
    fold(None, 0, tops, 3, out, scale)
    assert not out.float().any() and (scale == weight_scale(tops)).all()
    fold(None, 0, tops, 3, out[:, :0], scale)


def test_widths_that_gemms_like() -> None:
    assert fold_width(4096, 0) == 0
    assert fold_width(4096, 96) == 384 and fold_width(4096, 64) == 256
    assert fold_width(14336, 32) == 128
    assert fold_width(576, 8) == 64


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "K"), [(28672, 4096), (4096, 14336)])
@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_large_weights(cuda, kind, N, K) -> None:
    weight = make_weight(kind, torch.randn(N, K, device=cuda) * 0.02)
    tops = group_tops([weight], None)
    plain, turned = empty_codes(N, K, cuda), empty_codes(K, N, cuda)
    codes([weight], tops, plain)
    codes_transposed([weight], tops, turned)
    expected = codes_reference(weight, tops)
    assert same(plain, expected) and same(turned, expected.t())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [(4096, 1024, 1024), (14336, 14336)], ids=str)
@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_large_groups(cuda, kind, rows) -> None:
    K, N = 4096, sum(rows)
    weights = [make_weight(kind, torch.randn(n, K, device=cuda) * 0.02) for n in rows]
    tops = group_tops(weights, None)
    plain, turned = empty_codes(N, K + 384, cuda), empty_codes(K, N + 384, cuda)
    codes(weights, tops, plain[:, :K])
    codes_transposed(weights, tops, turned[:, :N])
    expected = torch.cat([codes_reference(weight, tops).float() for weight in weights])
    assert torch.equal(plain[:, :K].float(), expected)
    assert torch.equal(turned[:, :N].float(), expected.t())


@pytest.mark.gpu
@pytest.mark.parametrize("K", [4096, 14336, 28672, 40000])
def test_large_rows(cuda, K) -> None:
    x = torch.randn(1024, K, device=cuda, dtype=torch.bfloat16)
    tops = torch.rand(65, device=cuda) + 0.1
    given = Fold(torch.randn(1024, 64, device=cuda, dtype=torch.bfloat16), tops, 64, 3)
    out, scale = quantised(x, given, 64)
    expected, expected_scale = torch.empty_like(out), torch.empty_like(scale)
    quantise_rows_reference(x, expected, expected_scale, given)
    assert torch.equal(scale, expected_scale) and same(out, expected)
