"""LoRA groups in FP8: a coarse base, LoRA's part at bf16's precision, and where it runs at all."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lorafuse.kernels import fp8_linear
from lorafuse.kernels.fp8 import E4M3
from lorafuse.kernels.lora_linear import (
    Group,
    LoraProjection,
    NormPrologue,
    flat_tensors,
    lora_linear,
    reference,
    with_tensors,
)
from lorafuse.kernels.lora_mlp import lora_mlp
from lorafuse.kernels.lora_mlp import reference as mlp_reference
from lorafuse.kernels.lora_qkv import Heads, lora_qkv
from lorafuse.kernels.lora_qkv import reference as qkv_reference
from lorafuse.kernels.nf4 import Quantised4bit
from lorafuse.kernels.nf4 import reference as dequantised

BF16 = torch.bfloat16


@pytest.fixture
def fp8(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """FP8 for few rows; where no GPU can do it, `scaled_mm` multiplies the codes in fp32."""
    monkeypatch.setattr(fp8_linear, "MIN_ROWS", 16)
    if device.type == "cuda":
        if fp8_linear.unavailable(device) is not None:
            pytest.skip("this GPU has no FP8")
    else:
        monkeypatch.setattr(fp8_linear, "unavailable", lambda device: None)


@pytest.fixture
def make(randn: Callable[..., Tensor]) -> Callable[..., LoraProjection]:
    def projection(
        N: int, K: int, r: int, bias: bool = False, dropout: float = 0.0, B: float = 0.1
    ) -> LoraProjection:
        return LoraProjection(
            (randn(N, K) / K**0.5).to(BF16),
            randn(N) if bias else None,
            randn(r, K) / (3 * K) ** 0.5 if r else None,
            randn(N, r) * B if r else None,
            0.5,
            dropout,
            fp8=True,
        )

    return projection


def changed(projections: Sequence[LoraProjection], **changes: object) -> list[LoraProjection]:
    return [p._replace(**changes) for p in projections]


def exactly(projections: Sequence[LoraProjection]) -> list[LoraProjection]:
    """The same in fp64."""

    def wide(t: Tensor | Quantised4bit | None) -> Tensor | None:
        if isinstance(t, Quantised4bit):
            return dequantised(t).double()
        return None if t is None else t.double()

    return [
        LoraProjection(wide(p.weight), wide(p.bias), wide(p.A), wide(p.B), p.scale, p.dropout)  # type: ignore[arg-type]
        for p in projections
    ]


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


Results = dict[str, Tensor]


def run(
    function: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    projections: Sequence[LoraProjection],
    *args: object,
) -> Results:
    """Outputs and every gradient, with the same cotangents whatever the dtype."""
    x = x.detach().requires_grad_()
    tensors = [t if t is None else t.detach().requires_grad_() for t in flat_tensors(projections)]
    torch.manual_seed(3)
    outputs = function(x, with_tensors(projections, tensors), *args)
    torch.manual_seed(4)
    dys = [torch.randn(y.shape, dtype=torch.float64).to(y.device, BF16) for y in outputs]
    torch.autograd.backward(outputs, [dy.to(y.dtype) for y, dy in zip(outputs, dys, strict=True)])
    names = [f"{kind}{i}" for i in range(len(projections)) for kind in ("dA", "dB", "db")]
    results = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    results |= {n: t.grad for n, t in zip(names, tensors, strict=True) if t is not None}  # type: ignore[misc]
    return results | {"dx": x.grad}  # type: ignore[dict-item]


GROUPS = {  # (N, rank, bias) each
    "one": ((48, 8, False),),
    "one without LoRA": ((48, 0, False),),
    "bias without LoRA": ((48, 0, True),),
    "two": ((64, 4, False), (64, 4, False)),
    "three": ((64, 8, True), (32, 0, False), (16, 3, True)),
}


@pytest.mark.usefixtures("fp8")
@pytest.mark.parametrize("parts", GROUPS.values(), ids=list(GROUPS))
@pytest.mark.parametrize("K", [64, 144])
def test_forward_and_every_gradient(randn, make, parts, K) -> None:
    group = [make(N, K, r, bias) for N, r, bias in parts]
    x = randn(40, K, dtype=BF16)
    assert Group(group, BF16).uses_fp8(40)
    exact = run(reference, x.double(), exactly(group))
    ours = run(lora_linear, x, group)
    bf16 = run(lora_linear, x, changed(group, fp8=False))
    assert ours.keys() == exact.keys() == bf16.keys()
    for name, value in exact.items():
        got = ours[name]
        assert got.dtype == bf16[name].dtype and got.shape == value.shape
        if name[0] == "y" or name == "dx":
            assert 5e-3 < error(got, value) < 5e-2, (name, error(got, value))
        else:  # adapter gradients see the unrounded tensors
            assert error(got, value) <= 1.1 * error(bf16[name], value) + 1e-6, name


@pytest.mark.usefixtures("fp8")
@pytest.mark.parametrize("spread", [0.0, 1.0], ids=["even rows", "uneven rows"])
@pytest.mark.parametrize("outlier", [1.0, 100.0])
@pytest.mark.parametrize("B", [1e-5, 1e-3, 1e-1, 1.0])
def test_loras_own_term_is_as_exact_as_bf16s(randn, monkeypatch, device, B, outlier, spread):
    """Taken out of the GEMM's operands: the r-wide columns alone, in fp64."""
    K, N, R, T = 160, 192, 8, 24
    W = randn(N, K) * 0.02 * torch.exp(spread * randn(N, 1))
    x, dy = randn(T, K), randn(T, N) * 1e-5
    x[:, 3] *= outlier
    dy[:, 5] *= outlier
    x, dy = x.to(BF16), dy.to(BF16)
    A = ((torch.rand(R, K, device=device) * 2 - 1) / math.sqrt(K)).to(BF16)
    master = randn(N, R) * B
    sB = master.to(BF16)
    operands: list[tuple[Tensor, ...]] = []
    monkeypatch.setattr(fp8_linear, "scaled_mm", lambda *given: operands.append(given[:4]))
    xA, G = x @ A.t(), dy @ sB
    fp8_linear.forward([W], x, x.new_empty(T, N), xA, sB, R)
    fp8_linear.input_gradient([W], dy, x.new_empty(T, K), G, A, R)
    exact = [(x.double() @ A.double().t()) @ master.double().t()]
    exact.append((dy.double() @ master.double()) @ A.double())
    bf16 = [xA.double() @ sB.double().t(), G.double() @ A.double()]
    base = [x.double() @ W.double().t(), dy.double() @ W.double()]
    for i, (inner, (a, b, scale_a, scale_b)) in enumerate(zip((K, N), operands, strict=True)):
        assert a.isfinite().all() if a.dtype != E4M3 else a.float().isfinite().all()
        scales = scale_a.double() * scale_b.double()
        left = (a[:, :inner].double() @ b[:, :inner].double().t()) * scales
        right = (a[:, inner:].double() @ b[:, inner:].double().t()) * scales
        assert error(left, base[i]) < 5e-2
        # Below a millionth of the base, no bf16 output shows the term: half its bits will do.
        tiny = exact[i].norm() < 1e-3 * base[i].norm()
        assert error(right, exact[i]) < 1.5 * error(bf16[i], exact[i]) + (3e-2 if tiny else 1e-3)


@pytest.mark.usefixtures("fp8")
def test_a_small_step_of_B_shows_in_the_output(randn, make) -> None:
    """e4m3 alone would round it away: a change of B by 1 % moves no code of three bits."""
    p = make(64, 64, 8)
    x = randn(256, 64, dtype=BF16)
    assert p.B is not None
    step = 0.01 * p.B
    before, after = (lora_linear(x, [p._replace(B=B)])[0].double() for B in (p.B, p.B + step))
    assert p.A is not None
    expected = 0.5 * (x.double() @ p.A.double().t()) @ step.double().t()
    slope = ((after - before) * expected).sum() / expected.square().sum()
    assert 0.8 < slope < 1.2


@pytest.mark.usefixtures("fp8")
def test_the_same_codes_forward_and_backward(randn, make, monkeypatch, device) -> None:
    group = [make(64, 48, 4), make(32, 48, 4)]
    operands: list[Tensor] = []
    real = fp8_linear.scaled_mm

    def spy(a: Tensor, b: Tensor, *rest: Tensor) -> None:
        operands.append(b.clone())
        real(a, b, *rest)

    monkeypatch.setattr(fp8_linear, "scaled_mm", spy)
    run(lora_linear, randn(32, 48, dtype=BF16), group)
    forward, backward = operands
    assert torch.equal(forward[:, :48].float(), backward[:, :96].float().t())
    assert forward.shape == (96, 128) and backward.shape == (48, 128)


@pytest.mark.usefixtures("fp8")
def test_dropout_draws_stocks_masks(randn, make) -> None:
    group = [make(48, 64, 8, dropout=0.3), make(32, 64, 8, dropout=0.3)]
    x = randn(64, 64, dtype=BF16)
    bf16 = run(lora_linear, x, changed(group, fp8=False))
    ours = run(lora_linear, x, group)
    for name, value in bf16.items():
        limit = 5e-2 if name[0] == "y" or name == "dx" else 1e-2
        assert error(ours[name], value.double()) < limit, name


@pytest.mark.usefixtures("fp8")
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_a_gated_mlp(randn, make, residual, normed) -> None:
    gate_up, down = [make(96, 64, 4), make(96, 64, 4)], make(64, 96, 4)
    norm = NormPrologue(1 + 0.1 * randn(64, dtype=BF16), 1e-6) if normed else None
    wide = None if norm is None else NormPrologue(norm.weight.double(), 1e-6)

    def call(function: Callable[..., Tensor], prologue: NormPrologue | None) -> object:
        return lambda x, ps: (function(x, ps[:2], ps[2], "silu", prologue, residual),)

    x = randn(40, 64, dtype=BF16)
    exact = run(call(mlp_reference, wide), x.double(), exactly([*gate_up, down]))
    ours = run(call(lora_mlp, norm), x, [*gate_up, down])
    for name, value in exact.items():
        assert error(ours[name], value) < 0.1, (name, error(ours[name], value))
    bf16 = run(call(lora_mlp, norm), x, changed([*gate_up, down], fp8=False))
    assert error(ours["y0"], bf16["y0"].double()) > 1e-3


@pytest.mark.usefixtures("fp8")
def test_a_second_backward_computes_the_mlp_again(randn, make) -> None:
    gate_up, down = [make(96, 64, 4), make(96, 64, 4)], make(64, 96, 4)
    x = randn(40, 64, dtype=BF16).requires_grad_()
    y = lora_mlp(x, gate_up, down, "silu")
    (first,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    (again,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(first, again)


@pytest.mark.usefixtures("fp8")
def test_query_key_and_value(randn, make) -> None:
    heads = Heads(4, 2, 16)
    group = [make(64, 64, 4), make(32, 64, 4), make(32, 64, 0)]
    norm = NormPrologue(1 + 0.1 * randn(64, dtype=BF16), 1e-6)
    wide = NormPrologue(norm.weight.double(), 1e-6)
    x = randn(2, 20, 64, dtype=BF16)
    exact = run(lambda x, ps: qkv_reference(x, ps, heads, wide), x.double(), exactly(group))
    ours = run(lambda x, ps: lora_qkv(x, ps, heads, norm), x, group)
    for name, value in exact.items():
        assert error(ours[name], value) < 6e-2, (name, error(ours[name], value))


@pytest.mark.usefixtures("fp8")
def test_autocast_and_fp32_input(randn, make, device) -> None:
    p = make(48, 64, 4)
    x = randn(40, 64)
    with torch.autocast(device.type, BF16):
        (y,) = lora_linear(x, [p])
        (plain,) = lora_linear(x, [p._replace(fp8=False)])
    assert y.dtype == BF16 and 5e-3 < error(y, plain.double()) < 5e-2
    assert torch.equal(lora_linear(x, [p])[0], lora_linear(x, changed([p], fp8=False))[0])


def test_nothing_changes_where_it_does_not_run(randn, make, monkeypatch, device) -> None:
    monkeypatch.setattr(fp8_linear, "MIN_ROWS", 16)
    p, q = make(48, 64, 4, bias=True), make(24, 64, 4)
    cases = {
        "one of the group does not ask": ([p, p._replace(fp8=False)], 40, BF16),
        "24 outputs": ([p, q], 40, BF16),
        "few rows": ([p], 15, BF16),
        "fp32": ([p], 40, torch.float32),
        "fp16": ([p], 40, torch.float16),
    }
    monkeypatch.setattr(fp8_linear, "unavailable", lambda device: None)
    for what, (group, T, dtype) in cases.items():
        assert not Group(group, dtype).uses_fp8(T), what
        x = randn(T, 64, dtype=dtype)
        ours = run(lora_linear, x, group)
        for name, value in run(lora_linear, x, changed(group, fp8=False)).items():
            assert torch.equal(ours[name], value), (what, name)
    monkeypatch.undo()
    if device.type == "cpu":
        assert not Group([p], BF16).uses_fp8(4096)


def test_why_not(monkeypatch, device) -> None:
    cpu = torch.device("cpu")
    assert fp8_linear.why_not(cpu, BF16, 999, 64, 64) == (
        "FP8 needs an NVIDIA GPU of compute capability 8.9 or newer; this is a cpu"
    )
    monkeypatch.setattr(fp8_linear, "unavailable", lambda device: None)
    assert fp8_linear.why_not(cpu, BF16, 999, 64, 64) is None
    for given, reason in (
        (
            (torch.float16, 999, 64, 64),
            "FP8 stands in for bf16 GEMMs; this one computes in float16",
        ),
        ((BF16, 999, 72, 64), "FP8 GEMMs need multiples of 16 features; got 72 and 64"),
        ((BF16, 999, 64, 8), "FP8 GEMMs need multiples of 16 features; got 64 and 8"),
        ((BF16, 100, 64, 64), "fewer than 256 tokens: FP8 would not be faster"),
    ):
        assert fp8_linear.why_not(cpu, *given) == reason
    monkeypatch.undo()
    fp8_linear._gpu_lacks.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(fp8_linear, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA A40")
    try:
        assert fp8_linear.unavailable(torch.device("cuda:0")) == (
            "FP8 needs compute capability 8.9 or newer; NVIDIA A40 has 8.6"
        )
    finally:
        fp8_linear._gpu_lacks.cache_clear()


@pytest.mark.usefixtures("fp8")
def test_signal_to_noise(randn, device) -> None:
    """Four significant bits on both sides: 28 dB, and zeros are no trap."""
    weights = [(randn(128, 192) * 0.02).to(BF16), (randn(64, 192) * 0.02).to(BF16)]
    for db in fp8_linear.noise_db(weights, device).tolist():
        assert 27 < db < 31
    assert fp8_linear.noise_db([torch.zeros(64, 64, device=device)], device).isfinite().all()


@pytest.mark.gpu
@pytest.mark.usefixtures("fp8")
@pytest.mark.parametrize(("N", "K", "R"), [(6144, 4096, 96), (28672, 4096, 64), (4096, 14336, 32)])
def test_large_gemms_multiply_the_codes(cuda, N, K, R) -> None:
    """The GPU's FP8 GEMM against fp32 products of the very same codes, in both directions."""
    T = 2048
    W = torch.randn(N, K, device=cuda, dtype=BF16) * 0.02
    x, dy = (torch.randn(T, n, device=cuda, dtype=BF16) for n in (K, N))
    A = torch.randn(R, K, device=cuda, dtype=BF16) * 0.01
    sB = torch.randn(N, R, device=cuda, dtype=BF16) * 0.01
    real, seen = fp8_linear.scaled_mm, []

    def both(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out: Tensor) -> None:
        real(a, b, scale_a, scale_b, out)
        exact = (a.float() @ b.float().t()) * scale_a * scale_b
        seen.append(error(out, exact.double()))

    try:
        fp8_linear.scaled_mm = both
        y, dx = x.new_empty(T, N), x.new_empty(T, K)
        fp8_linear.forward([W], x, y, x @ A.t(), sB, R)
        fp8_linear.input_gradient([W], dy, dx, dy @ sB, A, R)
    finally:
        fp8_linear.scaled_mm = real
    assert max(seen) < 1e-2, seen
    assert error(y, (x.float() @ (W.float() + sB.float() @ A.float()).t()).double()) < 5e-2
    assert error(dx, (dy.float() @ (W.float() + sB.float() @ A.float())).double()) < 5e-2
